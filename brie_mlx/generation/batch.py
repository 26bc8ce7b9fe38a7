"""Many prompts at once: one pass over the base a step serves every row, whatever its adapter.

A row is one answer under way. In each pass it reads its last word, or the next piece of its prompt; one that is
finished leaves, and what waits takes its place. Each answer is what decode.py gives for it alone, but for rounding.

    requests = [Request(tokenizer.prompt(messages), adapter=at) for at in (None, 0)]
    base, tuned = answer_all(model, tokenizer, requests, sampling=Sampling(), adapters=[adapter])
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from brie_mlx import device, fused
from brie_mlx.chat import Tokenizer
from brie_mlx.config import Config
from brie_mlx.errors import ModelError, NumbersError, RecipeError
from brie_mlx.generation.decode import CHUNK, Answer, read
from brie_mlx.generation.sampling import (
    NOT_FINITE,
    Sampling,
    _side_by_side,
    allowed_ids,
    choose,
    stream,
    uniforms,
)
from brie_mlx.lora import Adapter, Stack
from brie_mlx.qwen import Cache, Project, Qwen

ROWS = 32
"""Answers under way at a time, at most: each costs memory for its keys and values."""


@dataclass(frozen=True)
class Request:
    """What is to be answered, and by whom."""

    prompt_ids: Sequence[int]
    adapter: int | None = None
    """Its place in the list of adapters; None for the bare base."""
    run: int = 0
    """Another number gives another answer to the same prompt."""


def answer_all(
    model: Qwen,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    sampling: Sampling,
    adapters: Sequence[Adapter] = (),
    rows: int = ROWS,
    on_done: Callable[[int, Answer], object] | None = None,
) -> list[Answer]:
    """Return an answer for each request, in their order; `on_done` gets (place in the list, answer) as they end.

    rows: how many are under way at a time, at most. A row's time counts from when it joined.

    Raises, at once, RecipeError if prompts and answers do not fit in the model and ModelError if it does not know
    an id of a prompt; and NumbersError when logits are not finite.
    """
    _check(requests, sampling, model.config, adapters=len(adapters))
    if not requests:
        return []
    answers: dict[int, Answer] = {}
    batch = _Batch(model, tokenizer, requests, sampling=sampling, stack=Stack(adapters), most=rows)
    # While a GPU computes, the host writes down its next step, though a row may turn out to be finished and ride
    # along once in vain. On a CPU that would cost as much as it gains.
    ahead = not device.is_cpu()
    step = batch.step()
    while step and len(answers) < len(requests):
        mx.async_eval(step.ids)
        # It is not begun before this one is done: a cache in use would be copied, not written in place.
        following = batch.step() if ahead else None
        for row in batch.hear(step):
            answers[row.number] = reply = row.answer(tokenizer)
            if on_done:
                on_done(row.number, reply)
        step = following or batch.step()
    return [answers[number] for number in range(len(requests))]


def _check(requests: Sequence[Request], sampling: Sampling, config: Config, *, adapters: int) -> None:
    for request in requests:
        assert len(request.prompt_ids) > 0, "a prompt has at least its header"
        assert request.adapter is None or 0 <= request.adapter < adapters, f"adapter {request.adapter} of {adapters}"
    ids = set(itertools.chain.from_iterable(request.prompt_ids for request in requests))
    if strays := sorted(number for number in ids if not 0 <= number < config.vocab_size):
        raise ModelError(
            "The prompts have ids that the model does not know.",
            problems=[f"{number} is outside the model's vocabulary of {config.vocab_size:,}" for number in strays],
            hint="use the model's own tokenizer.json",
        )
    most = config.max_position_embeddings
    lengths = [len(request.prompt_ids) for request in requests]
    problems = [
        f"prompt {number} of {len(requests)} has {length:,} tokens"
        for number, length in enumerate(lengths, 1)
        if length + sampling.max_tokens > most
    ]
    if problems:
        room = most - max(lengths)
        raise RecipeError(
            f"An answer may have {sampling.max_tokens:,} tokens and this model holds {most:,} in all, "
            f"prompt and answer; {len(problems):,} of the prompts leave too little room.",
            problems=problems,
            hint=f"--max-tokens {room}" if room > 0 else "shorten the prompts",
        )


# --- rows --------------------------------------------------------------------------------------


@dataclass
class _Row:
    """One answer under way."""

    number: int
    """The request's place in the list."""
    request: Request
    stream: int
    unread: list[int]
    """What of the prompt is not in a pass yet."""
    length: int = 0
    """Tokens in the cache, by the last pass that was written down."""
    drawn: int = 0
    """Ids of the answer that were asked for, heard or not."""
    place: int = 0
    """Which row of the last pass it was."""
    said: list[int] = field(default_factory=list)
    done: bool = False
    num_reused_tokens: int = 0
    times: list[float] = field(default_factory=list)
    """Of joining, and of each token."""

    def take(self) -> list[int]:
        """Return what it reads in this pass of its prompt, and strike it from what is unread."""
        piece, self.unread = self.unread[:CHUNK], self.unread[CHUNK:]
        return piece

    def span(self, piece: Sequence[int]) -> range:
        """Return the positions of what it reads: of the piece, or of one word that it said."""
        return range(self.length, self.length + max(len(piece), 1))

    def answer(self, tokenizer: Tokenizer) -> Answer:
        """Return the finished answer."""
        joined, first, last = self.times[0], self.times[1], self.times[-1]
        return Answer(
            text=tokenizer.decode(self.said),
            ids=tuple(self.said),
            num_prompt_tokens=len(self.request.prompt_ids),
            num_reused_tokens=self.num_reused_tokens,
            seconds_to_first_token=first - joined,
            tokens_per_second=(len(self.said) - 1) / (last - first) if len(self.said) > 1 else None,
            stop_reason="stop" if self.said[-1] in tokenizer.stops else "length",
        )


