"""How a run shows itself: a live bar in a terminal, plain lines in a pipe, JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from brie_mlx import device
from brie_mlx.training.loop import Listener
from brie_mlx.training.plan import Plan


@contextlib.contextmanager
def watching(*, as_json: bool) -> Iterator[Listener]:
    """Give the listener that fits where the output goes, and give the terminal back after it."""
    if as_json:
        yield JsonListener()
    elif not Console().is_terminal:
        yield PlainListener()
    else:
        listener = BarListener()
        try:
            yield listener
        finally:
            listener.close()


class JsonListener:
    """Each row of metrics and each checkpoint as one JSON object a line."""

    def started(self, plan: Plan, step: int) -> None:
        """Print the plan."""
        click.echo(json.dumps({"plan": plan.to_dict(), "step": step}))

    def stepped(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Print nothing: the rows say it."""

    def recorded(self, row: dict[str, Any]) -> None:
        """Print the row."""
        click.echo(json.dumps(row))

    def saved(self, folder: Path) -> None:
        """Print the checkpoint's folder."""
        click.echo(json.dumps({"checkpoint": str(folder)}))


class PlainListener:
    """A line for each row of metrics and each checkpoint."""

    def started(self, plan: Plan, step: int) -> None:
        """Print the device and what lies ahead."""
        click.echo(device.describe())
        click.echo(f"{plan.steps - step:,} steps to go, {plan.num_trainable:,} trainable parameters")
        train = plan.train
        if train.num_truncated:
            cost = f"{train.num_supervised_cut:,} supervised tokens"
            click.echo(f"{train.num_truncated:,} rows cut at {plan.recipe.max_length:,} tokens, which costs {cost}")

    def stepped(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Print nothing: a line a step would be noise in a log."""

    def recorded(self, row: dict[str, Any]) -> None:
        """Print a row of metrics."""
        click.echo(describe(row))

    def saved(self, folder: Path) -> None:
        """Print the checkpoint's folder."""
        click.echo(f"saved {folder}")


class BarListener(PlainListener):
    """A bar with loss, learning rate, speed, memory and time left, the rows of metrics above it."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task: TaskID | None = None

    def started(self, plan: Plan, step: int) -> None:
        """Start the bar."""
        super().started(plan, step)
        self._task = self._bar.add_task("", total=plan.steps, completed=step, figures="")
        self._bar.start()

    def stepped(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Move the bar."""
        import mlx.core as mx

        speed = f"{tokens_per_second:,.0f} tok/s  {mx.get_peak_memory() / 1e9:.1f} GB"
        figures = f"loss {loss:.3f}  lr {learning_rate:.1e}  {speed}"
        assert self._task is not None
        self._bar.update(self._task, completed=step, figures=figures)

    def recorded(self, row: dict[str, Any]) -> None:
        """Print a row above the bar."""
        self._bar.console.print(describe(row), highlight=False, markup=False)

    def saved(self, folder: Path) -> None:
        """Print the checkpoint's folder above the bar."""
        self._bar.console.print(f"saved {folder}", highlight=False, markup=False)

    def close(self) -> None:
        """Give the terminal back."""
        self._bar.stop()


def describe(row: dict[str, Any]) -> str:
    """Return a row of metrics as a line for people."""
    if "eval_loss" in row:
        return f"step {row['step']:>5}  eval_loss {row['eval_loss']:.4f}"
    speed = f"{row['tokens_per_second']:,.0f} tok/s  {row['peak_memory_bytes'] / 1e9:.2f} GB"
    figures = f"loss {row['loss']:.4f}  grad_norm {row['grad_norm']:.3f}  lr {row['learning_rate']:.2e}"
    return f"step {row['step']:>5}  {figures}  {speed}"
