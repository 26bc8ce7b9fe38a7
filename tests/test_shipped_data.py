"""What the repository ships: rows that keep the rules of their data set, and suites that stay as they were frozen."""

import hashlib
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from brie_mlx.files import read_rows

ROOT = Path(__file__).parents[1]
CATEGORIES = {
    *("continental", "phenomenology", "existentialism", "critical-theory", "contemplative"),
    *("brainstorming", "creative-writing", "analysis", "everyday-life"),
}
SUITES = {"in_domain": 13, "out_of_domain": 15, "comprehensive": 57, "reproducibility": 15}
BANNED = ("as an ai", "great question", "delve", "tapestry", "in today's world", "it's important to note")


def load(path: Path) -> list[dict[str, Any]]:
    problems: list[str] = []
    rows = [row for _, row in read_rows(path, problems)]
    assert not problems
    return rows


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return load(ROOT / "data" / "train.jsonl")


@pytest.fixture(scope="module")
def valid() -> list[dict[str, Any]]:
    return load(ROOT / "data" / "valid.jsonl")


@pytest.fixture(scope="module")
def suites() -> list[dict[str, Any]]:
    return [row for name in SUITES for row in load(ROOT / "eval" / "suites" / f"{name}.jsonl")]


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[at : at + length]) for at in range(len(found) - length + 1)}


def answers(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def said(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def test_the_suites_are_the_ones_that_were_frozen() -> None:
    listed = (ROOT / "eval" / "suites" / "SHA256SUMS").read_text().split()
    sums = dict(zip(listed[1::2], listed[::2], strict=True))
    assert sorted(sums) == sorted(f"{name}.jsonl" for name in SUITES)
    for name, digest in sums.items():
        assert hashlib.sha256((ROOT / "eval" / "suites" / name).read_bytes()).hexdigest() == digest, name


def test_the_suites_have_their_sizes_and_no_prompt_twice(suites: list[dict[str, Any]]) -> None:
    assert Counter(row["id"].rsplit("-", 1)[0] for row in suites) == SUITES
    assert len({row["prompt"] for row in suites}) == sum(SUITES.values())


def test_rows_are_enough_to_start_and_have_their_fields(
    train: list[dict[str, Any]], valid: list[dict[str, Any]]
) -> None:
    assert len(train) >= 80
    assert len(valid) >= 12
    for rows in (train, valid):
        assert {row["category"] for row in rows} == CATEGORIES
    ids = [row["id"] for row in (*train, *valid)]
    assert len(set(ids)) == len(ids)
    for row in (*train, *valid):
        assert list(row) == ["id", "messages", "category", "subtopic", "form", "source", "claims"]
        assert row["id"].startswith(row["category"])
        roles = [message["role"] for message in row["messages"]]
        opening = ["system"] if row["form"] == "system" else []
        assert roles == opening + ["user", "assistant"] * ((len(roles) - len(opening)) // 2)
        assert (row["form"] == "multi") <= (len(roles) > 2)
        assert all(set(claim) == {"thinker", "work", "text"} for claim in row["claims"])


def test_no_row_comes_near_a_suite(
    train: list[dict[str, Any]], valid: list[dict[str, Any]], suites: list[dict[str, Any]]
) -> None:
    asked = {run for row in suites for run in runs(row["prompt"], 8) | runs(row.get("reference", ""), 8)}
    near = [(row["id"], run) for row in (*train, *valid) for run in runs(said(row), 8) & asked]
    assert not near


def test_no_two_rows_share_a_run_of_twelve_words(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> None:
    owners: dict[tuple[str, ...], str] = {}
    for row in (*train, *valid):
        for run in runs(said(row), 12):
            assert owners.setdefault(run, row["id"]) == row["id"], run


def test_openings_vary(train: list[dict[str, Any]]) -> None:
    openings = [words(answer) for row in train for answer in answers(row)]
    assert max(Counter(tuple(opening[:4]) for opening in openings).values()) <= 3
    assert max(Counter(opening[0] for opening in openings).values()) <= 0.06 * len(openings)


def test_phrases_that_give_a_machine_away_are_not_there(
    train: list[dict[str, Any]], valid: list[dict[str, Any]]
) -> None:
    for row, phrase in itertools.product((*train, *valid), BANNED):
        assert phrase not in said(row).lower(), row["id"]


def test_rows_are_written_as_the_readers_expect() -> None:
    for name in ("train", "valid"):
        text = (ROOT / "data" / f"{name}.jsonl").read_text("utf-8")
        lines = [json.dumps(json.loads(line), ensure_ascii=False) for line in text.split("\n")[:-1]]
        assert text == "".join(line + "\n" for line in lines)
