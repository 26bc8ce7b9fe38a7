"""The embedded model: made in one piece, the same each time, and read by everybody."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import Result
from conftest import TEXT, dialogue, relative, write_rows
from hypothesis import given
from hypothesis import strategies as st

from brie_mlx import nano, weights
from brie_mlx.attend import Examples
from brie_mlx.chat import Tokenizer
from brie_mlx.errors import DataError, RunError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = [dialogue("What is a hammer?", TEXT), dialogue("And grief?", TEXT[::-1])]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", turns)


@pytest.fixture(scope="module")
def made(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A nano of few steps, and the losses on its way."""
    losses: list[float] = []
    out = tmp_path_factory.mktemp("nano") / "nano"
    nano.make_nano([rows], out, steps=30, report=lambda _step, _steps, loss: losses.append(loss))
    return out, losses


def test_it_learns(made: tuple[Path, list[float]]) -> None:
    assert made[1][-1] < made[1][0] / 2


def test_the_same_rows_and_seed_give_the_same_bytes(rows: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        nano.make_nano([rows], tmp_path / name, steps=2, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "c" / "tokenizer.json").read_bytes()


def test_mlx_lm_loads_it_to_the_same_logits(made: tuple[Path, list[float]]) -> None:
    import mlx_lm

    theirs, tokenizer = mlx_lm.load(str(made[0]))
    ours = weights.load_model(made[0])
    ids = mx.arange(30)[None]
    assert relative(ours(ids, attend=Examples(ours.config, [30])), theirs(ids)) <= 1e-4
    messages = dialogue("Why?", "So.")["messages"]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert Tokenizer.read(made[0]).dialogue(messages) == tokenizer.encode(rendered, add_special_tokens=False)


def test_transformers_loads_it_to_the_same_logits(made: tuple[Path, list[float]]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32)
    ours = weights.load_model(made[0])
    ids = np.arange(30)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert relative(ours(mx.array(ids), attend=Examples(ours.config, [30])), expected) <= 1e-4


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_its_tokenizer_gives_back_any_text_in_normal_form(made: tuple[Path, list[float]], text: str) -> None:
    import unicodedata

    tokenizer = Tokenizer.read(made[0])
    assert tokenizer.decode(tokenizer.text_ids(text)) == unicodedata.normalize("NFC", text)


def test_its_config_is_one_that_others_know(made: tuple[Path, list[float]]) -> None:
    config = json.loads((made[0] / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["vocab_size"] >= len(Tokenizer.read(made[0]).added) + 256


def test_a_random_model_depends_on_its_seed_and_not_on_mlxs_state() -> None:
    from conftest import small_config

    from brie_mlx.config import Config

    models = []
    for state, seed in ((7, 1), (8, 1), (7, 2)):
        mx.random.seed(state)
        models.append(nano.random_model(Config.from_dict(small_config()), seed))
    weight = [model.model.layers[1].mlp.up_proj.weight for model in models]
    assert mx.array_equal(weight[0], weight[1])
    assert not mx.array_equal(weight[0], weight[2])


def test_nothing_is_overwritten_and_bad_rows_are_named(rows: Path, tmp_path: Path, brie: Callable[..., Result]) -> None:
    with pytest.raises(RunError, match="exists already"):
        nano.make_nano([rows], tmp_path, steps=1)
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "user"}]}])
    with pytest.raises(DataError, match=r"bad.jsonl:1:messages: expected turns"):
        nano.make_nano([bad], tmp_path / "out", steps=1)
    result = brie("nano", tmp_path / "out", "--data", tmp_path / "none.jsonl")
    assert result.exit_code == 1
    assert "none.jsonl does not exist" in result.output
    assert not (tmp_path / "out").exists()


def test_the_command_makes_one(rows: Path, tmp_path: Path, brie: Callable[..., Result]) -> None:
    result = brie("nano", tmp_path / "out", "--data", rows, "--steps", 2)
    assert "step 2 of 2, loss" in result.output
    assert weights.read_config(tmp_path / "out").num_hidden_layers == 4
