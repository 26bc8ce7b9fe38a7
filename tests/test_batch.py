"""An answer in a batch is the answer alone, whatever stands beside it; and a batch computes nothing twice."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from conftest import lively, small_config, warm_adapter

import brie_mlx  # noqa: F401  (first: it puts the BLAS under mlx)
from brie_mlx import device
from brie_mlx.attend import Cache
from brie_mlx.chat import Tokenizer
from brie_mlx.config import Config
from brie_mlx.errors import ModelError, NumbersError, RecipeError
from brie_mlx.generation import batch, decode
from brie_mlx.generation.batch import Request, answer_all
from brie_mlx.generation.decode import Answer
from brie_mlx.generation.sampling import Sampling
from brie_mlx.lora import Adapter
from brie_mlx.qwen import Qwen

GREEDY = Sampling(temperature=0, max_tokens=24)
WARM = Sampling(temperature=1.2, max_tokens=24, seed=3)
FILTERED = Sampling(temperature=1, top_p=0.9, top_k=60, repetition_penalty=1.2, max_tokens=24)
STOPS = (116, 353)
"""Words that the model says now and then: here they end an answer, so that some are short."""


@pytest.fixture(scope="module")
def model() -> Qwen:
    """A base whose layers weigh more than its embedding: greedy answers do not repeat one word."""
    model = lively(Config.from_dict(small_config()))
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            linear.weight *= 20
    return model


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json: bytes, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    return dataclasses.replace(Tokenizer.read(folder), end=STOPS[0], end_of_text=STOPS[1])


@pytest.fixture(scope="module")
def adapters(model: Qwen) -> list[Adapter]:
    """Of different rank, scale and modules."""
    few = ["q_proj", "down_proj"]
    return [
        warm_adapter(model.config, seed=1, r=4),
        warm_adapter(model.config, seed=2, r=9, lora_alpha=30, target_modules=few),
    ]


@pytest.fixture(params=[False, True], ids=["cpu", "as on a gpu"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Take the ways that a GPU takes too: another attention, and a step written down ahead."""
    if request.param:
        monkeypatch.setattr(device, "is_cpu", lambda: False)
    return bool(request.param)


def words(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(400), k=length)


SYSTEM = words(20, seed=0)
LENGTHS = [5, 1, 33, 2, 60, 5, 17, 1, 41]
MIXED = [
    *(Request(SYSTEM + words(length, seed=at), adapter=(None, 0, 1)[at % 3]) for at, length in enumerate(LENGTHS, 1)),
    *(Request(SYSTEM + words(9, seed=99), adapter=0, run=run) for run in range(3)),
]
"""Ragged prompts after one system prompt, by the base and two adapters; the last one three times."""

Alone = Callable[[Sampling, Sequence[Request]], list[Answer]]


@pytest.fixture(scope="module")
def alone(model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter]) -> Alone:
    """Answer requests one after the other, each once for all tests."""
    known: dict[Any, Answer] = {}

    def one(settings: Sampling, request: Request) -> Answer:
        key = (settings, tuple(request.prompt_ids), request.adapter, request.run)
        if key not in known:
            lora = None if request.adapter is None else adapters[request.adapter].branches()
            prompt = request.prompt_ids
            known[key] = decode.answer(model, tokenizer, prompt, sampling=settings, lora=lora, run=request.run)
        return known[key]

    return lambda settings, requests: [one(settings, request) for request in requests]


def ids(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    return [answer.ids for answer in answers]


# --- the law -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 32])
@pytest.mark.parametrize("settings", [GREEDY, WARM, FILTERED], ids=["greedy", "sampled", "filtered"])
@pytest.mark.usefixtures("gpu")
def test_an_answer_in_a_batch_is_the_answer_alone(
    model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter], alone: Alone, settings: Sampling, rows: int
) -> None:
    """Ragged prompts, early stops, rows that join and leave, mixed adapters, fewer and more requests than rows."""
    expected = alone(settings, MIXED)
    got = answer_all(model, tokenizer, MIXED, sampling=settings, adapters=adapters, rows=rows)
    assert ids(got) == ids(expected)
    assert {answer.stop_reason for answer in got} == {"stop", "length"}, "or the test would prove little"
    assert len({answer.num_tokens for answer in got}) >= 3
    assert len({answer.ids for answer in got}) >= len(MIXED) - 2, "greedy says the same in each run"


