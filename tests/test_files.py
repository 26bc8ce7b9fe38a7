"""Files are whole or not there, and what cannot be read is said by line."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from brie_mlx import files
from brie_mlx.errors import BrieError, RunError


def read(path: Path, content: bytes) -> tuple[list[Any], list[str]]:
    path.write_bytes(content)
    problems: list[str] = []
    return list(files.read_rows(path, problems)), problems


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "a": 2}', "key 'a' appears twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\\u0000"}', "NUL"),
        (b'{"a": "\xff"}', "not UTF-8 (0xff)"),
        (b'{"a": 1', "not JSON"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}", "nested deeper than 16"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 16"),
        (b'{"a": "' + b"x" * 1_000_001 + b'"}', "longer than 1,000,000 bytes"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, said: str) -> None:
    rows, problems = read(tmp_path / "rows.jsonl", b'{"first": 1}\n' + line + b'\n\n{"last": 2}\n')
    assert [row for _, row in rows] == [{"first": 1}, {"last": 2}]
    assert rows[-1][0] == 4
    assert len(problems) == 1
    assert "rows.jsonl:2: " in problems[0]
    assert said in problems[0]


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    """str.splitlines would cut this row in three."""
    rows, problems = read(tmp_path / "rows.jsonl", '{"a": "one\u2028two\u0085three"}\r\n'.encode())
    assert not problems
    assert rows == [(1, {"a": "one\u2028two\u0085three"})]


def test_a_byte_order_mark_is_a_problem_with_a_remedy(tmp_path: Path) -> None:
    _, problems = read(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"a": 1}\n')
    assert "byte order mark" in problems[0]


def test_a_folder_appears_whole_with_its_manifest_or_not_at_all(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "whole") as folder:
        files.write(folder / "a", b"1")
        assert not (tmp_path / "whole").exists()
    assert files.damage(tmp_path / "whole") == []
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "broken") as folder:
        files.write(folder / "a", bytes(1 // 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_nothing_is_overwritten_by_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="exists already"), files.new_folder(tmp_path / "taken"):
        pass


@pytest.mark.parametrize("how", ["flip", "cut", "remove", "manifest"])
def test_any_damage_to_a_folder_is_found(tmp_path: Path, how: str) -> None:
    with files.new_folder(tmp_path / "x") as folder:
        files.write(folder / "a", b"hello")
        files.write(folder / "b", b"there")
    target = tmp_path / "x" / "a"
    if how == "flip":
        target.write_bytes(b"hellp")
    elif how == "cut":
        target.write_bytes(b"hell")
    elif how == "remove":
        target.unlink()
    else:
        (tmp_path / "x" / files.MANIFEST).write_bytes(b"{")
    assert len(files.damage(tmp_path / "x")) == 1


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_is_named_with_the_space_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "write":
        monkeypatch.setattr(files, "write", full)
    elif call == "fsync":
        monkeypatch.setattr(files, "_push", full)
    else:
        monkeypatch.setattr("os.rename", full)
    with pytest.raises(RunError) as caught, files.new_folder(tmp_path / "x", needed=3_000_000) as folder:
        files.write(folder / "a", b"1")
    assert "No space left" in str(caught.value)
    assert "needs 3.0 MB" in str(caught.value)
    assert "are free" in str(caught.value)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_makes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-1.999999999.tmp").mkdir()
    (tmp_path / ".checkpoint-2.1.tmp").mkdir()  # process 1 always lives
    (tmp_path / "kept").mkdir()
    assert [path.name for path in files.sweep(tmp_path)] == [".checkpoint-1.999999999.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-2.1.tmp", "kept"]


def test_an_error_shows_twenty_problems_and_counts_the_rest() -> None:
    text = str(BrieError("Bad.", problems=[f"p{at}" for at in range(25)], hint="do this"))
    assert "p19" in text
    assert "p20" not in text
    assert "... and 5 more" in text
    assert text.endswith("try: do this")
