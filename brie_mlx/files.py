"""Files that are either whole or not there: JSON lines, atomic writes, folders with a manifest.

Nothing here knows what is inside a file beyond JSON. A reader collects problems instead of
stopping at the first; a writer leaves the old state or the new one, whatever happens between.

    with new_folder(Path("runs/brie/checkpoint-100")) as folder:
        write(folder / "state.json", b"{}")
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from brie_mlx.errors import BrieError, RunError

MANIFEST = "manifest.json"
MAX_LINE_BYTES = 1_000_000
MAX_DEPTH = 16


# --- reading -----------------------------------------------------------------------------------


def read_rows(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each JSON object in a JSON-lines file.

    Lines end at \\n only (U+2028 may stand inside a string). What cannot be read is appended to
    `problems` as `file:line: what, expected`, and reading goes on. A line is never held beyond
    `MAX_LINE_BYTES`.
    """
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                problems.append(f"{path}:{number}: longer than {MAX_LINE_BYTES:,} bytes; split or drop this row")
                _skip_line(file, line)
                continue
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                problems.append(f"{path}:1: starts with a byte order mark; save the file as UTF-8 without one")
                line = line[3:]
            if not line.strip():
                continue
            try:
                row = strict_json(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
            else:
                yield number, row


def _skip_line(file: BufferedReader, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES)


def strict_json(raw: bytes) -> Any:
    """Parse one JSON value; raise ValueError, in words, for what JSON allows and data should not.

    Refused: bytes that are not UTF-8, NaN and infinities, duplicate keys, lone surrogates, NUL
    characters, nesting deeper than `MAX_DEPTH`.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 ({raw[error.start]:#04x})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    if b"\\u" in raw or raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:  # only these can hide what is refused
        _check_value(value, depth=1)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _check_value(value: Any, *, depth: int) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a text holds a NUL character")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("a text holds half of a surrogate pair (\\ud800-\\udfff)")
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
        children = [*value, *value.values()] if isinstance(value, dict) else value
        for child in children:
            _check_value(child, depth=depth + 1)


def read_json(path: Path, *, kind: type[BrieError] = RunError) -> dict[str, Any]:
    """Return the JSON object in a file; raise `kind` with the path where there is none."""
    try:
        value = strict_json(path.read_bytes())
    except FileNotFoundError:
        raise kind(f"{path} does not exist") from None
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise kind(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise kind(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def to_json(value: Any) -> bytes:
    """Return readable JSON bytes: indented, keys in the order given, NaN refused."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- writing -----------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    """Write a file in place and push it to the disk; for files inside a `new_folder`."""
    with open(path, "wb") as file:
        file.write(content)
        _push(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replace a file's content in one step: a reader sees the old file or the new one.

    Raises RunError when the disk is full or the folder cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path, needed=len(content)):
            write(aside, content)
            os.replace(aside, path)
            _push_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, needed: int = 0, manifest: bool = True) -> Iterator[Path]:
    """Make a folder that appears whole or not at all.

    Yields a temporary folder beside `path`; on leaving, a manifest with the size and SHA-256 of
    every file is written last (unless `manifest` is False), then the folder is renamed. `needed`
    (bytes) goes into the message when the disk is full. Raises RunError when `path` exists or the
    disk refuses.
    """
    if path.exists():
        raise RunError(f"{path} exists already, and nothing is overwritten", hint="name another folder")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path, needed=needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield aside
            if manifest:
                write(aside / MANIFEST, to_json(_manifest(aside)))
            _push_folder(aside)
            os.rename(aside, path)
            _push_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {"files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}}


def damage(folder: Path) -> list[str]:
    """Return what differs between a folder and its manifest; an empty list means it is whole."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (RunError, KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"{folder / MANIFEST} is not a manifest: {error}"]
    problems = []
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != size:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {size:,}")
        elif sha256(path) != digest:
            problems.append(f"{path} does not have the manifest's SHA-256")
    return problems


def sweep(folder: Path) -> list[Path]:
    """Remove what an interrupted `new_folder` or `replace` of a dead process left behind; return it."""
    left = [path for path in folder.glob(".*.tmp") if not _alive(path)]
    for path in left:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return left


def _alive(path: Path) -> bool:
    """Tell whether the process whose id is in a temporary name still runs (and is not this one)."""
    try:
        process = int(path.name.split(".")[-2])
        os.kill(process, 0)
    except (ValueError, IndexError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return process != os.getpid()


@contextlib.contextmanager
def disk_errors(path: Path, *, needed: int = 0) -> Iterator[None]:
    """Turn an OSError under `path` into a RunError that names the cause and the space."""
    try:
        yield
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message += f" ({space(path.parent, needed)})"
            raise RunError(message, hint="free some space, then run again; what was there before is intact") from error
        raise RunError(message, hint="check that the folder can be written to, or name another") from error


def space(folder: Path, needed: int) -> str:
    """Return a phrase with the space needed and the space free on the folder's disk."""
    return f"needs {needed / 1e6:,.1f} MB, {free_bytes(folder) / 1e6:,.1f} MB are free"


def free_bytes(folder: Path) -> int:
    """Return the free space on a folder's disk; the folder need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _push(descriptor: int) -> None:
    """Flush to the disk itself; on macOS fsync stops at the drive's cache, F_FULLFSYNC does not."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _push_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
