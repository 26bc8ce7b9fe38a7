"""Rows: checked all at once, encoded, cut to length with the cost said."""

from pathlib import Path
from typing import Any

import pytest
from conftest import dialogue, write_rows

from brie_mlx.chat import Tokenizer
from brie_mlx.data.rows import Examples, read_examples
from brie_mlx.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.read(base)


def read(path: Path, tokenizer: Tokenizer | None, **changes: Any) -> Examples:
    settings = {"vocab_size": 416, "max_length": 512, "supervise": "assistant", **changes}
    return read_examples(path, tokenizer, **settings)


def test_rows_become_examples_that_know_where_they_came_from(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [dialogue("a", "b"), {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    data = read(path, tokenizer)
    assert [row.where for row in data.rows] == [f"{path}:1", f"{path}:2"]
    assert data.rows[1].ids.tolist() == [1, 2, 3]
    assert data.num_supervised == data.rows[0].num_supervised + 2
    assert data.num_truncated == 0


def test_a_supervised_first_token_has_no_prediction_and_is_not_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    assert read(path, None).num_supervised == 2


def test_truncation_says_how_many_rows_and_supervised_tokens_it_cost(tmp_path: Path) -> None:
    rows = [
        {"input_ids": list(range(20)), "labels": [-100] * 5 + list(range(5, 20))},
        {"input_ids": [1, 2], "labels": [1, 2]},
    ]
    data = read(write_rows(tmp_path / "rows.jsonl", rows), None, max_length=8)
    assert (data.num_truncated, data.num_supervised_cut) == (1, 12)
    assert len(data.rows[0].ids) == 8


def test_rows_that_truncation_leaves_without_a_supervised_token_are_refused(tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(20)), "labels": [-100] * 10 + list(range(10, 20))}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: no supervised token in its first 8 of 20; raise max_length"):
        read(write_rows(tmp_path / "rows.jsonl", rows), None, max_length=8)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "hello"}, "messages: missing (found text)"),
        ({"messages": []}, "messages: expected a list with at least one turn"),
        ({"messages": ["hi"]}, "messages[0]: expected an object with role and content, found str"),
        ({"messages": [{"role": "human", "content": "x"}]}, "messages[0].role: 'human', expected one of system, user"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content: expected a text, found int"),
        ({"messages": [{"role": "user", "content": " \n"}]}, "messages[0].content: empty"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages: no assistant turn"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0]: unknown keys name"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
            "messages[1].role: a system turn after the first",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: 1 of them for 2 input_ids"),
        ({"input_ids": [1, 999], "labels": [1, 2]}, "input_ids: 999 is outside the vocabulary of 416"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, "input_ids: expected a list of whole numbers"),
        ({"input_ids": [1, 2]}, "labels: expected a list of whole numbers"),
        ({"input_ids": [1, 2], "labels": [-1, 2]}, "labels: expected -100 or an id below 416"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], said: str
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [dialogue("a", "b"), row, dialogue("c", "d"), row])
    with pytest.raises(DataError) as caught:
        read(path, tokenizer)
    assert f"{path}:2:{said}" in str(caught.value)
    assert f"{path}:4:{said}" in str(caught.value)


def test_an_empty_or_missing_file_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path / "empty.jsonl", tokenizer)
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.jsonl", tokenizer)