@dataclass(frozen=True)
class _Step:
    """A pass that is written down, and perhaps under way."""

    ids: mx.array
    """The next id of each row, (B,)."""
    speakers: list[_Row | None]
    """Whose each id is; None where the prompt is not read to its end."""


class _Batch:
    """The rows under way, those that wait, and the cache they share."""

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        *,
        sampling: Sampling,
        stack: Stack,
        most: int,
    ) -> None:
        assert most > 0, "a batch has at least one row"
        self.model = model
        self.sampling = sampling
        self.stops = tokenizer.stops
        self.allowed = allowed_ids(tokenizer, model.config.vocab_size)
        self.stack = stack
        self.most = min(most, len(requests))
        self.waiting = deque(_waiting(requests, seed=sampling.seed))
        self.beginnings = _beginnings(model, requests, stack=stack)
        self.rows: list[_Row] = []
        self.cache = RowCache(model.config, self.most, dtype=model.model.norm.weight.dtype)
        self.drawn = mx.zeros(0, mx.int32)
        self.speakers: list[int | None] = []
        self.lora: list[Project] | None = None

    def step(self) -> _Step | None:
        """Write the next pass down without beginning it; None when no row is left."""
        self._change_rows()
        if not self.rows:
            return None
        # 1) what each row reads: a piece of its prompt, or the word it said last
        pieces = [row.take() for row in self.rows]
        reads = [row.span(piece) for row, piece in zip(self.rows, pieces, strict=True)]
        last = self._last_ids(pieces)  # (B,)
        earlier = [number for piece in pieces for number in piece[:-1]]
        ids = mx.concatenate([last, mx.array(earlier, mx.int32)])[:, None]  # (T, 1), as the cache wants them
        # 2) one pass for all, and the head for the last token of each
        self.cache.plan(reads)
        hidden = self.model.hidden(ids, attend=self.cache, lora=self._branches(pieces))  # (T, 1, D)
        logits = self.model.head(hidden[: len(self.rows), 0])  # (B, V)
        # 3) the next ids
        self.drawn = self._choose(logits, last)
        for place, (row, span) in enumerate(zip(self.rows, reads, strict=True)):
            row.place, row.length = place, span.stop
            row.drawn += not row.unread
        return _Step(self.drawn, [None if row.unread else row for row in self.rows])

    def hear(self, step: _Step) -> list[_Row]:
        """Wait for a pass, note what each row said, and return those that are finished by it."""
        numbers = cast(list[int], step.ids.tolist())
        now, finished = time.perf_counter(), list[_Row]()
        for row, number in zip(step.speakers, numbers, strict=True):
            if row is None or row.done:
                continue
            if number == NOT_FINITE:
                raise NumbersError(
                    f"The logits of token {len(row.said) + 1} of answer {row.number + 1} are not finite numbers",
                    hint="use another checkpoint; a base in float16 may need bfloat16 or float32",
                )
            row.said.append(number)
            row.times.append(now)
            row.done = number in self.stops or len(row.said) == self.sampling.max_tokens
            finished += [row] if row.done else []
        return finished

    def _change_rows(self) -> None:
        """Let the finished go and the waiting in; as many prompts begin together as fill a piece."""
        free = [at for at, row in enumerate(self.rows) if row.done or row.drawn == self.sampling.max_tokens]
        free += range(len(self.rows), self.most)
        reading = sum(min(len(row.unread), CHUNK) for row in self.rows)
        while self.waiting and free and reading < CHUNK:
            at, row = free.pop(0), self.waiting.popleft()
            self.rows[at : at + 1] = [row]
            reading += min(self._join(at, row), CHUNK)
        # rows from the end fill the gaps that are left, so that the live ones lie side by side
        gaps = [at for at in free if at < len(self.rows)]
        stay = len(self.rows) - len(gaps)
        sources = [at for at in range(stay, len(self.rows)) if at not in gaps]
        targets = [at for at in gaps if at < stay]
        self.cache.move(sources, targets)
        for source, target in zip(sources, targets, strict=True):
            self.rows[target] = self.rows[source]
        del self.rows[stay:]

    def _join(self, at: int, row: _Row) -> int:
        """Begin a row where its adapter's prompts part; return how many tokens it has to read."""
        row.times.append(time.perf_counter())
        beginning = self.beginnings.get(row.request.adapter)
        if beginning:
            self.cache.copy(beginning, at)
            row.length = row.num_reused_tokens = beginning.length
            row.unread = row.unread[beginning.length :]
        return len(row.unread)

    def _last_ids(self, pieces: Sequence[Sequence[int]]) -> mx.array:
        """Return the last id that each row reads, (B,): the end of its piece, or what the pass before drew for it."""
        read = [piece[-1] for piece in pieces if piece]
        known = itertools.count(self.drawn.size)
        places = [next(known) if piece else row.place for row, piece in zip(self.rows, pieces, strict=True)]
        return mx.concatenate([self.drawn, mx.array(read, mx.int32)])[mx.array(places)]

    def _branches(self, pieces: Sequence[Sequence[int]]) -> list[Project] | None:
        """Return the adapter of each token of a pass; it is made anew only when that changes."""
        adapters = [row.request.adapter for row in self.rows]
        earlier = [adapter for adapter, piece in zip(adapters, pieces, strict=True) for _ in piece[:-1]]
        if self.speakers != [*adapters, *earlier]:
            self.speakers = [*adapters, *earlier]
            self.lora = self.stack.branches(self.speakers)
        return self.lora

    def _choose(self, logits: mx.array, last: mx.array) -> mx.array:
        draws = mx.concatenate([uniforms([row.stream], row.drawn) for row in self.rows])  # (B, 2)
        seen = None
        if self.sampling.repetition_penalty != 1:
            heard = _side_by_side([[*row.request.prompt_ids, *row.said] for row in self.rows])
            seen = mx.concatenate([heard, last[:, None]], axis=1)  # `last` may not be heard yet
        return choose(logits, self.sampling, draws=draws, seen=seen, allowed=self.allowed)


