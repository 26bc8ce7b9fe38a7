"""JSON-lines rows to examples: check every row, encode it, cut it to length, and say what that cost.

A row is a dialogue, `{"messages": [{"role", "content"}, ...]}`, or already encoded,
`{"input_ids": [...], "labels": [...]}` with -100 where a token is not supervised. Other keys
(id, category, ...) are left alone.

    data = read_examples(Path("data/train.jsonl"), tokenizer, vocab_size=151936, max_length=2048, supervise="assistant")
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brie_mlx import files
from brie_mlx.chat import IGNORED, ROLES, Tokenizer
from brie_mlx.errors import DataError, ModelError


@dataclass(frozen=True, eq=False)
class Example:
    """One row as the model sees it: ids and labels, int32 of equal length, and where it came from."""

    ids: np.ndarray
    labels: np.ndarray
    where: str
    """file:line"""

    @property
    def num_supervised(self) -> int:
        """Tokens that are predicted and learnt; the first token of a row has nothing before it."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Examples:
    """The rows of a file, and what max_length cut off them."""

    rows: list[Example]
    num_truncated: int
    """Rows that were longer than max_length."""
    num_supervised_cut: int
    """Supervised tokens that were cut off."""
    sha256: str
    """Of the file."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def num_supervised(self) -> int:
        """Supervised tokens in all rows."""
        return sum(row.num_supervised for row in self.rows)


def read_examples(
    path: Path, tokenizer: Tokenizer | None, *, vocab_size: int, max_length: int, supervise: str
) -> Examples:
    """Return a file's rows as examples; raise DataError with every bad row as file:line:field.

    `tokenizer` may be None where all rows are encoded already. A row that has no supervised token within
    max_length teaches nothing and is refused.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", hint="name a JSON-lines file with --data")
    problems: list[str] = []
    rows: list[Example] = []
    truncated = supervised_cut = 0
    for line, row in files.read_rows(path, problems):
        where = f"{path}:{line}"
        found = list(_problems(row, vocab_size))
        if found:
            problems += [f"{where}:{problem}" for problem in found]
            continue
        ids, labels = _encode(row, tokenizer, supervise)
        kept = Example(np.array(ids[:max_length], np.int32), np.array(labels[:max_length], np.int32), where)
        if len(ids) > max_length:
            truncated += 1
            supervised_cut += sum(label != IGNORED for label in labels[max_length:])
        if kept.num_supervised == 0:
            cut = f" in its first {max_length:,} of {len(ids):,}" if len(ids) > max_length else ""
            problems.append(f"{where}: no supervised token{cut}; raise max_length, or drop the row")
            continue
        rows.append(kept)
    if problems:
        raise DataError(f"{path} has {len(problems)} problem{'s' * (len(problems) > 1)}.", problems=problems)
    if not rows:
        raise DataError(
            f"{path} has no rows", hint='write one JSON object a line: {"messages": [{"role", "content"}, ...]}'
        )
    return Examples(rows, truncated, supervised_cut, files.sha256(path))


def _encode(row: dict[str, Any], tokenizer: Tokenizer | None, supervise: str) -> tuple[list[int], list[int]]:
    if "input_ids" in row:
        return row["input_ids"], row["labels"]
    if tokenizer is None:
        raise ModelError("The model's folder has no tokenizer.json, which rows of messages need")
    return tokenizer.example(row["messages"], supervise=supervise)


def _problems(row: dict[str, Any], vocab_size: int) -> Iterator[str]:
    """Yield `field: what was found, what was expected` for a row."""
    if "input_ids" in row:
        yield from _encoded_problems(row, vocab_size)
    elif "messages" not in row:
        found = ", ".join(sorted(row)[:6]) or "no key"
        yield f"messages: missing (found {found}); expected messages, or input_ids and labels"
    elif not isinstance(row["messages"], list) or not row["messages"]:
        yield "messages: expected a list with at least one turn"
    else:
        yield from _dialogue_problems(row["messages"])


def _dialogue_problems(messages: list[Any]) -> Iterator[str]:
    for at, message in enumerate(messages):
        field = f"messages[{at}]"
        if not isinstance(message, dict):
            yield f"{field}: expected an object with role and content, found {type(message).__name__}"
            continue
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            yield f"{field}.role: {role!r}, expected one of {', '.join(ROLES)}"
        elif role == "system" and at > 0:
            yield f"{field}.role: a system turn after the first; move it to the front"
        if not isinstance(content, str):
            yield f"{field}.content: expected a text, found {type(content).__name__}"
        elif not content.strip():
            yield f"{field}.content: empty"
        elif set(message) - {"role", "content"}:
            yield f"{field}: unknown keys {', '.join(sorted(set(message) - {'role', 'content'}))}"
    if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages):
        yield "messages: no assistant turn, so nothing to learn"


def _encoded_problems(row: dict[str, Any], vocab_size: int) -> Iterator[str]:
    for name in ("input_ids", "labels"):
        values = row.get(name)
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            yield f"{name}: expected a list of whole numbers"
            return
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) != len(labels):
        yield f"labels: {len(labels)} of them for {len(ids)} input_ids"
    if any(not 0 <= number < vocab_size for number in ids):
        yield f"input_ids: {next(n for n in ids if not 0 <= n < vocab_size)} is outside the vocabulary of {vocab_size}"
    if any(label != IGNORED and not 0 <= label < vocab_size for label in labels):
        yield f"labels: expected {IGNORED} or an id below {vocab_size}"
