"""The forward pass: equal to transformers' Qwen2, with and without its cache."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import REFERENCE, lively, relative, small_config, tensors_of

from brie_mlx.attend import Cache, Examples
from brie_mlx.config import Config
from brie_mlx.errors import ModelError
from brie_mlx.qwen import Qwen
from brie_mlx.weights import load_model

SHAPES = {
    "tied, 2 queries a key": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "untied, 1 query a key": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "untied, 4 queries a key": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "tied, 7 queries a key": {
        "hidden_size": 56,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_theta": 1e4,
    },
}


def draw(config: Config, *shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, config.vocab_size, shape))


def in_pieces(model: Qwen, ids: mx.array, sizes: list[int], **settings: Any) -> mx.array:
    """Return the logits of a pass through the cache, some tokens at a time."""
    cache = Cache(model.config, **settings)
    outputs, start = [], 0
    for size in sizes:
        outputs.append(model(ids[:, start : start + size], attend=cache))
        cache.advance(size)
        start += size
    return mx.concatenate(outputs, axis=1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_those_of_transformers(
    shape: dict[str, Any], tmp_path: Path, make_base: Callable[..., Path]
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = make_base(tmp_path / "base", **shape)
    model = load_model(folder)
    ids = draw(model.config, 2, 40)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.array(ids))).logits.numpy()
    plain = mx.concatenate([model(row[None], attend=Examples(model.config, [40])) for row in ids])
    assert relative(plain, expected) <= 1e-4
    assert relative(in_pieces(model, ids, [17, 1, 1, 21], starts=[0, 0]), expected) <= 1e-4


def test_logits_equal_the_recorded_ones() -> None:
    """The same without transformers: figures that it made, kept beside the tests."""
    model = load_model(REFERENCE / "model")
    recorded = tensors_of(REFERENCE / "logits.safetensors")
    assert relative(in_pieces(model, recorded["input_ids"], [24], starts=[0, 0]), recorded["base_logits"]) <= 1e-5


def test_examples_laid_end_to_end_do_not_see_each_other() -> None:
    model = lively(Config.from_dict(small_config()))
    ids = draw(model.config, 1, 30)
    together = model(ids, attend=Examples(model.config, [11, 1, 18]))
    for start, stop in ((0, 11), (11, 12), (12, 30)):
        alone = model(ids[:, start:stop], attend=Examples(model.config, [stop - start]))
        assert relative(together[:, start:stop], alone) <= 1e-5


def test_rows_of_different_length_share_a_cache() -> None:
    """Rows end at the same slot; what stands before a row's start is never seen."""
    model = lively(Config.from_dict(small_config()))
    ids = draw(model.config, 3, 20)
    starts = [0, 7, 19]
    together = in_pieces(model, ids, [19, 1], starts=starts)
    for row, start in enumerate(starts):
        alone = in_pieces(model, ids[row : row + 1, start:], [20 - start])
        assert relative(together[row, start:], alone[0]) <= 1e-5


def test_a_cache_grows_past_its_block_and_can_be_trimmed() -> None:
    model = lively(Config.from_dict(small_config()))
    ids = draw(model.config, 1, Cache.BLOCK + 40)
    at_once = in_pieces(model, ids, [Cache.BLOCK + 40])
    assert relative(in_pieces(model, ids, [Cache.BLOCK - 1, 2, 39]), at_once) <= 1e-5
    cache = Cache(model.config)
    model(ids[:, :100], attend=cache)
    cache.advance(100)
    cache.trim(60)
    assert relative(model(ids[:, 60:90], attend=cache), at_once[:, 60:90]) <= 1e-5


def test_a_4_bit_model_computes_what_its_dequantized_weights_do() -> None:
    raw = small_config(hidden_size=64, intermediate_size=128, quantization={"group_size": 32, "bits": 4})
    config = Config.from_dict(raw)
    model = lively(config)
    nn.quantize(model, 32, 4)
    plain = lively(config)
    for block, other in zip(model.model.layers, plain.model.layers, strict=True):
        for group, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                q = block[group][f"{name}_proj"]
                other[group][f"{name}_proj"].weight = mx.dequantize(q.weight, q.scales, q.biases, 32, 4)
    table = model.model.embed_tokens
    plain.model.embed_tokens.weight = mx.dequantize(table.weight, table.scales, table.biases, 32, 4)
    ids = draw(config, 1, 12)
    attend = Examples(config, [12])
    assert relative(model(ids, attend=attend), plain(ids, attend=attend)) <= 1e-4


def test_old_and_new_spellings_of_the_rope_base_are_read() -> None:
    raw = small_config(rope_theta=5e5)
    assert Config.from_dict(raw).rope_theta == 5e5
    del raw["rope_theta"]
    assert Config.from_dict({**raw, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}).rope_theta == 7e5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope scaling 'dynamic'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding attention"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": 30}, "not a multiple of 4 heads"),
        ({"num_key_value_heads": 3}, "not a multiple of 3 key heads"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"quantization": {"bits": 4}}, "without group_size"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization other than MLX's"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Config.from_dict(small_config(**change))


@pytest.mark.parametrize(
    ("size", "hidden", "layers", "heads", "keys", "tied"),
    [("0.5B", 896, 24, 14, 2, True), ("1.5B", 1536, 28, 12, 2, True), ("7B", 3584, 28, 28, 4, False)],
)
def test_published_shapes_are_read(size: str, hidden: int, layers: int, heads: int, keys: int, *, tied: bool) -> None:
    raw = small_config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        tie_word_embeddings=tied,
        max_window_layers=21,
        sliding_window=32768,
    )
    config = Config.from_dict(json.loads(json.dumps(raw)))
    assert (config.hidden_size, config.head_dim, config.tie_word_embeddings) == (hidden, hidden // heads, tied), size