def _waiting(requests: Sequence[Request], *, seed: int) -> list[_Row]:
    return [
        _Row(
            number,
            request,
            stream=stream(request.prompt_ids, seed=seed, run=request.run),
            unread=list(request.prompt_ids),
        )
        for number, request in enumerate(requests)
    ]


def _beginnings(model: Qwen, requests: Sequence[Request], *, stack: Stack) -> dict[int | None, Cache]:
    """Return, for each adapter with several prompts, a cache of what all of these begin with."""
    beginnings = {}
    for adapter in dict.fromkeys(request.adapter for request in requests):
        prompts = [list(request.prompt_ids) for request in requests if request.adapter == adapter]
        ids = _common(prompts) if len(prompts) > 1 else []
        if ids:
            cache = beginnings[adapter] = Cache(model.config)
            read(model, mx.array([ids]), cache=cache, lora=stack.branches([adapter]))
            mx.eval(cache.keys, cache.values)
    return beginnings


def _common(prompts: Sequence[list[int]]) -> list[int]:
    """Return what all prompts begin with, but for the last token of each, which is read for its logits."""
    first, last = min(prompts), max(prompts)  # what these two share, all that stand between them share
    most = min(map(len, prompts)) - 1
    return first[: next((at for at in range(most) if first[at] != last[at]), most)]


# --- the cache ---------------------------------------------------------------------------------


