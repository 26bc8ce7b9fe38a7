"""From logits to the next id, by numbers that are a function of the seed, the prompt, the run and the place.

The steps stand in transformers' order: repetition penalty, temperature, top-k, top-p, min-p, then the draw.
A draw takes one random number a row and inverts the cumulative probabilities, so a row of a batch draws
what it would draw alone, and nothing depends on what was drawn before. How logits come about is decode.py's.

    sampler = Sampler(Sampling(temperature=0.75), [prompt_ids], allowed=allowed_ids(tokenizer, vocab_size))
    ids = sampler(logits)                                              # (B, V) -> (B,)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from brie_mlx import device, randomness
from brie_mlx.chat import Tokenizer
from brie_mlx.errors import RecipeError

NOT_FINITE = -1
"""Stands for the id of a row whose logits are not finite numbers."""

_BLOCK = 128  # words whose weights are summed first, see `_draw`
_LIKELIEST = 4096  # words among which a CPU looks for top-p's set first, see `_weights`


# --- settings ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next word is chosen, and how many. Names and meanings are those of transformers' GenerationConfig."""

    temperature: float = 0.75
    """Logits are divided by it; 0 takes the likeliest word."""
    top_p: float = 1.0
    """Keep the likeliest words that together reach this share; 1 keeps all."""
    top_k: int = 0
    """Keep this many of the likeliest words; 0 keeps all."""
    min_p: float = 0.0
    """Keep words with at least this share of the likeliest one's probability; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of words that stand in the prompt or the answer are divided by it, negative ones multiplied."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    seed: int = 0
    """Every draw is a function of this number, the prompt, the run and the token's place."""

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _RULES}
        problems = [
            f"{name} = {values[name]!r}: expected {expected}"
            for name, (expected, good) in _RULES.items()
            if type(values[name]) not in (int, float) or not good(values[name])
        ]
        if problems:
            raise RecipeError(
                "The settings of sampling are out of range.", problems=problems, hint="brie generate --help"
            )


def _whole(least: int) -> tuple[str, Callable[[float], bool]]:
    return f"a whole number, at least {least}", lambda value: type(value) is int and value >= least


_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0, or a number of at least 0.001", lambda value: value == 0 or 0.001 <= value < math.inf),
    "top_p": ("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "top_k": _whole(0),
    "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("a number above 0", lambda value: 0 < value < math.inf),
    "max_tokens": _whole(1),
    "seed": _whole(0),
}
"""What each setting must be, in words and as a test."""


def allowed_ids(tokenizer: Tokenizer, vocab_size: int) -> mx.array:
    """Return which ids an answer may hold, (V,) bool: those that stand for text, and the two stops.

    Barred are the other control tokens, such as `<|im_start|>`, `<tool_call>` and those for images, and
    the ids from the tokenizer's last to the head's, which stand for nothing and are never trained.
    """
    text = [
        number not in tokenizer.added and tokenizer.bpe.id_to_token(number) is not None for number in range(vocab_size)
    ]
    return mx.array([is_text or number in tokenizer.stops for number, is_text in enumerate(text)])


# --- random numbers ----------------------------------------------------------------------------


def stream(prompt_ids: Sequence[int], *, seed: int, run: int) -> int:
    """Return the number that stands for one answer: its seed, its prompt and its run."""
    return randomness.number("answer", seed, run, *map(int, prompt_ids))


def uniforms(streams: Sequence[int], step: int) -> mx.array:
    """Return two numbers in [0, 1) a row for token `step` of each answer, (B, 2) float32.

    They are two times 24 bits, what a float32 holds exactly, of one 64-bit number.
    """
    numbers = [randomness.number("token", stream, step) for stream in streams]
    return mx.array([[(number >> 40) / 2**24, (number >> 16) % 2**24 / 2**24] for number in numbers], mx.float32)


# --- the choice --------------------------------------------------------------------------------


