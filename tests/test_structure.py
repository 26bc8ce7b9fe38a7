"""The house: imports run downward, heavy ones wait for the call that needs them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "brie_mlx"
FLOORS = [
    {"errors"},
    {"device", "files", "recipe", "randomness"},
    {"config", "chat", "fused"},
    {"attend"},
    {"qwen"},
    {"lora"},
    {"weights", "nano"},
    {"data"},
    {"training", "generation", "export"},
    {"cli"},
    {"train", "generate"},
]
"""Rooms from the ground up: each may import from floors below it, stages not from each other."""

HEAVY = {"mlx", "mlx_lm", "torch", "transformers", "peft", "anthropic", "matplotlib", "huggingface_hub", "tokenizers"}
GROUND = {"errors", "files", "recipe", "randomness", "config", "device", "cli", "train", "generate"}
"""Rooms that work without any of them at import time."""


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imports(path: Path, *, top_only: bool) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = tree.body if top_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    mine = next(floor for floor, rooms in enumerate(FLOORS) if room(path) in rooms)
    for name in imports(path, top_only=False):
        parts = name.split(".")
        if parts[0] == "brie_mlx" and len(parts) > 1 and parts[1] != room(path) and parts[1] != "__version__":
            theirs = next((floor for floor, rooms in enumerate(FLOORS) if parts[1] in rooms), None)
            assert theirs is not None, f"{path.name} imports {name}, which has no floor"
            assert theirs < mine, f"{path.name} imports {name} from the same floor or above"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ground_and_doors_import_nothing_heavy_before_a_call(path: Path) -> None:
    allowed = {"tokenizers", "mlx"} if room(path) not in GROUND else set()
    roots = {name.split(".")[0] for name in imports(path, top_only=True)}
    assert not (roots & HEAVY) - allowed


def test_help_does_not_wait_for_mlx() -> None:
    program = (
        "import sys, click.testing; from brie_mlx.cli import main; "
        "r = click.testing.CliRunner().invoke(main, ['--help']); assert r.exit_code == 0; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & " + repr(HEAVY) + "))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_short_enough_to_read_in_one_sitting() -> None:
    long = {path.name: lines for path in modules() if (lines := len(path.read_text("utf-8").split("\n"))) > 320}
    assert not long
