"""From a prompt to an answer: read the prompt in chunks, then one id at a time, the device always a step ahead.

What has been read stays in a `Past` and is not read again. Which id follows is sampling.py's business, and what
a dialogue remembers is dialogue.py's.

    reply = answer(model, tokenizer, tokenizer.prompt(messages), sampling=Sampling(), on_text=print)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import mlx.core as mx

from brie_mlx.attend import Cache
from brie_mlx.chat import Decoder, Tokenizer
from brie_mlx.config import Config
from brie_mlx.errors import ModelError, NumbersError, RecipeError
from brie_mlx.generation.sampling import NOT_FINITE, Sampler, Sampling, allowed_ids
from brie_mlx.qwen import Project, Qwen

CHUNK = 512
"""Prompt tokens that go through the model at a time: enough to keep it busy, few enough to bound the memory."""


class Past:
    """What a model has read: a cache of one row, and the ids that lie in it. It holds for one model and one adapter.

    After an interruption at any point, slots below both lengths hold what `ids` says.
    """

    def __init__(self, config: Config) -> None:
        self.cache = Cache(config)
        self.ids: list[int] = []

    def shared(self, prompt: Sequence[int]) -> int:
        """Return how many of the prompt's tokens need not be read again; its last always is, for its logits."""
        most = min(len(self.ids), self.cache.length, len(prompt) - 1)
        return next((at for at in range(most) if self.ids[at] != prompt[at]), most)

    def rewind(self, prompt: Sequence[int]) -> int:
        """Forget what the prompt does not begin with, make ready for the rest, and return `shared`."""
        kept = self.shared(prompt)
        self.cache.trim(kept)
        self.ids = list(prompt)
        return kept


@dataclass(frozen=True)
class Answer:
    """An answer and what it took."""

    text: str
    ids: tuple[int, ...]
    """As the model gave them; a stop that came is the last."""
    num_prompt_tokens: int
    num_reused_tokens: int
    """Tokens of the prompt that were read before, and not again."""
    seconds_to_first_token: float
    tokens_per_second: float | None
    """Of the tokens after the first; None where there is none."""
    stop_reason: Literal["stop", "length"]
    """Whether the model ended the answer, or max_tokens did."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, a stop included."""
        return len(self.ids)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer and its figures, for JSON."""
        return {**dataclasses.asdict(self), "ids": list(self.ids), "num_tokens": self.num_tokens}


def generate(
    model: Qwen,
    prompt_ids: Sequence[int],
    *,
    sampling: Sampling,
    stops: Collection[int],
    allowed: mx.array | None = None,
    lora: Sequence[Project] | None = None,
    past: Past | None = None,
    run: int = 0,
) -> Iterator[int]:
    """Yield the answer's ids as they come, at most max_tokens; a stop ends it and is yielded too.

    allowed: (V,) bool, all ids if None. lora: a branch a layer. past: what was read before by this model and
    adapter; it is kept up to date. run: another number gives another answer to the same prompt.

    Raises, at once, RecipeError if prompt and answer do not fit in the model and ModelError if it does not know
    an id of the prompt; and NumbersError when logits are not finite.
    """
    prompt = list(prompt_ids)
    _check(prompt, sampling, model.config)
    sampler = Sampler(sampling, [prompt], runs=[run], allowed=allowed)
    past = Past(model.config) if past is None else past
    return _decode(model, prompt, sampler=sampler, stops=stops, lora=lora, past=past)


def _check(prompt: Sequence[int], sampling: Sampling, config: Config) -> None:
    assert prompt, "a prompt has at least its header"
    strays = sorted({number for number in prompt if not 0 <= number < config.vocab_size})
    if strays:
        problems = [f"{number} is outside the model's vocabulary of {config.vocab_size:,}" for number in strays]
        raise ModelError(
            "The prompt has ids that the model does not know.",
            problems=problems,
            hint="use the model's own tokenizer.json",
        )
    room = config.max_position_embeddings - len(prompt)
    if sampling.max_tokens > room:
        hint = f"--max-tokens {room}" if room > 0 else "shorten the prompt, or start the dialogue anew"
        raise RecipeError(
            f"The prompt has {len(prompt):,} tokens and the answer may have {sampling.max_tokens:,}; "
            f"this model holds {config.max_position_embeddings:,} in all",
            hint=hint,
        )


def _decode(
    model: Qwen,
    prompt: list[int],
    *,
    sampler: Sampler,
    stops: Collection[int],
    lora: Sequence[Project] | None,
    past: Past,
) -> Iterator[int]:
    # 1) read what is new in the prompt
    kept = past.rewind(prompt)
    ids = sampler(read(model, mx.array([prompt[kept:]]), cache=past.cache, lora=lora))  # (1,)
    mx.async_eval(ids)
    for left in reversed(range(sampler.sampling.max_tokens)):
        # 2) give the device the next step before waiting for this one
        following = sampler(read(model, ids[:, None], cache=past.cache, lora=lora)) if left else ids
        mx.async_eval(following)
        # 3) hand this one out
        number = cast(int, ids.item())
        if number == NOT_FINITE:
            at = len(past.ids) - len(prompt) + 1
            raise NumbersError(
                f"The logits of token {at} are not finite numbers",
                hint="use another checkpoint; a base in float16 may need bfloat16 or float32",
            )
        past.ids.append(number)
        yield number
        if number in stops:
            return
        ids = following


def read(model: Qwen, ids: mx.array, *, cache: Cache, lora: Sequence[Project] | None = None) -> mx.array:
    """Read new ids into the cache, `CHUNK` at a time, and return the logits after the last, (B, T) -> (B, V).

    Only the last position goes through the head. In the chunks before the last one, only what the cache keeps
    is computed.
    """
    total = ids.shape[1]
    for start in range(0, total, CHUNK):
        if start:
            mx.eval(cache.keys, cache.values)
        chunk = ids[:, start : start + CHUNK]
        hidden = model.hidden(chunk, attend=cache, lora=lora)  # (B, up to CHUNK, D)
        cache.advance(chunk.shape[1])
    return model.head(hidden[:, -1])


def answer(
    model: Qwen,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    sampling: Sampling,
    allowed: mx.array | None = None,
    lora: Sequence[Project] | None = None,
    past: Past | None = None,
    run: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> Answer:
    """Return the answer to a prompt; `on_text` gets its text in pieces of whole characters as they come.

    allowed: what `allowed_ids` gives, made here if it is not at hand. The rest, and the errors: `generate`.
    """
    allowed = allowed_ids(tokenizer, model.config.vocab_size) if allowed is None else allowed
    past = Past(model.config) if past is None else past
    num_reused_tokens = past.shared(prompt_ids)
    decoder, ids = Decoder(tokenizer), list[int]()
    tell = on_text or (lambda _: None)
    times = [time.perf_counter()]  # of the start, and of each token
    for number in generate(
        model, prompt_ids, sampling=sampling, stops=tokenizer.stops, allowed=allowed, lora=lora, past=past, run=run
    ):
        times.append(time.perf_counter())
        ids.append(number)
        if piece := decoder.feed(number):
            tell(piece)
    if piece := decoder.finish():
        tell(piece)
    return Answer(
        text=tokenizer.decode(ids),
        ids=tuple(ids),
        num_prompt_tokens=len(prompt_ids),
        num_reused_tokens=num_reused_tokens,
        seconds_to_first_token=times[1] - times[0],
        tokens_per_second=(len(ids) - 1) / (times[-1] - times[1]) if len(ids) > 1 else None,
        stop_reason="stop" if ids[-1] in tokenizer.stops else "length",
    )
