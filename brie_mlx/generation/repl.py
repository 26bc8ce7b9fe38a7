"""`brie chat`: a dialogue at the terminal, one line a turn.

Commands: /system TEXT starts anew under another system prompt, /reset forgets the turns, /save FILE
appends the dialogue as a training row, /exit (or Ctrl-D) leaves. Ctrl-C stops an answer half way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from brie_mlx.errors import BrieError
from brie_mlx.generation.dialogue import Dialogue, printable

HELP = "/system TEXT   /reset   /save FILE   /exit   (Ctrl-C stops an answer, Ctrl-D leaves)"


def talk(dialogue: Dialogue, *, read: Callable[[], str | None], write: Callable[[str], object]) -> None:
    """Take lines from `read` until it gives None, and write answers as they come."""
    write(HELP + "\n")
    while (line := read()) is not None:
        line = line.strip()
        try:
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                write(command(dialogue, line) + "\n")
            elif line:
                dialogue.ask(line, on_text=lambda piece: write(printable(piece)))
                write("\n")
        except KeyboardInterrupt:
            write("\n(stopped; this turn is forgotten)\n")
        except BrieError as error:
            write(f"{error}\n")


def command(dialogue: Dialogue, line: str) -> str:
    """Carry out a line that starts with a slash and return what to say about it."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        dialogue.reset()
        return "(a new dialogue)"
    if name == "/system":
        dialogue.set_system(rest.strip() or None)
        return f"(a new dialogue, under {'this' if rest.strip() else 'the usual'} system prompt)"
    if name == "/save" and rest.strip():
        dialogue.save(Path(rest.strip()))
        return f"(saved in {rest.strip()})"
    return HELP
