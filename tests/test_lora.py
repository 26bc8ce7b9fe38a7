"""LoRA: PEFT's numbers, any PEFT file read strictly, and a stack that equals its members alone."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import REFERENCE, lively, relative, small_config, tensors_of, warm_adapter

from brie_mlx import lora
from brie_mlx.attend import Cache, Examples
from brie_mlx.config import Config, LoraConfig
from brie_mlx.errors import AdapterError
from brie_mlx.lora import Adapter, Stack
from brie_mlx.weights import load_adapter, load_model

QWEN_05B = Config.from_dict(
    small_config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, vocab_size=151936
    )
)
SMALL = Config.from_dict(small_config())


def peft_settings(**changes: Any) -> dict[str, Any]:
    return {**LoraConfig(r=4).to_peft(), **changes}


def test_the_trainable_numbers_are_those_of_the_card_and_of_attention_alone() -> None:
    assert lora.num_parameters(LoraConfig(r=8), QWEN_05B) == 4_399_104
    attention = LoraConfig(r=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert lora.num_parameters(attention, QWEN_05B) == 1_081_344


def test_a_fresh_adapter_changes_nothing_and_has_pefts_initialisation() -> None:
    adapter = Adapter.fresh(LoraConfig(r=64), SMALL, seed=3)
    for layer in adapter.layers:
        for parts in layer.values():
            bound = 1 / np.sqrt(parts["lora_A"].shape[1])
            values = np.array(parts["lora_A"])
            assert 0.95 * bound < np.abs(values).max() <= bound
            assert abs(values.std() - bound / np.sqrt(3)) < 0.1 * bound
            assert not np.array(parts["lora_B"]).any()
            assert parts["lora_A"].dtype == mx.float32


def test_an_adapter_is_a_function_of_its_seed() -> None:
    first, again, other = (Adapter.fresh(LoraConfig(), SMALL, seed=seed).to_peft() for seed in (1, 1, 2))
    assert all(mx.array_equal(first[key], again[key]) for key in first)
    assert not any(mx.array_equal(first[key], other[key]) for key in first if "lora_A" in key)


def test_logits_with_a_real_peft_adapter_equal_the_recorded_ones() -> None:
    model = load_model(REFERENCE / "model")
    adapter = load_adapter(REFERENCE / "adapter_final_main", model.config)
    recorded = tensors_of(REFERENCE / "logits.safetensors")
    logits = model(recorded["input_ids"], attend=Cache(model.config, starts=[0, 0]), lora=adapter.branches())
    assert relative(logits, recorded["tuned_logits"]) <= 1e-5
    assert relative(recorded["base_logits"], recorded["tuned_logits"]) > 1e-3


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_base_equals_base_and_adapter(use_rslora: bool) -> None:
    model = lively(SMALL)
    adapter = warm_adapter(
        SMALL, r=4, use_rslora=use_rslora, alpha_pattern={"q_proj": 3}, rank_pattern={"mlp.up_proj": 2}
    )
    ids, attend = mx.arange(20)[None], Examples(SMALL, [20])
    beside, bare = model(ids, attend=attend, lora=adapter.branches()), model(ids, attend=attend)
    adapter.merge_into(model)
    merged = model(ids, attend=attend)
    assert relative(merged, beside) <= 1e-5
    assert relative(bare, beside) > 1e-2


def test_each_row_of_a_stack_equals_its_adapter_alone() -> None:
    """Adapters of different rank, scale and modules, and rows with none, in one pass."""
    model = lively(SMALL)
    adapters = [
        warm_adapter(SMALL, seed=1, r=4),
        warm_adapter(SMALL, seed=2, r=8, lora_alpha=4, target_modules=("q_proj", "down_proj")),
        warm_adapter(SMALL, seed=3, r=2, use_rslora=True, layers_to_transform=(1,)),
    ]
    ids = mx.array(np.random.default_rng(0).integers(0, 400, (5, 12)))
    chosen = [2, None, 0, 1, 0]
    together = model(ids, attend=Cache(SMALL, starts=[0] * 5), lora=Stack(adapters).branches(chosen))
    for row, number in enumerate(chosen):
        branches = None if number is None else adapters[number].branches()
        alone = model(ids[row : row + 1], attend=Examples(SMALL, [12]), lora=branches)
        assert relative(together[row], alone[0]) <= 1e-5


def test_a_stack_of_nobody_is_the_bare_base() -> None:
    assert Stack([warm_adapter(SMALL)]).branches([None, None]) is None


def test_saved_and_read_is_the_same_adapter_with_its_patterns() -> None:
    config = LoraConfig(r=4, use_rslora=True, rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"q_proj": 32})
    adapter = warm_adapter(
        SMALL, **{name: getattr(config, name) for name in ("r", "use_rslora", "rank_pattern", "alpha_pattern")}
    )
    read = LoraConfig.from_peft(adapter.config.to_peft())
    again = Adapter.from_peft(read, adapter.to_peft(), SMALL)
    assert again.layers[1]["mlp.up_proj"]["lora_A"].shape[0] == 2
    assert again.config.scale(0, "self_attn.q_proj") == 32 / np.sqrt(4)
    assert all(mx.array_equal(a, b) for a, b in zip(again.to_peft().values(), adapter.to_peft().values(), strict=True))


@pytest.mark.parametrize(
    ("key", "value", "path", "rank", "scale"),
    [
        ("rank_pattern", {"q_proj": 16}, (0, "self_attn.q_proj"), 16, 1.0),
        ("rank_pattern", {"self_attn.q_proj": 16}, (0, "self_attn.q_proj"), 16, 1.0),
        ("rank_pattern", {"proj": 16}, (0, "self_attn.q_proj"), 4, 4.0),
        ("rank_pattern", {r"layers\.[01]\.mlp\.up_proj": 2}, (1, "mlp.up_proj"), 2, 8.0),
        ("rank_pattern", {"^model.layers.0.mlp.up_proj": 2}, (0, "mlp.up_proj"), 2, 8.0),
        ("alpha_pattern", {"down_proj": 8}, (1, "mlp.down_proj"), 4, 2.0),
    ],
)
def test_patterns_match_the_end_of_a_path_as_in_peft(
    key: str, value: dict[str, int], path: tuple[int, str], rank: int, scale: float
) -> None:
    config = LoraConfig.from_peft(peft_settings(**{key: value}))
    assert (config.rank(*path), config.scale(*path)) == (rank, scale)


def test_patterns_give_the_ranks_and_scales_that_peft_gives() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    settings = peft_settings(
        rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 5, r"layers\.0\.self_attn\.[kv]_proj": 7},
        alpha_pattern={"v_proj": 9, "layers.1.self_attn.o_proj": 11},
        use_rslora=True,
        lora_alpha=16,
    )
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small_config()))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{name: settings[name] for name in names}))
    ours = LoraConfig.from_peft(settings)
    seen = 0
    for path, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            _, _, layer, *rest = path.split(".")
            place = (int(layer), ".".join(rest))
            assert ours.rank(*place) == module.r["default"]
            assert ours.scale(*place) == pytest.approx(module.scaling["default"])
            seen += 1
    assert seen == 14


def test_old_names_bfloat16_and_a_single_pattern_are_read() -> None:
    adapter = warm_adapter(SMALL, r=4, target_modules=("q_proj", "v_proj"))
    tensors = {key.replace(".weight", ".default.weight"): t.astype(mx.bfloat16) for key, t in adapter.to_peft().items()}
    read = LoraConfig.from_peft(peft_settings(target_modules=r".*\.self_attn\.(q|v)_proj"))
    again = Adapter.from_peft(read, tensors, SMALL)
    assert again.num_parameters == adapter.num_parameters
    assert all(parts["lora_A"].dtype == mx.float32 for layer in again.layers for parts in layer.values())


def test_everything_that_does_not_fit_is_listed_at_once() -> None:
    adapter = warm_adapter(SMALL, r=4)
    tensors = adapter.to_peft()
    keys = list(tensors)
    tensors[keys[0]] = tensors[keys[0]][:2]
    del tensors[keys[1]]
    tensors["base_model.model.lm_head.lora_A.weight"] = mx.zeros((4, 32))
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = mx.zeros((4, 32))
    with pytest.raises(AdapterError) as caught:
        Adapter.from_peft(adapter.config, tensors, SMALL)
    text = str(caught.value)
    assert f"{keys[0]}: shape (2, 32), expected (4, 32)" in text
    assert f"{keys[1]}: missing" in text
    assert "base_model.model.lm_head.lora_A.weight: unknown" in text
    assert "  - model.layers.0.self_attn.q_proj.lora_A.weight: unknown" in text
    assert "someone/base" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"r": None}, "r is missing"),
        ({"r": 0}, "rank 0"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"rank_pattern": {"(a+)+b": 4}}, "cannot be used"),
        ({"target_modules": "(q_proj"}, "cannot be used"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError) as caught:
        LoraConfig.from_peft(peft_settings(**change))
    assert said in str(caught.value)


def test_a_target_that_is_no_projection_is_refused() -> None:
    adapter = warm_adapter(SMALL, r=4)
    config = LoraConfig.from_peft(peft_settings(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(AdapterError, match="target_modules has 'embed_tokens'"):
        Adapter.from_peft(config, adapter.to_peft(), SMALL)


def test_an_adapter_is_not_merged_into_a_quantized_base() -> None:
    import mlx.nn as nn

    config = Config.from_dict(small_config(hidden_size=64, intermediate_size=128))
    model = lively(config)
    nn.quantize(model, 32, 4)
    with pytest.raises(AdapterError, match="quantized base"):
        warm_adapter(config).merge_into(model)