class RowCache:
    """Keys and values of rows that come and go, each with a length of its own.

    Every row lies from slot 0, so that a slot is a position: a row joins in the place of another without moving
    or rotating anything, nothing is copied in a step, and attention costs what the longest live row costs. All
    tokens of a pass are written at once, before any is looked at: MLX would copy a cache that is still to be read.

    A pass has a token a row, (T, 1): first the last token of each row, which attend together; then the earlier
    ones of rows that read several, row by row, which attend on their own.
    """

    def __init__(self, config: Config, rows: int, *, dtype: mx.Dtype) -> None:
        self.config = config
        shape = (rows, config.num_key_value_heads, Cache.BLOCK, config.head_dim)
        self.keys = [mx.zeros(shape, dtype) for _ in range(config.num_hidden_layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(config.num_hidden_layers)]
        self.reads: list[range] = []

    def plan(self, reads: Sequence[range]) -> None:
        """Say which positions each row reads in the next pass; all rows from the first have at least one."""
        self.reads = list(reads)
        last = [span[-1] for span in reads]
        rows = [row for row, span in enumerate(reads) for _ in span[:-1]]
        earlier = [position for span in reads for position in span[:-1]]
        self.rows = mx.array([*range(len(reads)), *rows])  # (T,), the row and the position of each token
        self.positions = mx.array([*last, *earlier])
        self.length = 1 + max(last)
        self._make_room(self.length)
        own = mx.arange(self.length) <= self.positions[: len(reads), None]  # (B, S)
        self.mask = mx.where(own, 0.0, -mx.inf)[:, None, None]  # (B, 1, 1, S)

    def copy(self, beginning: Cache, row: int) -> None:
        """Let a row begin with what another cache of one row holds."""
        length = beginning.length
        self._make_room(length)
        for ours, theirs in zip([*self.keys, *self.values], [*beginning.keys, *beginning.values], strict=True):
            ours[row, :, :length] = cast(mx.array, theirs)[0, :, :length]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Put rows in the place of others."""
        if not sources:
            return
        caches, seen = [*self.keys, *self.values], slice(0, self.length)
        taken = [cache[mx.array([*sources]), :, seen] for cache in caches]
        mx.eval(taken)  # before the cache is written: MLX would copy one that is still to be read
        for cache, moved in zip(caches, taken, strict=True):
            cache[mx.array([*targets]), :, seen] = moved

    def _make_room(self, length: int) -> None:
        rows, heads, slots, size = self.keys[0].shape
        if length > slots:
            room = -(-(length - slots) // Cache.BLOCK) * Cache.BLOCK
            fresh = mx.zeros((rows, heads, room, size), self.keys[0].dtype)
            self.keys = [mx.concatenate([array, fresh], axis=2) for array in self.keys]
            self.values = [mx.concatenate([array, fresh], axis=2) for array in self.values]

    def __call__(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Write k and v, then attend, (T, H, 1, Dh), (T, K, 1, Dh), (T, K, 1, Dh) -> (T, H, 1, Dh)."""
        q, k = (_rotate(self.config, x, self.positions) for x in (q, k))
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.positions] = k[:, :, 0]
        values[self.rows, :, self.positions] = v[:, :, 0]
        start = len(self.reads)
        live, seen = slice(0, start), slice(0, self.length)
        outputs = [_attend_in_rows(q[live], keys[live, :, seen], values[live, :, seen], self.mask)]
        for row, span in enumerate(self.reads):
            if len(span) > 1:
                own, seen = slice(row, row + 1), slice(0, span[-1])
                here = slice(start, start := start + len(span) - 1)
                outputs.append(_attend_alone(q[here], keys[own, :, seen], values[own, :, seen]))
        return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _rotate(config: Config, x: mx.array, positions: mx.array) -> mx.array:
    """Apply RoPE to (T, heads, 1, Dh), each row at its own position."""
    return mx.fast.rope(x, config.head_dim, traditional=False, base=config.rope_theta, scale=1.0, offset=positions)


def _attend_in_rows(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Attend with a query a row, (B, H, 1, Dh), (B, K, S, Dh), (B, K, S, Dh), (B, 1, 1, S) -> (B, H, 1, Dh)."""
    B, H, _, Dh = q.shape
    scale = Dh**-0.5
    if not device.is_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask.astype(q.dtype))
    # On a CPU, MLX's own makes a product for each head and takes exp: more than twice the time of this
    K = k.shape[1]
    q = q.reshape(B, K, H // K, Dh)
    scores = fused.scaled(q, scale * fused.LOG2E, lambda q: q @ k.swapaxes(2, 3)) + mask  # (B, K, G, S)
    weights = fused.exp2(scores - scores.max(axis=-1, keepdims=True))
    mixed = (weights @ v.astype(weights.dtype)) / weights.sum(axis=-1, keepdims=True)  # (B, K, G, Dh)
    return mixed.reshape(B, H, 1, Dh).astype(k.dtype)


def _attend_alone(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend with the last T tokens of one row, (T, H, 1, Dh), (1, K, S, Dh), (1, K, S, Dh) -> (T, H, 1, Dh)."""
    q = q.transpose(2, 1, 0, 3)  # (1, H, T, Dh)
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
    return y.transpose(2, 1, 0, 3)
