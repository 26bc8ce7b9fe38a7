"""Gradients written by hand: equal to autodiff of the plain formula, by the way of a CPU and by that of a GPU."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import relative

from brie_mlx import device, fused


@pytest.fixture(params=["cpu", "gpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Take the code path of this kind of device, whatever computes it."""
    if request.param == "gpu" and not shutil.which("g++"):
        pytest.skip("mx.compile needs g++ on a CPU")
    monkeypatch.setattr(device, "is_cpu", lambda: request.param == "cpu")
    fused._pointwise.cache_clear()
    yield request.param
    fused._pointwise.cache_clear()


def draw(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def both(function: Callable[..., mx.array], inputs: list[mx.array]) -> list[mx.array]:
    """Return a function's output and the gradients of a weighted sum of it."""
    output = function(*inputs)
    weights = draw(*output.shape, seed=99)
    slopes: Any = mx.grad(lambda *x: (function(*x) * weights).sum(), argnums=list(range(len(inputs))))(*inputs)
    return [output, *slopes]


def assert_same(ours: list[mx.array], theirs: list[mx.array], bound: float = 1e-5) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.dtype == expected.dtype
        assert mx.abs(mine - expected).max() <= bound * mx.maximum(1, mx.abs(expected).max())


@pytest.mark.parametrize("length", [1, 5, fused.BLOCK, fused.BLOCK + 1, 2 * fused.BLOCK + 30])
@pytest.mark.usefixtures("way")
def test_attention_is_causal_grouped_and_has_its_own_gradient(length: int) -> None:
    inputs = [draw(1, heads, length, 16, seed=heads) for heads in (6, 2)] + [draw(1, 2, length, 16, seed=3)]

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        k, v = (mx.repeat(x, 3, axis=1) for x in (k, v))
        scores = q @ k.swapaxes(2, 3) / 4
        future = mx.triu(mx.full((length, length), -mx.inf), k=1)
        return mx.softmax(scores + future, axis=-1) @ v

    assert_same(both(fused.causal_attention, inputs), both(plain, inputs), 2e-5)


@pytest.mark.usefixtures("way")
def test_swiglu_has_its_own_gradient() -> None:
    inputs = [10 * draw(7, 12, seed=1), draw(7, 12, seed=2)]
    assert_same(both(fused.swiglu, inputs), both(lambda gate, up: nn.silu(gate) * up, inputs))


@pytest.mark.usefixtures("way")
def test_the_product_with_dropout_has_its_own_gradient() -> None:
    mask = mx.random.bernoulli(0.7, (9, 12), key=mx.random.key(5))
    inputs = [draw(9, 12, seed=1), draw(4, 12, seed=2)]
    ours = both(lambda x, a: fused.dropped_product(x, a, mask), inputs)
    assert_same(ours, both(lambda x, a: (x * mask) @ a.T, inputs))


@pytest.mark.usefixtures("way")
def test_bfloat16_comes_back_as_bfloat16_near_float32() -> None:
    exact = [draw(1, heads, 300, 16, seed=heads) for heads in (4, 2, 2)]
    rough = [x.astype(mx.bfloat16) for x in exact]
    ours, theirs = both(fused.causal_attention, rough), both(fused.causal_attention, exact)
    assert all(x.dtype == mx.bfloat16 for x in ours)
    for mine, expected in zip(ours, theirs, strict=True):
        assert relative(mine.astype(mx.float32), expected) <= 0.05


@pytest.mark.usefixtures("way")
def test_a_power_of_two_is_one() -> None:
    x = mx.arange(-90, 10).astype(mx.float32) / 3
    assert mx.allclose(fused.exp2(x), mx.exp(x * 0.6931471805599453), rtol=1e-5, atol=0)
