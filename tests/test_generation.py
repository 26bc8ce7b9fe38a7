"""An answer is a function of model, prompt, settings, seed and run; caches, chunks and batches change nothing."""

import dataclasses
import errno
import itertools
import json
import os
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import lively, relative, small_config, warm_adapter

import brie_mlx  # noqa: F401  (first: it puts the BLAS under mlx)
from brie_mlx import files, nano, weights
from brie_mlx.attend import Cache
from brie_mlx.chat import IGNORED, Tokenizer
from brie_mlx.config import Config
from brie_mlx.data.rows import read_examples
from brie_mlx.errors import DataError, ModelError, NumbersError, RecipeError, RunError
from brie_mlx.generation import decode, sampling
from brie_mlx.generation.decode import Answer, Past, answer, generate
from brie_mlx.generation.dialogue import Dialogue, printable
from brie_mlx.generation.sampling import NOT_FINITE, Sampler, Sampling, allowed_ids, choose, uniforms
from brie_mlx.qwen import Qwen

GREEDY = Sampling(temperature=0, max_tokens=24)
ALMOST_ONE = 1 - 2**-24
PROMPT = [7, 30, 2, 99, 250, 41, 8, 8, 120, 3]


@pytest.fixture(scope="module")
def make_talker(tokenizer_json: bytes) -> Callable[..., Path]:
    """Write a random base whose layers weigh more than its embedding: greedy answers do not repeat one word."""

    def make(folder: Path, **changes: Any) -> Path:
        raw = small_config(**changes)
        model = lively(Config.from_dict(raw))
        for block in model.model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
                linear.weight *= 20
        nano.save_model(model, raw, tokenizer_json, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, make_talker: Callable[..., Path]) -> Path:
    return make_talker(tmp_path_factory.mktemp("talker") / "small")


@pytest.fixture(scope="module")
def model(talker: Path) -> Qwen:
    return weights.load_model(talker)


@pytest.fixture(scope="module")
def tokenizer(talker: Path) -> Tokenizer:
    return Tokenizer.read(talker)


def listed(array: mx.array) -> Any:
    """Return an array's numbers, or the one it holds, for Python and its type checker."""
    return np.array(array).tolist()


def ids(model: Qwen, prompt: Sequence[int] = PROMPT, **settings: Any) -> list[int]:
    return list(generate(model, prompt, **{"sampling": GREEDY, "stops": (), **settings}))


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


class Scripted:
    """Stands for a model that says what it is told, and counts what it is asked."""

    def __init__(self, model: Qwen, script: Sequence[int], *, prompt: int = len(PROMPT)) -> None:
        self.config = model.config
        self.script = [*script, 0]
        self.prompt = prompt
        self.read: list[int] = []
        self.heads: list[tuple[int, ...]] = []

    def hidden(self, ids: mx.array, *, attend: Cache, lora: None) -> mx.array:
        assert lora is None
        self.read.append(ids.shape[1])
        return mx.arange(attend.length, attend.length + ids.shape[1])[None, :, None]

    def head(self, hidden: mx.array) -> mx.array:
        self.heads.append(hidden.shape)
        said = self.script[min(listed(hidden)[0][0] - self.prompt + 1, len(self.script) - 1)]
        if said == NOT_FINITE:
            return mx.full((1, self.config.vocab_size), float("nan"))
        return 9.0 * (mx.arange(self.config.vocab_size) == said)[None].astype(mx.float32)


