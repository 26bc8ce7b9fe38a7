"""A dialogue that remembers: its turns, and the model's cache of them, so that only what is new is read.

An answer is what `decode.answer` gives for the whole dialogue; the cache only saves time. A turn is taken or
not: whatever interrupts it, the dialogue stands as it stood before.

    dialogue = Dialogue(model, tokenizer, sampling=Sampling(), lora=adapter.branches())
    print(printable(dialogue.ask("What is bad faith?").text))
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from brie_mlx import files
from brie_mlx.chat import Message, Tokenizer
from brie_mlx.errors import DataError
from brie_mlx.generation.decode import Answer, Past, answer
from brie_mlx.generation.sampling import Sampling, allowed_ids
from brie_mlx.qwen import Project, Qwen


class Dialogue:
    """Questions and answers with one model, or one adapter over it."""

    def __init__(
        self,
        model: Qwen,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling,
        lora: Sequence[Project] | None = None,
        system: str | None = None,
    ) -> None:
        """Begin without turns; `system` is the system prompt, None Qwen's own. Raises DataError if it is no text."""
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.lora = lora
        self.turns: list[Message] = []
        self._opening = _opening(system)
        self._past = Past(model.config)
        self._allowed = allowed_ids(tokenizer, model.config.vocab_size)

    @property
    def messages(self) -> list[Message]:
        """The system prompt, if one is set, and the turns so far."""
        return [*self._opening, *self.turns]

    def ask(self, text: str, *, on_text: Callable[[str], object] | None = None) -> Answer:
        """Return the answer to the next turn; `on_text` gets its text in pieces as they come.

        Raises DataError for a text that is empty or not Unicode, and what `decode.generate` raises.
        """
        turns = [*self.turns, Message(role="user", content=_checked(text))]
        reply = answer(
            self.model,
            self.tokenizer,
            self.tokenizer.prompt([*self._opening, *turns]),
            sampling=self.sampling,
            allowed=self._allowed,
            lora=self.lora,
            past=self._past,
            on_text=on_text,
        )
        self.turns = [*turns, Message(role="assistant", content=reply.text)]
        return reply

    def reset(self) -> None:
        """Forget the turns; the system prompt stays."""
        self.turns = []

    def set_system(self, system: str | None) -> None:
        """Start anew under another system prompt: answers given under the old one do not belong to it."""
        self._opening = _opening(system)
        self.reset()

    def save(self, path: Path) -> None:
        """Append the dialogue to a file as one training row, a JSON line; what is there stays.

        Raises DataError for a dialogue that could not be read back as a row, RunError when the disk refuses.
        """
        problems = [
            f"messages[{at}].content: empty"
            for at, message in enumerate(self.messages)
            if not message["content"].strip()
        ]
        if not self.turns:
            problems.append("messages: no turn yet")
        line = json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n"
        if len(line) > files.MAX_LINE_BYTES:
            problems.append(f"longer than {files.MAX_LINE_BYTES:,} bytes")
        try:
            files.strict_json(line)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise DataError("This dialogue cannot be a training row.", problems=problems)
        _append(path, line)


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [Message(role="system", content=_checked(system))]


def _checked(text: str) -> str:
    if not text.strip():
        raise DataError("The message is empty", hint="write a word or more")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{ord(text[error.start]):#06x} at character {error.start + 1}"
        raise DataError(
            f"The message is not Unicode text: it has {found}", hint="use a terminal or file in UTF-8"
        ) from None
    return text


def _append(path: Path, line: bytes) -> None:
    """Add a line to a file, below what is there; leave the file as it was if the disk refuses."""
    with files.disk_errors(path, needed=len(line)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            unended = file.read(1) not in (b"", b"\n")  # an editor may have left out the last line break
            try:
                file.write(b"\n" * unended + line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise


# --- for a terminal ----------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return text that a terminal only shows: characters that would steer it become visible, as Python escapes.

    These are the control characters but line break and tab (escape sequences start with one), those that
    reorder text from right to left, and halves of surrogate pairs. It works piece by piece: each character
    stands for itself.

    >>> printable("\\x1b[2Jhello")
    '\\\\x1b[2Jhello'
    """
    return text.translate(_STEERING)


_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]  # C0; DEL and C1
_BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]  # https://trojansource.codes
_SURROGATES = range(0xD800, 0xE000)
_STEERING = {
    number: f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
    for number in (*_CONTROLS, *_BIDI, *_SURROGATES)
    if chr(number) not in "\n\t"
}
