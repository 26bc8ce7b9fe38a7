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

from brie_mlx import device
from brie_mlx.attend import Cache, RowCache
from brie_mlx.chat import Tokenizer
from brie_mlx.config import Config
from brie_mlx.errors import ModelError, NumbersError, RecipeError
from brie_mlx.generation.decode import CHUNK, Answer, read
from brie_mlx.generation.sampling import NOT_FINITE, Sampling, allowed_ids, choose, side_by_side, stream, uniforms
from brie_mlx.lora import Adapter, Stack
from brie_mlx.qwen import Project, Qwen

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
        # It is begun when this one is done: MLX may copy a cache that is in use instead of writing in place.
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

    def __post_init__(self) -> None:
        self.unread = list(self.request.prompt_ids)  # what of the prompt is in no pass yet

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
        streams = [stream(request.prompt_ids, seed=sampling.seed, run=request.run) for request in requests]
        self.waiting = deque(map(_Row, range(len(requests)), requests, streams))
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
            heard = side_by_side([[*row.request.prompt_ids, *row.said] for row in self.rows])
            seen = mx.concatenate([heard, last[:, None]], axis=1)  # `last` may not be heard yet
        return choose(logits, self.sampling, draws=draws, seen=seen, allowed=self.allowed)


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