class Sampler:
    """Chooses the next id in each row of a batch, step after step."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        *,
        runs: Sequence[int] | None = None,
        allowed: mx.array | None = None,
    ) -> None:
        """Take the prompt of each row, the number of its run (0), and what `allowed_ids` gives (all ids)."""
        self.sampling = sampling
        self.allowed = allowed
        self.step = 0
        runs = runs or [0] * len(prompts)
        self.streams = [stream(prompt, seed=sampling.seed, run=run) for prompt, run in zip(prompts, runs, strict=True)]
        self.seen = side_by_side(prompts) if sampling.repetition_penalty != 1 else None

    def __call__(self, logits: mx.array) -> mx.array:
        """Return the next ids, (B, V) -> (B,) int32; `NOT_FINITE` in a row whose logits are not numbers."""
        draws = uniforms(self.streams, self.step)
        ids = choose(logits, self.sampling, draws=draws, seen=self.seen, allowed=self.allowed)
        self.step += 1
        if self.seen is not None:
            self.seen = mx.concatenate([self.seen, ids[:, None]], axis=1)
        return ids


def side_by_side(prompts: Sequence[Sequence[int]]) -> mx.array:
    """Return the ids of all prompts, (B, longest); a short row repeats its first, which adds no new id."""
    longest = max(map(len, prompts))
    return mx.array([[*prompt, *[prompt[0]] * (longest - len(prompt))] for prompt in prompts], mx.int32)


def choose(
    logits: mx.array,
    sampling: Sampling,
    *,
    draws: mx.array,
    seen: mx.array | None = None,
    allowed: mx.array | None = None,
) -> mx.array:
    """Return one id a row, (B, V) -> (B,) int32; `NOT_FINITE` in a row whose logits are not numbers.

    draws: two numbers in [0, 1) a row, (B, 2), which temperature 0 does not use. seen: the ids that the
    penalty counts, (B, S), in any order and number. allowed: (V,) bool.
    """
    logits = logits.astype(mx.float32)  # sums over the vocabulary need it
    if allowed is not None:
        logits = mx.where(allowed, logits, -mx.inf)
    if seen is not None:
        logits = _penalized(logits, seen, sampling.repetition_penalty)
    top = logits.max(axis=-1, keepdims=True)  # (B, 1)
    ids = mx.argmax(logits, axis=-1) if sampling.temperature == 0 else _draw(_weights(logits, top, sampling), draws)
    return mx.where(mx.isfinite(top[:, 0]), ids.astype(mx.int32), NOT_FINITE)


def _penalized(logits: mx.array, seen: mx.array, penalty: float) -> mx.array:
    """Make every seen id less likely, once however often it was seen. https://arxiv.org/abs/1909.05858"""
    old = mx.take_along_axis(logits, seen, axis=-1)  # (B, S)
    return mx.put_along_axis(logits, seen, mx.where(old < 0, old * penalty, old / penalty), axis=-1)


def _weights(logits: mx.array, top: mx.array, sampling: Sampling) -> mx.array:
    """Return each word's probability as a multiple of the likeliest one's, (B, V) in 0..1; 0 where it is left out."""
    if sampling.top_k:
        logits = mx.where(logits >= _kth(logits, sampling.top_k), logits, -mx.inf)
    # MLX on a CPU takes half the time for a power of two that it takes for exp
    weights = mx.power(2.0, (logits - top) * (math.log2(math.e) / sampling.temperature))
    if sampling.top_p < 1:
        limit = sampling.top_p * weights.sum(axis=-1, keepdims=True)  # (B, 1)
        # a GPU sorts anyway, and must not wait for the host to see whether a part is enough
        among = _LIKELIEST if device.is_cpu() else weights.shape[-1]
        weights = mx.where(weights >= _nucleus_edge(weights, limit, among=among), weights, 0.0)
    if sampling.min_p > 0:
        weights = mx.where(weights >= sampling.min_p, weights, 0.0)
    return weights


def _kth(values: mx.array, k: int) -> mx.array:
    """Return the k-th largest of each row, (B, V) -> (B, 1), the smallest where there are fewer."""
    place = max(values.shape[-1] - k, 0)
    return mx.partition(values, place, axis=-1)[:, place, None]


def _nucleus_edge(weights: mx.array, limit: mx.array, *, among: int) -> mx.array:
    """Return the least weight that top-p keeps, (B, V), (B, 1) -> (B, 1): the words above it weigh less than `limit`.

    Words of the same weight stay or go together. It sorts the `among` largest, and all words if these are
    too few. https://arxiv.org/abs/1904.09751
    """
    words = weights.shape[-1]
    among = min(among, words)
    largest = weights if among == words else mx.partition(weights, words - among, axis=-1)[:, -among:]
    rising = mx.sort(largest, axis=-1)
    above = mx.cumsum(rising, axis=-1, reverse=True, inclusive=False)  # what the words after each one weigh
    if among < words and not mx.all(above[:, :1] >= limit).item():
        return _nucleus_edge(weights, limit, among=words)
    return mx.where(above < limit, rising, mx.inf).min(axis=-1, keepdims=True)


def _draw(weights: mx.array, draws: mx.array) -> mx.array:
    """Draw an id a row with probabilities in proportion to its weights, (B, V), (B, 2) -> (B,).

    First a block of words, then a word in it. One float32 sum over the whole vocabulary would take longer,
    and lose every word that weighs less than the sum's last bit.
    """
    rows, words = weights.shape
    blocks = mx.pad(weights, [(0, 0), (0, -words % _BLOCK)]).reshape(rows, -1, _BLOCK)
    block = _invert(blocks.sum(axis=-1), draws[:, :1])  # (B, 1)
    inside = mx.take_along_axis(blocks, block[..., None], axis=1)[:, 0]  # (B, _BLOCK)
    return (block * _BLOCK + _invert(inside, draws[:, 1:]))[:, 0]


def _invert(weights: mx.array, draw: mx.array) -> mx.array:
    """Return the first place whose cumulative weight is above `draw` of the whole, (B, N), (B, 1) -> (B, 1).

    Never a place of weight 0: a parallel sum may step up there by rounding, so only others are looked at.
    """
    positive = weights > 0
    reached = mx.where(positive, mx.cumsum(weights, axis=-1), 0.0)
    target = draw * reached.max(axis=-1, keepdims=True)  # below the maximum in float32 too, as draw <= 1 - 2**-24
    return mx.argmax(reached > target, axis=-1, keepdims=True)