@pytest.mark.parametrize(("piece", "block"), [(3, 256), (64, 8), (7, 16)])
@pytest.mark.usefixtures("gpu")
def test_pieces_of_a_prompt_and_blocks_of_the_cache_change_nothing(
    model: Qwen,
    tokenizer: Tokenizer,
    adapters: list[Adapter],
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    piece: int,
    block: int,
) -> None:
    """A long prompt is read over several passes, beside rows that speak; the cache grows under way."""
    monkeypatch.setattr(batch, "CHUNK", piece)
    monkeypatch.setattr(decode, "CHUNK", piece)
    monkeypatch.setattr(Cache, "BLOCK", block)
    got = answer_all(model, tokenizer, MIXED, sampling=WARM, adapters=adapters, rows=6)
    assert ids(got) == ids(alone(WARM, MIXED))


@pytest.mark.parametrize(
    "prompts",
    [
        [[7]],
        [[7], [7]],
        [[7], [8, 9]],
        [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2]],
        [[5, 4, 3], [5, 4, 3], [5, 4, 3]],
        [[3, 1], [3, 2, 1], [1, 3]],
    ],
    ids=str,
)
def test_whatever_prompts_share_they_are_answered_as_alone(
    model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter], alone: Alone, prompts: list[list[int]]
) -> None:
    """Nothing in common, one within the other, the same: the last token of each is always read."""
    requests = [Request(prompt, adapter=adapter) for prompt in prompts for adapter in (None, 1)]
    got = answer_all(model, tokenizer, requests, sampling=WARM, adapters=adapters)
    assert ids(got) == ids(alone(WARM, requests))


def test_a_batch_of_the_base_alone_needs_no_adapter(model: Qwen, tokenizer: Tokenizer, alone: Alone) -> None:
    """The plainest call."""
    requests = [Request(words(length, seed=length)) for length in (9, 4)]
    assert ids(answer_all(model, tokenizer, requests, sampling=GREEDY)) == ids(alone(GREEDY, requests))


@pytest.mark.usefixtures("gpu")
def test_the_longest_prompts_that_fit_are_answered(model: Qwen, tokenizer: Tokenizer, alone: Alone) -> None:
    """Up to the last position, also where a row rides along once more."""
    settings = Sampling(temperature=0, max_tokens=12)
    requests = [Request(words(500, seed=1)), Request(words(3, seed=2)), Request(words(500, seed=3))]
    got = answer_all(model, tokenizer, requests, sampling=settings, rows=2)
    assert ids(got) == ids(alone(settings, requests))


# --- what it costs -----------------------------------------------------------------------------


def test_every_token_goes_through_the_model_once(
    model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter], gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step on a finished row, but for one where the host is ahead; a system prompt once for each adapter."""
    read: list[int] = []
    hidden = Qwen.hidden

    def counted(self: Qwen, ids: mx.array, **settings: Any) -> mx.array:
        read.append(ids.size)
        return hidden(self, ids, **settings)

    monkeypatch.setattr(Qwen, "hidden", counted)
    got = answer_all(model, tokenizer, MIXED, sampling=WARM, adapters=adapters, rows=5)
    shared = 3 * len(SYSTEM)
    prompts = sum(answer.num_prompt_tokens - answer.num_reused_tokens for answer in got)
    said = sum(answer.num_tokens - 1 for answer in got)
    stopped = sum(answer.stop_reason == "stop" for answer in got)
    assert [answer.num_reused_tokens for answer in got] == [len(SYSTEM)] * len(MIXED)
    assert 0 <= sum(read) - (shared + prompts + said) <= (stopped if gpu else 0)


def test_all_rows_are_served_by_one_pass(model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter]) -> None:
    """The weights are what decoding waits for."""
    requests = [Request([7, at], adapter=(None, 0, 1)[at % 3]) for at in range(12)]
    never = dataclasses.replace(tokenizer, end=415, end_of_text=414)
    passes: list[int] = []
    projection = model.model.norm

    class Counted:
        weight = projection.weight

        def __call__(self, x: mx.array) -> mx.array:
            passes.append(x.shape[0])
            return projection(x)

    model.model.norm = Counted()
    try:
        answer_all(model, never, requests, sampling=GREEDY, adapters=adapters)
    finally:
        model.model.norm = projection
    assert passes == [1, 1, 1, *[12] * GREEDY.max_tokens], "three times what the prompts share, then all at once"


@pytest.mark.usefixtures("gpu")
def test_steps_write_the_cache_where_it_lies(
    model: Qwen, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the cache in each step, or when a row moves, would cost more than the step."""
    monkeypatch.setattr(Cache, "BLOCK", 16_384)
    config, rows = model.config, 4
    one = 4 * rows * config.num_key_value_heads * Cache.BLOCK * config.head_dim  # bytes of one layer's keys
    requests = [Request(words(5 + at, seed=at)) for at in range(9)]
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    got = answer_all(model, tokenizer, requests, sampling=WARM, rows=rows)
    used = mx.get_peak_memory() - before
    assert len({answer.num_tokens for answer in got}) >= 3, "rows have moved"
    assert used < one * (2 * config.num_hidden_layers + 0.8)


