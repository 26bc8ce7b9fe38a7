"""The embedded model: made here, loaded by brie, mlx-lm and transformers alike."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import TEXT, dialogue, relative, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from brie_mlx import nano
from brie_mlx.attend import Examples
from brie_mlx.chat import CONTROL, Message, Tokenizer
from brie_mlx.config import Config
from brie_mlx.errors import DataError, RunError
from brie_mlx.weights import load_model

STEPS = 12
QUESTION = [Message(role="user", content="What is a hammer?\n間"), Message(role="assistant", content="Ask the hand.")]
PROMPTS = [QUESTION[:1], [Message(role="system", content="Be brief."), *QUESTION, QUESTION[0]]]
SHARED_TOKENIZER = Path(__file__).parents[2] / "shared" / "qwen2.5-0.5b-instruct" / "tokenizer.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows enough for a tokenizer and a loss that falls."""
    words = sorted(set(TEXT.split()))
    texts = [" ".join(np.random.RandomState(at).permutation(words)) for at in range(24)]
    said = [dialogue(f"What of {text[:40]}?", f"{text}. {TEXT}") for text in texts]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", said)


@pytest.fixture(scope="module")
def losses() -> list[float]:
    return []


@pytest.fixture(scope="module")
def made(rows: Path, losses: list[float], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano of a few steps."""
    out = tmp_path_factory.mktemp("models") / "nano"
    nano.make_nano([rows], out, steps=STEPS, report=lambda _step, _steps, loss: losses.append(loss))
    return out


@pytest.fixture
def ids(made: Path) -> mx.array:
    return mx.array([Tokenizer.read(made).prompt(QUESTION[:1])])


def logits_of(folder: Path, ids: mx.array) -> mx.array:
    model = load_model(folder)
    return model(ids, attend=Examples(model.config, [ids.shape[1]]))


# --- the tokenizer -----------------------------------------------------------------------------


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_its_ids(tokenizer_of_nano: Tokenizer, text: str) -> None:
    """Up to Unicode's own normal form, which Qwen's tokenizer applies too."""
    ids = tokenizer_of_nano.text_ids(text)
    assert tokenizer_of_nano.decode(ids) == unicodedata.normalize("NFC", text)


@settings(deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=5), st.just("<|")), max_size=6))
def test_text_that_looks_like_a_control_token_never_becomes_one(tokenizer_of_nano: Tokenizer, parts: list[str]) -> None:
    assert not set(tokenizer_of_nano.text_ids("".join(parts))) & set(tokenizer_of_nano.added)


@pytest.fixture(scope="module")
def tokenizer_of_nano(made: Path) -> Tokenizer:
    return Tokenizer.read(made)


def test_the_tokenizer_is_built_like_qwens(made: Path) -> None:
    """All but vocabulary and merges: how text is normalised, split, and which tokens are special."""
    if not SHARED_TOKENIZER.is_file():
        pytest.skip("Qwen2.5's tokenizer.json is not on this machine")
    ours, theirs = (json.loads(path.read_text("utf-8")) for path in (made / "tokenizer.json", SHARED_TOKENIZER))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        assert ours[part] == theirs[part]
    control = [token | {"id": 0} for token in theirs["added_tokens"] if token["content"] in CONTROL]
    assert [token | {"id": 0} for token in ours["added_tokens"]] == control


def test_a_vocabulary_holds_every_byte_and_the_control_tokens_come_last() -> None:
    raw = json.loads(nano.build_tokenizer(["one two one two"], 300))
    size = len(raw["model"]["vocab"])
    assert 256 <= size < 300  # so little text has few pairs to merge
    assert [token["id"] for token in raw["added_tokens"]] == [size, size + 1, size + 2]
    assert all(token["special"] for token in raw["added_tokens"])


def test_the_vocabulary_fits_in_the_model() -> None:
    assert nano.BPE_TOKENS + len(CONTROL) <= nano.NANO["vocab_size"]


# --- the model in three libraries --------------------------------------------------------------


def test_the_model_predicts_every_token_of_its_vocabulary(made: Path, ids: mx.array) -> None:
    logits = logits_of(made, ids)
    assert logits.shape == (1, ids.shape[1], nano.NANO["vocab_size"])
    assert mx.isfinite(logits).all().item()


@pytest.mark.parametrize("messages", PROMPTS)
def test_mlx_lm_loads_it_to_the_same_logits_and_ids(made: Path, messages: list[Message]) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_lm.load(str(made))
    own = Tokenizer.read(made)
    ids = own.prompt(messages)
    assert list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)) == ids
    assert tokenizer.eos_token_ids == set(own.stops)
    assert relative(logits_of(made, mx.array([ids])), model(mx.array([ids]))) < 1e-4


@pytest.mark.parametrize("messages", PROMPTS)
def test_transformers_loads_it_to_the_same_logits_and_ids(made: Path, messages: list[Message]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    own = Tokenizer.read(made)
    ids = own.prompt(messages)
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.end, own.end_of_text)
    model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    assert relative(logits_of(made, mx.array([ids])), theirs) < 1e-4


# --- making it ---------------------------------------------------------------------------------


def test_the_loss_falls(made: Path, losses: list[float]) -> None:
    assert made.is_dir()
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(np.log(nano.NANO["vocab_size"]), rel=0.2)  # it begins by guessing
    assert losses[-1] < losses[0] - 0.5


def test_the_loss_is_the_cross_entropy(made: Path) -> None:
    """It is written in base 2, for speed; the definition is written here."""
    model = load_model(made)
    blocks = mx.array(np.random.RandomState(0).randint(0, 400, (3, 20)))
    logits = np.array(model(blocks[:, :-1], attend=Examples(model.config, [19]))).astype(np.float64)
    shares = np.log(np.exp(logits).sum(axis=-1)) - np.take_along_axis(logits, np.array(blocks)[:, 1:, None], -1)[..., 0]
    assert nano._loss(model, blocks).item() == pytest.approx(shares.mean(), rel=1e-5)


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(rows: Path, made: Path, tmp_path: Path) -> None:
    mx.random.seed(7)  # MLX's own random state must play no part
    nano.make_nano([rows], tmp_path / "again", steps=STEPS)
    nano.make_nano([rows], tmp_path / "other", steps=1, seed=1)
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again == {path.name: path.read_bytes() for path in made.iterdir()}
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != again["model.safetensors"]


def test_only_what_the_assistant_says_is_learnt_in_lower_case(tokenizer_of_nano: Tokenizer) -> None:
    messages = [Message(role="user", content="The Hammer"), Message(role="assistant", content="Élan And Dasein")]
    text = tokenizer_of_nano.decode(nano._stream([messages] * 2, tokenizer_of_nano))
    assert text.startswith("user\nThe Hammer\nassistant\nélan and dasein\n" + "The Hammer\nélan and dasein")


def test_a_text_shorter_than_a_block_is_learnt_over_and_over(tokenizer_of_nano: Tokenizer) -> None:
    ids = nano._stream([QUESTION], tokenizer_of_nano)
    assert nano._blocks(ids, seed=1, step=1).shape == (nano.BATCH, nano.BLOCK + 1)


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    config = Config.from_dict(nano.NANO)
    deeper = Config.from_dict({**nano.NANO, "num_hidden_layers": 5})
    one, same, other, deep = (
        dict(tree_flatten(nano.random_model(sizes, seed).parameters()))
        for sizes, seed in ((config, 1), (config, 1), (config, 2), (deeper, 1))
    )
    for name, tensor in one.items():
        assert tensor.dtype == mx.float32
        assert mx.array_equal(tensor, same[name])
        assert mx.array_equal(tensor, deep[name])
        if "norm" in name:
            assert (tensor == 1).all().item()
        else:
            assert not mx.array_equal(tensor, other[name])
            assert mx.std(tensor).item() == pytest.approx(0.02, rel=0.3)


# --- what goes wrong ---------------------------------------------------------------------------


def test_nothing_is_overwritten(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "mine").write_text("kept")
    with pytest.raises(RunError, match="exists already, and nothing is overwritten"):
        nano.make_nano([rows], tmp_path / "nano", steps=1)
    model = nano.random_model(Config.from_dict(nano.NANO), 1)
    with pytest.raises(RunError, match="exists already, and nothing is overwritten"):
        nano.save_model(model, nano.NANO, nano.build_tokenizer([TEXT], 300), tmp_path / "nano")
    assert [path.name for path in tmp_path.rglob("*")] == ["nano", "mine"]


def test_an_interrupted_making_leaves_nothing(rows: Path, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nano.make_nano([rows], tmp_path / "nano", steps=2, report=stop)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_empty_data_are_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        nano.make_nano([tmp_path / "none.jsonl"], tmp_path / "nano")
    with pytest.raises(DataError, match="there are none that can be used"):
        nano.make_nano([write_rows(tmp_path / "empty.jsonl", [])], tmp_path / "nano")
    assert not (tmp_path / "nano").exists()


BAD: list[dict[str, Any]] = [
    {"input_ids": [1], "labels": [1]},
    {"messages": []},
    {"messages": "Hello"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "robot", "content": "Hello"}]},
    {"messages": [{"role": "user", "content": 5}]},
]


@pytest.mark.parametrize("row", BAD)
def test_a_row_that_is_no_dialogue_is_named_by_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [dialogue("Hello", "Hi"), row])
    with pytest.raises(DataError) as caught:
        nano.make_nano([path], tmp_path / "nano")
    assert caught.value.problems == [f"{path}:2:messages: expected a list of turns, each with role and content"]
