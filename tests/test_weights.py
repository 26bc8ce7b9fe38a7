"""Weights: found or explained, and read strictly."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
from conftest import lively, relative, small_config, warm_adapter
from mlx.utils import tree_flatten

from brie_mlx import weights
from brie_mlx.attend import Examples
from brie_mlx.config import Config
from brie_mlx.errors import AdapterError, ModelError


@pytest.fixture
def folder(tmp_path: Path, make_base: Callable[..., Path]) -> Path:
    return make_base(tmp_path / "base")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


def test_sharded_weights_equal_a_single_file(folder: Path) -> None:
    single = weights.load_model(folder)
    tensors = tensors_of(folder)
    names = list(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    sharded = weights.load_model(folder)
    for (name, a), (_, b) in zip(tree_flatten(single.parameters()), tree_flatten(sharded.parameters()), strict=True):
        assert mx.array_equal(a, b), name


def test_a_tied_checkpoint_may_carry_its_head_and_old_rotary_tables(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save(tensors, folder / "model.safetensors")
    weights.load_model(folder)


def test_a_4_bit_model_is_saved_by_mlx_and_read(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    import mlx.nn as nn

    plain = make_base(tmp_path / "plain", hidden_size=64, intermediate_size=128)
    raw = small_config(hidden_size=64, intermediate_size=128, quantization={"group_size": 32, "bits": 4})
    model = lively(Config.from_dict(raw))
    nn.quantize(model, 32, 4)
    mx.save_safetensors(str(plain / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (plain / "config.json").write_text(json.dumps(raw))
    read = weights.load_model(plain)
    ids, attend = mx.arange(9)[None], Examples(read.config, [9])
    assert relative(read(ids, attend=attend), model(ids, attend=attend)) <= 1e-5


def test_the_type_is_the_one_that_was_asked_for(folder: Path) -> None:
    assert weights.load_model(folder, dtype="bfloat16").model.norm.weight.dtype == mx.bfloat16
    assert weights.load_model(folder).model.norm.weight.dtype == mx.float32


def test_missing_unknown_and_misshapen_tensors_are_listed_at_once(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros(5, np.float32)
    save(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        weights.load_model(folder)
    text = str(caught.value)
    assert "model.layers.1.self_attn.q_proj.bias: missing" in text
    assert "model.layers.7.mlp.up_proj.weight: unknown" in text
    assert "model.norm.weight: shape (5,), expected (32,)" in text


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_weight_file_cut_short_is_named_before_it_is_mapped(folder: Path, keep: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors \([\d,]+ bytes\) is broken"):
        weights.load_model(folder)


def test_a_shard_index_cannot_name_files_elsewhere(folder: Path) -> None:
    for name in ("../model.safetensors", "/etc/passwd", "model.bin"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelError, match="outside its folder or of another kind"):
            weights.load_model(folder)


def test_a_folder_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(ModelError, match=r"model folder \./nowhere does not exist"):
        weights.find_model("./nowhere")
    with pytest.raises(AdapterError, match="adapter folder runs/x/checkpoint-1 does not exist"):
        weights.find_adapter("runs/x/checkpoint-1")


def test_a_model_that_is_neither_here_nor_to_be_had_names_the_ways_on() -> None:
    with pytest.raises(ModelError) as caught:
        weights.find_model("someone/not-here")
    text = str(caught.value)
    assert "someone/not-here is not on this machine" in text
    assert "--model DIR" in text
    assert "make demo" in text


def test_an_adapter_read_back_is_the_one_that_was_written(tmp_path: Path) -> None:
    config = Config.from_dict(small_config())
    adapter = warm_adapter(config, r=4)
    weights.write_adapter(tmp_path, adapter)
    again = weights.load_adapter(tmp_path, config)
    assert all(mx.array_equal(a, b) for a, b in zip(again.to_peft().values(), adapter.to_peft().values(), strict=True))


def test_an_adapter_with_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    config = Config.from_dict(small_config())
    adapter = warm_adapter(config, r=4)
    adapter.layers[1]["mlp.up_proj"]["lora_B"][3, 2] = mx.nan
    weights.write_adapter(tmp_path, adapter)
    with pytest.raises(AdapterError, match=r"layers.1.mlp.up_proj.lora_B.weight"):
        weights.load_adapter(tmp_path, config)


def test_an_adapter_for_another_base_is_refused_with_its_bases_name(tmp_path: Path) -> None:
    weights.write_adapter(tmp_path, warm_adapter(Config.from_dict(small_config()), r=4))
    with pytest.raises(AdapterError, match="someone/base"):
        weights.load_adapter(tmp_path, Config.from_dict(small_config(hidden_size=64)))
