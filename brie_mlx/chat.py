"""Text to ids and back: ChatML as Qwen2.5 writes it, and which ids are supervised.

Control ids come from this file's own code and nowhere else: the tokenizer is loaded without its
added tokens, so no text in any role can become one, and no template of a repository is ever run.

    tokenizer = Tokenizer.read(Path("models/nano"))
    ids = tokenizer.prompt([{"role": "user", "content": "What is bad faith?"}])
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import tokenizers

from brie_mlx.errors import ModelError

DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ROLES = ("system", "user", "assistant")
IGNORED = -100
"""The label of a token that is not supervised."""

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Message(TypedDict):
    """One turn: a role of `ROLES`, and its text."""

    role: str
    content: str


@dataclass(frozen=True)
class Tokenizer:
    """Qwen2.5's byte-level BPE with its control ids kept apart from text."""

    bpe: tokenizers.Tokenizer
    added: dict[int, str]
    """Every added token of the file; only the three of ChatML are ever written."""
    end_of_text: int
    start: int
    end: int

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """Load tokenizer.json from a model's folder; raise ModelError if it is not a ChatML one."""
        path = folder / "tokenizer.json"
        try:
            raw = json.loads(path.read_text("utf-8"))
            added = {int(token["id"]): str(token["content"]) for token in raw.pop("added_tokens")}
            bpe = tokenizers.Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
        except FileNotFoundError:
            raise ModelError(f"{path} does not exist", hint="copy tokenizer.json beside the weights") from None
        except Exception as error:  # the library raises bare Exceptions for what it cannot parse
            raise ModelError(f"{path} is not a tokenizer that brie can read: {error}") from None
        ids = {content: number for number, content in added.items()}
        missing = [name for name in CONTROL if name not in ids]
        if missing:
            raise ModelError(f"{path} has no {', '.join(missing)}: not a Qwen2.5 chat tokenizer")
        return cls(bpe, added, *(ids[name] for name in CONTROL))

    @property
    def stops(self) -> frozenset[int]:
        """The ids that end an answer."""
        return frozenset((self.end, self.end_of_text))

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text; what looks like a control token is text too."""
        return list(self.bpe.encode(text, add_special_tokens=False).ids)

    def turn(self, role: str, content: str) -> list[int]:
        """Return `<|im_start|>role\\ncontent<|im_end|>\\n`."""
        return [self.start, *self.text_ids(f"{role}\n{content}"), self.end, *self.text_ids("\n")]

    def header(self) -> list[int]:
        """Return what stands before an answer: `<|im_start|>assistant\\n`."""
        return [self.start, *self.text_ids("assistant\n")]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a dialogue, ready for the assistant's next words."""
        return [*self.dialogue(messages), *self.header()]

    def dialogue(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a dialogue, as Qwen2.5's own template gives them."""
        return [number for message in with_system(messages) for number in self.turn(**message)]

    def example(self, messages: Sequence[Message], *, supervise: str) -> tuple[list[int], list[int]]:
        """Return (ids, labels) of a dialogue; labels are the ids, or `IGNORED`.

        supervise = "assistant": every answer with its `<|im_end|>`; "all": every token. A token that
        straddles the header and the answer (an answer that starts with a line break) belongs to the
        header, which stands there already when the model speaks.
        """
        ids: list[int] = []
        labels: list[int] = []
        for message in with_system(messages):
            turn = self.turn(**message)
            answer = self._answer(turn) if message["role"] == "assistant" else range(0)
            ids += turn
            labels += [number if supervise == "all" or at in answer else IGNORED for at, number in enumerate(turn)]
        return ids, labels

    def _answer(self, turn: list[int]) -> range:
        """Return the places in an assistant's turn that hold the answer and its `<|im_end|>`."""
        left, first = len(b"assistant\n"), 1
        while left > 0:
            left -= len(self.token_bytes(turn[first]))
            first += 1
        return range(first, turn.index(self.end) + 1)

    def token_bytes(self, number: int) -> bytes:
        """Return the bytes that a token stands for; nothing for control ids and unused ones."""
        piece = None if number in self.added else self.bpe.id_to_token(number)
        return bytes(_BYTES[character] for character in piece) if piece else b""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, control ids left out and broken UTF-8 replaced."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


class Decoder:
    """Ids to text as they come: a character that spans several tokens waits for its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, number: int) -> str:
        """Return the text that this id completes, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(number))

    def finish(self) -> str:
        """Return what an unfinished character leaves: a replacement mark, or nothing."""
        return self._utf8.decode(b"", final=True)


def with_system(messages: Sequence[Message]) -> list[Message]:
    """Return the messages, Qwen's own system prompt first if they start with none."""
    if messages and messages[0]["role"] == "system":
        return list(messages)
    return [Message(role="system", content=DEFAULT_SYSTEM), *messages]


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in for each byte, as a map back to the byte.

    Printable Latin-1 stands for itself; the other 68 bytes, in order, for U+0100 and after.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(rest)}


_BYTES = _byte_alphabet()