# --- the settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.1, "0, or a number of at least 0.001"),
        ("temperature", float("inf"), "0, or a number of at least 0.001"),
        ("temperature", float("nan"), "0, or a number of at least 0.001"),
        ("temperature", "hot", "0, or a number of at least 0.001"),
        ("top_p", 0, "a number above 0, at most 1"),
        ("top_p", 1.1, "a number above 0, at most 1"),
        ("top_k", -1, "a whole number, at least 0"),
        ("top_k", 2.5, "a whole number, at least 0"),
        ("min_p", -0.5, "a number from 0 to 1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("max_tokens", 0, "a whole number, at least 1"),
        ("max_tokens", True, "a whole number, at least 1"),
        ("seed", -1, "a whole number, at least 0"),
        ("seed", None, "a whole number, at least 0"),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value_and_what_was_expected(
    name: str, value: Any, expected: str
) -> None:
    """A user finds the mistake in the message alone."""
    with pytest.raises(RecipeError) as caught:
        Sampling(**{name: value})
    assert caught.value.problems == [f"{name} = {value!r}: expected {expected}"]


def test_all_settings_out_of_range_are_named_at_once() -> None:
    """Mending one mistake must not uncover the next."""
    with pytest.raises(RecipeError) as caught:
        Sampling(temperature=-1, top_p=2, max_tokens=0)
    assert [problem.split(" =")[0] for problem in caught.value.problems] == ["temperature", "top_p", "max_tokens"]


def test_the_edges_of_the_settings_are_settings_too() -> None:
    """A bound that refuses its own edge would refuse greedy decoding, or top_p = 1."""
    Sampling(temperature=0, top_p=1, min_p=1, top_k=0, max_tokens=1, seed=0)
    Sampling(temperature=0.001, top_p=1e-9, min_p=0, repetition_penalty=0.5)


# --- the draw ----------------------------------------------------------------------------------


def draw(logits: mx.array, settings: Sampling, streams: Sequence[int]) -> np.ndarray:
    return np.array(choose(logits, settings, draws=uniforms(streams, 0)))


def test_draws_have_the_distribution_of_the_softmax() -> None:
    """Chi-square over 300 words in three blocks; 1 in 10,000 seeds would fail, this one does not."""
    words, rows = 300, 20_000
    logits = normal(words) * 0.5
    got = draw(mx.broadcast_to(logits, (rows, words)), Sampling(temperature=0.75), range(rows))
    scaled = np.array(logits, np.float64) / 0.75
    expected = rows * np.exp(scaled) / np.exp(scaled).sum()
    statistic = ((np.bincount(got, minlength=words) - expected) ** 2 / expected).sum()
    assert expected.min() > 4
    assert statistic < 398.3, "the chi-square of 299 degrees of freedom is above this once in 10,000"
    assert statistic > 217.5, "and below this as rarely"


def test_a_word_of_probability_zero_is_never_drawn() -> None:
    """Rounding at either end of the cumulative sum must not reach a word that is barred."""
    words = 1000
    only = mx.array([129, 130, 700])
    logits = mx.full((words,), -mx.inf)
    logits[only] = mx.array([0.0, -3.0, 1.0])
    edges = [0.0, 2**-24, 0.5, ALMOST_ONE]
    draws = mx.array(list(itertools.product(edges, edges)))
    got = choose(mx.broadcast_to(logits, (len(draws), words)), Sampling(temperature=1), draws=draws)
    assert set(listed(got)) == {129, 130, 700}


def test_a_sum_that_rounds_upwards_leads_to_no_barred_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU sums in parallel, and may step up a last bit where the weight is 0, as this stand-in does."""
    monkeypatch.setattr(mx, "cumsum", lambda _, axis: mx.array([[1.0, 1.0000001, 2.0, 2.0000002]]) + 0 * axis)
    weights = mx.array([[1.0, 0.0, 1.0, 0.0]])
    assert [listed(sampling._invert(weights, mx.array([[at]])))[0][0] for at in (0, 0.5, ALMOST_ONE)] == [0, 2, 2]


def test_the_end_of_a_large_vocabulary_can_be_drawn() -> None:
    """Words lighter than the last bit of one float32 sum over all would never come, though together they count."""
    words = 151_936
    logits = mx.full((1, words), -17.5)  # each 2.5e-8 of the first word, and 0.4% together
    logits[0, 0] = 0.0
    share = (words - 1) * np.exp(-17.5)
    just_above, above = 1 / (1 + share) + 1e-5, 1 - 0.5 * share
    first = listed(choose(logits, Sampling(temperature=1), draws=mx.array([[just_above, 0.5]])))[0]
    middle = listed(choose(logits, Sampling(temperature=1), draws=mx.array([[above, 0.5]])))[0]
    last = listed(choose(logits, Sampling(temperature=1), draws=mx.array([[ALMOST_ONE, ALMOST_ONE]])))[0]
    assert 0 < first < 1000
    assert 0.45 < middle / words < 0.55
    assert last > words - 500


def test_a_row_of_a_batch_draws_what_it_would_draw_alone() -> None:
    """Answers in a batch must not depend on their neighbours, whatever the filters and the prompts' lengths."""
    settings = Sampling(top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.3, seed=5)
    prompts, runs = [[1, 2, 3], [4], [1, 2, 3]], [0, 0, 1]
    steps = [normal(3, 500, seed=step) for step in range(4)]
    together = Sampler(settings, prompts, runs=runs)
    alone = [Sampler(settings, [prompt], runs=[run]) for prompt, run in zip(prompts, runs, strict=True)]
    for logits in steps:
        batch = listed(together(logits))
        assert batch == [listed(sampler(logits[at : at + 1]))[0] for at, sampler in enumerate(alone)]
    assert len(set(batch)) > 1


def test_every_part_of_a_draws_name_changes_it() -> None:
    """Seed, prompt, run and place: leaving one out would repeat answers."""
    base = sampling.stream([1, 2], seed=0, run=0)
    others = [sampling.stream([1, 2], seed=1, run=0), sampling.stream([1, 3], seed=0, run=0)]
    others += [sampling.stream([1, 2], seed=0, run=1), sampling.stream([12], seed=0, run=0)]
    assert len({base, *others}) == 5
    assert listed(uniforms([base], 0)) != listed(uniforms([base], 1))
    assert sampling.stream(list(np.array([1, 2], np.int32)), seed=0, run=0) == base, "whatever holds the ids"


def test_uniforms_fill_the_unit_interval_without_its_end() -> None:
    """1 would be past every word. The two of a row are independent."""
    numbers = np.array(uniforms(range(4000), 3))
    assert numbers.shape == (4000, 2)
    assert numbers.min() >= 0
    assert numbers.max() <= ALMOST_ONE
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.02
    assert np.abs(numbers.var(axis=0) - 1 / 12).max() < 0.005
    assert abs(np.corrcoef(numbers.T)[0, 1]) < 0.05


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_word(temperature: float, broken: float) -> None:
    """Otherwise a broken adapter says "!!!!" and nobody knows why."""
    logits = normal(3, 300)
    logits[1, 17] = broken
    got = listed(choose(logits, Sampling(temperature=temperature), draws=uniforms([1, 2, 3], 0)))
    assert got[1] == NOT_FINITE
    assert got[0] >= 0
    assert got[2] >= 0


# --- the filters -------------------------------------------------------------------------------


def probabilities(logits: mx.array, settings: Sampling, seen: mx.array | None = None) -> np.ndarray:
    """Return what the draw is made from, normalised."""
    if seen is not None:
        logits = sampling._penalized(logits, seen, settings.repetition_penalty)
    kept = np.array(sampling._weights(logits, logits.max(axis=-1, keepdims=True), settings), np.float64)
    return kept / kept.sum(axis=-1, keepdims=True)


def plain(logits: np.ndarray, settings: Sampling, seen: Sequence[int]) -> np.ndarray:
    """The same for one row, word by word, in float64."""
    scores = logits.astype(np.float64)
    for word in set(seen):
        scores[word] *= settings.repetition_penalty if scores[word] < 0 else 1 / settings.repetition_penalty
    p = np.exp((scores - scores.max()) / settings.temperature)
    order = sorted(range(len(p)), key=lambda word: -p[word])
    if settings.top_k:
        p[order[settings.top_k :]] = 0
    p /= p.sum()
    above = 0.0
    for word in order:
        p[word], above = (p[word] if above < settings.top_p else 0), above + p[word]
    p[p < settings.min_p * p.max()] = 0
    return p / p.sum()


FILTERS = [
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_k": 1},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.02},
    {"min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1},
    {"temperature": 1.5, "top_p": 0.95, "top_k": 60, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_filters_do_what_a_plain_reading_of_them_does(settings: dict[str, Any]) -> None:
    """A reference that anybody can check by eye."""
    logits, seen = 3 * normal(3, 200, seed=4), mx.array([[5, 9, 5, 100], [1, 1, 1, 2], [7, 8, 9, 199]])
    chosen = Sampling(**settings)
    ours = probabilities(logits, chosen, seen)
    for row in range(3):
        expected = plain(np.array(logits[row]), chosen, listed(seen[row]))
        assert ((ours[row] > 0) == (expected > 0)).all()
        np.testing.assert_allclose(ours[row], expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_filters_do_what_those_of_transformers_do(settings: dict[str, Any]) -> None:
    """The names are transformers', so the meanings and their order must be too."""
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    chosen = Sampling(**settings)
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(float(chosen.repetition_penalty)),
        processors.TemperatureLogitsWarper(float(chosen.temperature)),
        *([processors.TopKLogitsWarper(chosen.top_k)] if chosen.top_k else []),
        processors.TopPLogitsWarper(chosen.top_p),
        processors.MinPLogitsWarper(chosen.min_p),
    ]
    logits, seen = 3 * normal(2, 200, seed=6), mx.array([[5, 9, 5, 100], [1, 1, 1, 2]])
    scores = torch.tensor(np.array(logits))
    for processor in chain:
        scores = processor(torch.tensor(np.array(seen), dtype=torch.long), scores)
    theirs = scores.softmax(-1).numpy()
    ours = probabilities(logits, chosen, seen)
    assert ((ours > 0) == (theirs > 0)).all()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-9)


def test_words_as_likely_as_the_last_one_kept_are_kept_too() -> None:
    """Logits of a bfloat16 head tie often; which of the tied words stay must not depend on their ids."""
    logits = mx.array([[2.0, 1.0, 1.0, 1.0, -9.0]])
    assert (probabilities(logits, Sampling(temperature=1, top_k=2)) > 0).tolist() == [[True, True, True, True, False]]
    assert (probabilities(logits, Sampling(temperature=1, top_p=0.5)) > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("spread", [0.01, 1, 10])
def test_the_short_way_to_top_p_keeps_what_sorting_all_words_keeps(spread: float) -> None:
    """Sorting part of the vocabulary may save time only, also where the part is too small."""
    row = mx.power(2.0, spread * normal(3, 20_000))
    limit = 0.9 * row.sum(axis=-1, keepdims=True)
    whole = sampling._nucleus_edge(row, limit, among=20_000)
    assert listed(sampling._nucleus_edge(row, limit, among=300)) == listed(whole)
    kept = (row >= whole).sum(axis=-1)
    assert listed((kept > 300).all()) == (spread < 10), "one side of the branch each"


def test_the_penalty_counts_the_answer_as_well_as_the_prompt() -> None:
    """A word is made less likely from the moment it is said."""
    logits = mx.array([[3.0, 2.9, 2.8, 2.7]])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [[0]])
    assert [listed(sampler(logits))[0] for _ in range(4)] == [1, 2, 3, 0]


def test_a_short_prompt_in_a_batch_is_penalized_for_its_own_words_only() -> None:
    """What fills its row up must be no word that it does not hold."""
    logits = mx.array([[3.0, 2.9, 2.8, 2.7]] * 2)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [[2], [0, 1, 2]])
    assert [listed(sampler(logits)) for _ in range(2)] == [[0, 3], [1, 0]]


def test_greedy_takes_the_likeliest_word() -> None:
    """And no draw can change it."""
    logits = normal(4, 300)
    expected = np.array(logits).argmax(axis=-1).tolist()
    for draws in ([0.0, 0.0], [ALMOST_ONE, ALMOST_ONE]):
        assert listed(choose(logits, GREEDY, draws=mx.array([draws] * 4))) == expected


def test_an_answer_may_hold_text_and_the_two_stops_only(tokenizer: Tokenizer) -> None:
    """Any other control token, or an id past the tokenizer's, would vanish from the text or forge a turn."""
    allowed = listed(allowed_ids(tokenizer, 416))
    barred = {number for number, good in enumerate(allowed) if not good}
    text = {number for number in range(416) if tokenizer.token_bytes(number)}
    assert len(allowed) == 416
    assert barred == set(range(416)) - text - tokenizer.stops
    assert tokenizer.start in barred
    assert 415 in barred
    odd = dataclasses.replace(tokenizer, added={**tokenizer.added, 65: "<tool_call>"})
    assert not listed(allowed_ids(odd, 416)[65]), "an added token that is also one of the vocabulary"


def test_no_barred_id_is_ever_drawn(model: Qwen, tokenizer: Tokenizer) -> None:
    """At a temperature where every id is as likely as another, and in greedy decoding of a model that insists."""
    allowed = allowed_ids(tokenizer, 416)
    wild = Sampling(temperature=1000, max_tokens=300, repetition_penalty=1.1)
    drawn = ids(model, [tokenizer.start, *PROMPT], sampling=wild, allowed=allowed)
    assert listed(allowed[mx.array(drawn)].all())
    assert len(set(drawn)) > 150
    insisting: Any = Scripted(model, [415, tokenizer.start])
    short = Sampling(temperature=0, max_tokens=2)
    assert ids(insisting, allowed=allowed, sampling=short) == [0, 0]
    assert answer(insisting, tokenizer, PROMPT, sampling=short).ids == (0, 0), "nor in a whole answer"


# --- decoding ----------------------------------------------------------------------------------


def test_cached_decoding_gives_what_reading_everything_again_gives(model: Qwen) -> None:
    """The law of the cache."""
    so_far = list(PROMPT)
    for _ in range(24):
        logits = model(mx.array([so_far]), attend=Cache(model.config))
        so_far.append(listed(mx.argmax(logits[0, -1])))
    assert ids(model) == so_far[len(PROMPT) :]
    assert len(set(ids(model))) > 6, "an answer that says one thing only would prove little"


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_answers_are_those_of_mlx_lm(
    tied: bool, tmp_path: Path, make_talker: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another implementation, from the same files, over 64 tokens."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    folder = make_talker(tmp_path / "base", tie_word_embeddings=tied)
    theirs, _ = load_model(folder)
    steps = generate_step(mx.array(PROMPT), theirs, max_tokens=64)
    expected = [token for token, _ in steps]
    settings = Sampling(temperature=0, max_tokens=64)
    monkeypatch.setattr(decode, "CHUNK", 4)
    assert ids(weights.load_model(folder), sampling=settings) == expected
    assert len(set(expected)) > 10


def test_a_prompt_read_in_chunks_gives_the_same_logits(model: Qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a chunk is a matter of memory, not of meaning."""
    at_once = decode.read(model, mx.array([PROMPT]), cache=Cache(model.config))
    for size in (1, 3, 5, 9):
        monkeypatch.setattr(decode, "CHUNK", size)
        chunked = decode.read(model, mx.array([PROMPT]), cache=(cache := Cache(model.config)))
        assert cache.length == len(PROMPT)
        assert relative(chunked, at_once) < 1e-5


def test_only_the_last_position_goes_through_the_head(model: Qwen) -> None:
    """The head is the largest product of a small model: 151,936 words for each position of a prompt would be waste."""
    scripted: Any = Scripted(model, [5, 6])
    ids(scripted, sampling=Sampling(temperature=0, max_tokens=2))
    assert scripted.heads == [(1, 1), (1, 1)]


def test_the_next_step_is_under_way_before_a_token_is_handed_out(model: Qwen) -> None:
    """The device must not wait while the host prints; and after the last token there is nothing to compute."""
    scripted: Any = Scripted(model, [5, 6, 7])
    answers = generate(scripted, PROMPT, sampling=Sampling(temperature=0, max_tokens=3), stops=())
    asked = [(number, list(scripted.read)) for number in answers]
    assert asked == [(5, [10, 1]), (6, [10, 1, 1]), (7, [10, 1, 1])]


def test_the_same_seed_gives_the_same_answer_and_another_seed_or_run_another(model: Qwen) -> None:
    """f(seed, prompt, run): any answer can be made again, and runs differ."""
    warm = Sampling(temperature=1, max_tokens=30, seed=3)
    first = ids(model, sampling=warm)
    mx.random.seed(99)
    assert ids(model, sampling=warm) == first, "no global state takes part"
    assert ids(model, sampling=warm, run=1) != first
    assert ids(model, sampling=Sampling(temperature=1, max_tokens=30, seed=4)) != first


def test_an_answer_begins_the_same_whatever_its_greatest_length(model: Qwen) -> None:
    """max_tokens cuts an answer; it must not change the draws before the cut."""
    long, short = (Sampling(temperature=1, max_tokens=most) for most in (30, 12))
    assert ids(model, sampling=short) == ids(model, sampling=long)[:12]


def test_an_adapter_answers_as_the_base_it_is_merged_into(model: Qwen, talker: Path) -> None:
    """Merged = beside; and it does answer otherwise than the base."""
    adapter = warm_adapter(model.config)
    merged = weights.load_model(talker)
    adapter.merge_into(merged)
    beside = ids(model, lora=adapter.branches())
    assert beside == ids(merged)
    assert beside != ids(model)


def test_a_stop_ends_an_answer_and_is_its_last_id(model: Qwen) -> None:
    """Text after a stop is never seen."""
    scripted: Any = Scripted(model, [5, 6, 401, 7])
    assert ids(scripted, stops={401}) == [5, 6, 401]


def test_logits_that_are_not_finite_end_the_answer_in_words(model: Qwen) -> None:
    """The message says where, and what may help."""
    scripted: Any = Scripted(model, [5, NOT_FINITE])
    with pytest.raises(NumbersError, match="The logits of token 2 are not finite numbers") as caught:
        ids(scripted)
    assert "another checkpoint" in str(caught.value)


def test_what_does_not_fit_in_the_model_is_refused_before_it_is_read(model: Qwen) -> None:
    """With the numbers, and the setting that would fit."""
    with pytest.raises(RecipeError) as caught:
        generate(model, PROMPT, sampling=Sampling(max_tokens=503), stops=())
    assert "The prompt has 10 tokens and the answer may have 503; this model holds 512 in all" in str(caught.value)
    assert caught.value.hint == "--max-tokens 502"
    generate(model, PROMPT, sampling=Sampling(max_tokens=502), stops=())
    with pytest.raises(RecipeError, match="start the dialogue anew"):
        generate(model, PROMPT * 52, sampling=Sampling(max_tokens=1), stops=())


def test_a_prompt_of_another_vocabulary_is_refused(model: Qwen) -> None:
    """MLX would read beyond the embedding and answer nonsense."""
    with pytest.raises(ModelError) as caught:
        generate(model, [1, 416, 9000], sampling=GREEDY, stops=())
    assert caught.value.problems == [f"{number} is outside the model's vocabulary of 416" for number in (416, 9000)]


def test_the_longest_prompt_that_fits_is_answered(model: Qwen) -> None:
    """Across the borders of the cache's blocks, up to the last slot."""
    prompt = [number % 400 for number in range(500)]
    assert len(ids(model, prompt, sampling=Sampling(temperature=0, max_tokens=12))) == 12


# --- what was read before ----------------------------------------------------------------------


def test_a_past_gives_what_reading_afresh_gives(model: Qwen) -> None:
    """Whatever was read before: the same, a longer prompt, a shorter one, one that differs in the middle."""
    past = Past(model.config)
    prompts = [PROMPT, PROMPT, [*PROMPT, *ids(model), 9, 11], PROMPT[:4], [*PROMPT[:3], 77, *PROMPT[4:]], [300]]
    for prompt in prompts:
        given = list(prompt)
        assert ids(model, prompt, past=past) == ids(model, prompt)
        assert prompt == given


@pytest.mark.parametrize("taken", [1, 2, 7])
def test_an_answer_that_is_left_early_leaves_a_past_that_can_be_used(model: Qwen, taken: int) -> None:
    """The device is a step ahead of what was handed out; that step must not count as read."""
    past = Past(model.config)
    answers = generate(model, PROMPT, sampling=GREEDY, stops=(), past=past)
    said = list(itertools.islice(answers, taken))
    longer = [*PROMPT, *said, 5, 6]
    assert past.shared(longer) >= len(PROMPT) + taken - 1
    assert ids(model, longer, past=past) == ids(model, longer)


@pytest.mark.parametrize(("where", "name"), [(Cache, "__call__"), (Cache, "advance"), (mx, "async_eval")])
def test_a_past_survives_an_interruption_anywhere(
    model: Qwen, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    """Ctrl-C comes between two layers, or while the host waits; what is half done must not count as read."""
    work = getattr(where, name)
    longer = [*PROMPT, 4, 5, 6]
    for calls in range(1, 9):
        past, left = Past(model.config), itertools.count(calls, -1)

        def interrupted(*arguments: Any, left: Iterator[int] = left) -> Any:
            if next(left) == 1:
                raise KeyboardInterrupt
            return work(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            patch.setattr(decode, "CHUNK", 4)
            with pytest.raises(KeyboardInterrupt):
                ids(model, past=past)
        assert ids(model, longer, past=past) == ids(model, longer)


# --- whole answers -----------------------------------------------------------------------------


def spoken(model: Qwen, tokenizer: Tokenizer, script: Sequence[int], **settings: Any) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    chosen = Sampling(**{"temperature": 0, "max_tokens": 24, **settings})
    scripted: Any = Scripted(model, script)
    return answer(scripted, tokenizer, PROMPT, sampling=chosen, on_text=pieces.append), pieces


def test_a_character_that_spans_tokens_comes_whole(model: Qwen, tokenizer: Tokenizer) -> None:
    """A terminal must never see half of a character."""
    text = "é 間 🜁."
    script = [next(n for n in range(416) if tokenizer.token_bytes(n) == bytes([byte])) for byte in text.encode()]
    got, pieces = spoken(model, tokenizer, [*script, tokenizer.end])
    assert len(script) == len(text.encode())
    assert pieces == list(text)
    assert got.text == text


def test_a_character_that_is_never_finished_shows_as_a_mark(model: Qwen, tokenizer: Tokenizer) -> None:
    """Nothing that the model said is dropped in silence, and pieces and text agree."""
    half = [next(n for n in range(416) if tokenizer.token_bytes(n) == bytes([byte])) for byte in b"a\xe9\x96"]
    got, pieces = spoken(model, tokenizer, half, max_tokens=3)
    assert got.text == "a\ufffd"
    assert "".join(pieces) == got.text


def test_an_answer_says_how_it_ended_and_what_it_took(model: Qwen, tokenizer: Tokenizer) -> None:
    """Reports and chat quote these numbers."""
    stopped, _ = spoken(model, tokenizer, [40, 41, tokenizer.end])
    assert (stopped.stop_reason, stopped.ids, stopped.num_tokens) == ("stop", (40, 41, tokenizer.end), 3)
    assert (stopped.num_prompt_tokens, stopped.num_reused_tokens) == (10, 0)
    assert stopped.seconds_to_first_token > 0
    assert stopped.tokens_per_second is not None
    assert stopped.tokens_per_second > 0
    read_back = json.loads(json.dumps(stopped.to_dict()))
    assert (read_back["ids"], read_back["num_tokens"], read_back["text"]) == ([*stopped.ids], 3, stopped.text)
    cut, _ = spoken(model, tokenizer, [40, 41, tokenizer.end], max_tokens=2)
    assert (cut.stop_reason, cut.ids) == ("length", (40, 41))
    at_once, _ = spoken(model, tokenizer, [tokenizer.end_of_text])
    assert (at_once.text, at_once.stop_reason, at_once.tokens_per_second) == ("", "stop", None)


# --- dialogues ---------------------------------------------------------------------------------


WARM = Sampling(temperature=1, max_tokens=20, seed=8)
QUESTIONS = ["What is a hammer?", "And grief?", "間 Élan\n\nthen?"]


@pytest.mark.parametrize("settings", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tuned", [False, True])
def test_a_dialogue_answers_as_if_it_were_read_from_its_beginning(
    model: Qwen, tokenizer: Tokenizer, settings: Sampling, tuned: bool
) -> None:
    """What is remembered saves time and changes nothing, with an adapter and without."""
    lora = warm_adapter(model.config).branches() if tuned else None
    talk = Dialogue(model, tokenizer, sampling=settings, lora=lora, system="Be brief.")
    for question in QUESTIONS:
        prompt = tokenizer.prompt([*talk.messages, {"role": "user", "content": question}])
        afresh = answer(model, tokenizer, prompt, sampling=settings, lora=lora)
        assert talk.ask(question).ids == afresh.ids
    assert [message["role"] for message in talk.messages] == ["system", *("user", "assistant") * 3]


def test_a_dialogue_reads_only_what_is_new(model: Qwen, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for an answer must not grow with the dialogue."""
    read: list[int] = []
    hidden = Qwen.hidden

    def counted(self: Qwen, ids: mx.array, **settings: Any) -> mx.array:
        read.append(ids.shape[1])
        return hidden(self, ids, **settings)

    monkeypatch.setattr(Qwen, "hidden", counted)
    talk = Dialogue(model, tokenizer, sampling=Sampling(temperature=0, max_tokens=5))
    first = talk.ask(QUESTIONS[0])
    assert read[0] == first.num_prompt_tokens
    read.clear()
    second = talk.ask(QUESTIONS[1])
    assert read[0] == second.num_prompt_tokens - second.num_reused_tokens
    assert second.num_reused_tokens >= first.num_prompt_tokens - 1, "all that stood before the first answer"
    assert sum(read[1:]) == second.num_tokens - 1, "and then a token a step"


def test_an_interrupted_turn_was_never_there(model: Qwen, tokenizer: Tokenizer) -> None:
    """Ctrl-C stops an answer, not the dialogue."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    talk, calm = (Dialogue(model, tokenizer, sampling=WARM) for _ in range(2))
    talk.ask(QUESTIONS[0])
    before = talk.messages
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Something else", on_text=interrupt)
    assert talk.messages == before
    calm.ask(QUESTIONS[0])
    assert talk.ask(QUESTIONS[1]).ids == calm.ask(QUESTIONS[1]).ids


def test_another_system_prompt_begins_anew_and_a_reset_keeps_it(model: Qwen, tokenizer: Tokenizer) -> None:
    """Answers given under one system prompt must not be saved as given under another."""
    talk = Dialogue(model, tokenizer, sampling=GREEDY)
    talk.ask(QUESTIONS[0])
    talk.set_system("Be brief.")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    talk.ask(QUESTIONS[0])
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    talk.set_system(None)
    assert talk.messages == []


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "The message is empty"), (" \n", "The message is empty"), ("a\udc80", "it has 0xdc80 at character 2")],
)
def test_a_text_that_is_none_is_refused(model: Qwen, tokenizer: Tokenizer, text: str, said: str) -> None:
    """Half a surrogate is what a terminal makes of bytes that are not UTF-8."""
    talk = Dialogue(model, tokenizer, sampling=GREEDY)
    with pytest.raises(DataError, match=said):
        talk.ask(text)
    with pytest.raises(DataError, match=said):
        talk.set_system(text)
    assert talk.messages == []


def saved(model: Qwen, tokenizer: Tokenizer, *contents: str) -> Dialogue:
    """Return a dialogue with these turns."""
    talk = Dialogue(model, tokenizer, sampling=GREEDY, system="Be brief.")
    roles = itertools.cycle(("user", "assistant"))
    talk.turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return talk


def test_a_saved_dialogue_is_a_training_row_below_what_was_there(
    model: Qwen, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """What chat saves, training reads; nothing is overwritten, and a missing last line break is mended."""
    path = tmp_path / "new" / "rows.jsonl"
    talk = saved(model, tokenizer, "What is 間?", "A gap\u2028that holds.")
    talk.save(path)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    first = path.read_bytes()
    talk.save(path)
    talk.save(path)
    assert path.read_bytes() == (first + b"\n") * 3
    problems: list[str] = []
    assert [row for _, row in files.read_rows(path, problems)] == [{"messages": talk.messages}] * 3
    assert problems == []
    examples = read_examples(path, tokenizer, vocab_size=416, max_length=500, supervise="assistant")
    assert (examples.rows[0].labels != IGNORED).any()


def test_a_full_disk_leaves_the_saved_rows_as_they_were(
    model: Qwen, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a line would spoil the file for the reader."""
    talk, path = saved(model, tokenizer, "a", "b"), tmp_path / "rows.jsonl"
    talk.save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        talk.save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ((), "messages: no turn yet"),
        (("a", " "), "messages[2].content: empty"),
        (("a", "b\0"), "a text holds a NUL character"),
        (("a", "b" * 1_000_000), "longer than 1,000,000 bytes"),
    ],
)
def test_a_dialogue_that_could_not_be_read_back_is_not_saved(
    model: Qwen, tokenizer: Tokenizer, tmp_path: Path, contents: tuple[str, ...], problem: str
) -> None:
    """One such line would make the whole file fail."""
    with pytest.raises(DataError) as caught:
        saved(model, tokenizer, *contents).save(tmp_path / "rows.jsonl")
    assert problem in caught.value.problems
    assert list(tmp_path.iterdir()) == []


# --- the terminal and the command --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 間\n\ttext 🜁 é", "plain, 間\n\ttext 🜁 é"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("over\rwritten\x08\x00\x7f", "over\\x0dwritten\\x08\\x00\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("\u202egnp.exe\u202c \u2066x\u2069", "\\u202egnp.exe\\u202c \\u2066x\\u2069"),
        ("half \udc80", "half \\udc80"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_instead(text: str, shown: str) -> None:
    """A model, or a row of data, must not clear the screen, set a title or reorder what is read."""
    assert printable(text) == shown
    assert "".join(map(printable, text)) == shown, "in pieces too"
    shown.encode()


def test_the_module_runs_the_command_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m brie_mlx.generate` is `brie generate`."""
    called: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "brie_mlx.cli", types.SimpleNamespace(main=called.append))
    monkeypatch.delitem(sys.modules, "brie_mlx.generate", raising=False)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "Why?"])
    runpy.run_module("brie_mlx.generate", run_name="__main__")
    assert called == [["generate", "--prompt", "Why?"]]