# --- what comes back ---------------------------------------------------------------------------


def test_answers_come_as_they_end_and_are_returned_in_their_order(
    model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter], alone: Alone
) -> None:
    """What is done can be written down at once; a kill an hour later must not lose it."""
    came: list[tuple[int, Answer]] = []
    got = answer_all(
        model, tokenizer, MIXED, sampling=WARM, adapters=adapters, rows=5, on_done=lambda *each: came.append(each)
    )
    order = [number for number, _ in came]
    assert sorted(order) == [*range(len(MIXED))] != order
    assert [answer for _, answer in sorted(came, key=lambda each: each[0])] == got
    for ours, theirs in zip(got, alone(WARM, MIXED), strict=True):
        assert (ours.text, ours.stop_reason) == (theirs.text, theirs.stop_reason)
        assert ours.num_prompt_tokens == theirs.num_prompt_tokens
        assert ours.seconds_to_first_token > 0
        assert (ours.tokens_per_second is None) == (ours.num_tokens == 1)


def test_nothing_to_answer_gives_no_answers(model: Qwen, tokenizer: Tokenizer) -> None:
    """A run that is resumed when all is done asks for this."""
    assert answer_all(model, tokenizer, [], sampling=GREEDY) == []


def test_all_prompts_that_do_not_fit_are_named_at_once(model: Qwen, tokenizer: Tokenizer) -> None:
    """Before an hour of decoding, not in it; and with the remedy."""
    requests = [Request(words(length, seed=0)) for length in (488, 489, 3, 500)]
    with pytest.raises(RecipeError, match=r"may have 24 tokens and this model holds 512 in all.*2 of the") as caught:
        answer_all(model, tokenizer, requests, sampling=GREEDY)
    assert caught.value.problems == ["prompt 2 of 4 has 489 tokens", "prompt 4 of 4 has 500 tokens"]
    assert caught.value.hint == "--max-tokens 12"
    with pytest.raises(RecipeError) as caught:
        answer_all(model, tokenizer, [Request(words(512, seed=0))], sampling=GREEDY)
    assert caught.value.hint == "shorten the prompts"


def test_ids_that_the_model_does_not_know_are_named_at_once(model: Qwen, tokenizer: Tokenizer) -> None:
    """A tokenizer of another model must not end in an answer about nothing."""
    with pytest.raises(ModelError) as caught:
        answer_all(model, tokenizer, [Request([1, 416]), Request([9000, 416])], sampling=GREEDY)
    assert caught.value.problems == [f"{number} is outside the model's vocabulary of 416" for number in (416, 9000)]


@pytest.mark.parametrize(
    ("request_", "rows"), [(Request([]), 1), (Request([1], adapter=2), 1), (Request([1], adapter=-1), 1), (MIXED[0], 0)]
)
def test_our_own_mistakes_are_assertions(
    model: Qwen, tokenizer: Tokenizer, adapters: list[Adapter], request_: Request, rows: int
) -> None:
    """An index from the end would answer with another adapter than was meant."""
    with pytest.raises(AssertionError):
        answer_all(model, tokenizer, [request_], sampling=GREEDY, adapters=adapters, rows=rows)


def test_logits_that_are_not_finite_stop_the_batch(model: Qwen, tokenizer: Tokenizer) -> None:
    """A broken adapter must not be judged by what it does not say."""
    broken = warm_adapter(model.config)
    broken.layers[0]["self_attn.v_proj"]["lora_B"] *= float("nan")
    with pytest.raises(NumbersError, match="token 1 of answer 1 are not finite"):
        answer_all(model, tokenizer, [Request([1, 2], adapter=0)], sampling=GREEDY, adapters=[broken])
