"""The bridge: a folder that PEFT loads to the same logits, or no folder at all."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import safetensors.numpy
from click.testing import Result
from conftest import relative, small_config, warm_adapter

from brie_mlx import weights
from brie_mlx.config import Config
from brie_mlx.errors import AdapterError
from brie_mlx.export import peft as bridge
from brie_mlx.lora import Adapter

SMALL = Config.from_dict(small_config())


def save_checkpoint(folder: Path, base: Path, **settings: Any) -> Adapter:
    adapter = warm_adapter(SMALL, base_model_name_or_path=str(base), **settings)
    folder.mkdir()
    weights.write_adapter(folder, adapter)
    return adapter


def test_the_folder_holds_pefts_two_files_with_the_names_and_shapes_of_peft(tmp_path: Path, base: Path) -> None:
    adapter = save_checkpoint(tmp_path / "checkpoint-1", base, r=4)
    bridge.export_peft(tmp_path / "checkpoint-1", tmp_path / "out", base_model="someone/base")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (48, 4)
    assert len(tensors) == 28
    assert all(relative(tensors[key], tensor) == 0 for key, tensor in adapter.to_peft().items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}}])
def test_peft_loads_the_folder_and_computes_the_same_logits(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    adapter = save_checkpoint(tmp_path / "checkpoint-1", base, **settings)
    done = bridge.export_peft(tmp_path / "checkpoint-1", tmp_path / "out", base_model="someone/base")
    assert "through PEFT, logits within" in done.check
    difference, change = bridge.compare_with_peft(tmp_path / "out", base, adapter)
    assert difference <= 1e-4
    assert change > 1e-2


def test_an_adapter_that_peft_would_silently_ignore_is_refused(tmp_path: Path, base: Path) -> None:
    """PEFT only warns when it finds half of the keys."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    adapter = save_checkpoint(tmp_path / "checkpoint-1", base, r=4)
    tensors = safetensors.numpy.load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    half = {key: tensor for key, tensor in tensors.items() if "layers.0" in key}
    safetensors.numpy.save_file(half, tmp_path / "checkpoint-1" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="does not find all of the adapter"):
        bridge.compare_with_peft(tmp_path / "checkpoint-1", base, adapter)
    with pytest.raises(AdapterError, match=r"layers.1.mlp.down_proj.lora_B.weight: missing"):
        bridge.export_peft(tmp_path / "checkpoint-1", tmp_path / "out", base_model="someone/base")


def test_without_peft_the_check_says_so(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else sys)
    save_checkpoint(tmp_path / "checkpoint-1", base)
    done = bridge.export_peft(tmp_path / "checkpoint-1", tmp_path / "out", base_model="someone/base")
    assert (
        done.check
        == "28 tensors read back equal, by name, shape and value; not through PEFT itself, which needs peft here"
    )


def test_a_local_base_is_never_published(tmp_path: Path, base: Path, brie: Callable[..., Result]) -> None:
    save_checkpoint(tmp_path / "checkpoint-1", base)
    result = brie("export", "peft", tmp_path / "checkpoint-1", tmp_path / "out")
    assert result.exit_code == 1
    assert "which nobody else can load" in result.output
    assert "--base-model OWNER/NAME" in result.output
    assert not (tmp_path / "out").exists()


def test_a_base_model_that_is_no_hub_name_is_refused(tmp_path: Path, base: Path, brie: Callable[..., Result]) -> None:
    save_checkpoint(tmp_path / "checkpoint-1", base)
    result = brie("export", "peft", tmp_path / "checkpoint-1", tmp_path / "out", "--base-model", str(base))
    assert result.exit_code == 1
    assert "is not the name of a repository" in result.output


def test_an_untrained_adapter_is_not_worth_a_folder(tmp_path: Path, base: Path) -> None:
    adapter = save_checkpoint(tmp_path / "checkpoint-1", base)
    for layer in adapter.layers:
        for parts in layer.values():
            parts["lora_B"] = mx.zeros_like(parts["lora_B"])
    weights.write_adapter(tmp_path / "checkpoint-1", adapter)
    with pytest.raises(AdapterError, match="changes nothing"):
        bridge.export_peft(tmp_path / "checkpoint-1", tmp_path / "out", base_model="someone/base")


def test_a_failed_check_leaves_no_folder(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: sys)
    monkeypatch.setattr(bridge, "compare_with_peft", lambda *_: (0.5, 0.5))
    save_checkpoint(tmp_path / "checkpoint-1", base)
    with pytest.raises(AdapterError, match="PEFT does not see the adapter as brie does"):
        bridge.export_peft(tmp_path / "checkpoint-1", tmp_path / "out", base_model="someone/base")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path, base: Path, brie: Callable[..., Result]) -> None:
    save_checkpoint(tmp_path / "checkpoint-1", base)
    (tmp_path / "out").mkdir()
    result = brie("export", "peft", tmp_path / "checkpoint-1", tmp_path / "out", "--base-model", "someone/base")
    assert result.exit_code == 1
    assert "exists already, and nothing is overwritten" in result.output
