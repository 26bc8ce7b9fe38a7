"""Text to ids: equal to Qwen's own template, and no text can become a control id."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

from brie_mlx.chat import DEFAULT_SYSTEM, IGNORED, Decoder, Message, Tokenizer
from brie_mlx.errors import ModelError

QWEN = SHARED / "qwen2.5-0.5b-instruct"
needs_qwen = pytest.mark.skipif(not QWEN.is_dir(), reason="Qwen's tokenizer is not in the repository")


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.read(base)


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.read(QWEN)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def assistant(text: str) -> Message:
    return Message(role="assistant", content=text)


@needs_qwen
def test_every_golden_dialogue_has_the_ids_of_the_models_own_template(qwen: Tokenizer) -> None:
    rows = [json.loads(line) for line in (QWEN / "chat_golden.jsonl").read_text("utf-8").split("\n") if line]
    assert len(rows) > 30
    for row in rows:
        render = qwen.prompt if row["add_generation_prompt"] else qwen.dialogue
        assert render(row["messages"]) == row["ids"]


@needs_qwen
def test_every_added_token_in_every_role_stays_text(qwen: Tokenizer) -> None:
    """22 added tokens; a template would turn each into its control id and let data end a turn."""
    assert len(qwen.added) == 22
    for text in qwen.added.values():
        for role in ("system", "user", "assistant"):
            messages = [user("hello"), assistant("well")]
            messages = [Message(role="system", content=f"a {text} b"), *messages] if role == "system" else messages
            messages += (
                [user(f"a {text} b"), assistant("so")] if role == "user" else [user("?"), assistant(f"a {text} b")]
            )
            ids = qwen.dialogue(messages)
            turns = len(messages) + (role != "system")
            assert sum(number in qwen.added for number in ids) == 2 * turns
            assert f"a {text} b" in qwen.decode(ids)


def test_the_scaffold_is_chatml_with_qwens_system_prompt(tokenizer: Tokenizer) -> None:
    ids = tokenizer.prompt([user("Why?")])
    text = "".join(tokenizer.added.get(number, "") or tokenizer.decode([number]) for number in ids)
    assert text == (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


@given(text=st.text())
def test_no_text_becomes_a_control_id(tokenizer: Tokenizer, text: str) -> None:
    assert not any(number in tokenizer.added for number in tokenizer.text_ids(text + "<|im_end|>" + text))


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"])))
def test_ids_decode_to_the_text_whatever_the_pieces(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.text_ids(text)
    decoder = Decoder(tokenizer)
    streamed = "".join(decoder.feed(number) for number in ids) + decoder.finish()
    assert streamed == tokenizer.decode(ids)
    assert tokenizer.text_ids(streamed) == ids


def test_an_answer_and_its_end_are_supervised_and_nothing_else(tokenizer: Tokenizer) -> None:
    ids, labels = tokenizer.example(
        [user("one"), assistant("two"), user("three"), assistant("four")], supervise="assistant"
    )
    assert len(ids) == len(labels)
    kept = [label for label in labels if label != IGNORED]
    answers = [[*tokenizer.text_ids(text), tokenizer.end] for text in ("two", "four")]
    assert kept == answers[0] + answers[1]
    assert all(label in (IGNORED, number) for number, label in zip(ids, labels, strict=True))


def test_supervising_all_takes_every_token(tokenizer: Tokenizer) -> None:
    ids, labels = tokenizer.example([user("one"), assistant("two")], supervise="all")
    assert labels == ids


def test_a_token_that_joins_header_and_answer_is_not_supervised(qwen_or_small: Tokenizer) -> None:
    """The header's line break stands there already when the model speaks."""
    ids, labels = qwen_or_small.example([user("x"), assistant("\nA line")], supervise="assistant")
    kept = [label for label in labels if label != IGNORED]
    assert qwen_or_small.decode(kept).strip() == "A line"
    assert kept[-1] == qwen_or_small.end
    assert ids == qwen_or_small.dialogue([user("x"), assistant("\nA line")])


@pytest.fixture(params=["small", pytest.param("qwen", marks=needs_qwen)])
def qwen_or_small(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.read(QWEN) if request.param == "qwen" else tokenizer


def test_a_character_over_several_tokens_waits_for_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.text_ids("🜁")
    assert len(ids) > 1
    decoder = Decoder(tokenizer)
    pieces = [decoder.feed(number) for number in ids]
    assert pieces == [""] * (len(ids) - 1) + ["🜁"]
    decoder.feed(ids[0])
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), ("{", "cannot read|can read"), ('{"added_tokens": [], "model": 1}', "can read")],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        Tokenizer.read(tmp_path)


def test_a_tokenizer_without_chatml_is_refused(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = make_base(tmp_path / "base")
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<|im_start|>"]
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"has no <\|im_start\|>"):
        Tokenizer.read(folder)
