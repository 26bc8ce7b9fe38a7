"""The curves of a run, drawn from its metrics.jsonl: loss.svg, and a line for the terminal."""

from __future__ import annotations

import io
from pathlib import Path

from brie_mlx import files
from brie_mlx.training.run import METRICS, read_metrics


def draw_loss(run: Path) -> Path | None:
    """Draw a run's training and evaluation loss by step; return the picture's path, None without rows."""
    rows = read_metrics(run / METRICS)
    if not rows:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per supervised token")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "brie"}):  # the same rows give the same bytes
        figure.savefig(content, format="svg", metadata={"Date": None})
    path = run / "loss.svg"
    files.replace(path, content.getvalue())
    return path


def curve(run: Path, name: str, *, width: int = 40) -> str:
    """Return a run's `loss` or `eval_loss` as a line of bars, first and last value beside it; empty without two."""
    values = [row[name] for row in read_metrics(run / METRICS) if name in row]
    if len(values) < 2:
        return ""
    shown = [values[at * (len(values) - 1) // (width - 1)] for at in range(width)] if len(values) > width else values
    low, high = min(shown), max(shown)
    bars = (_BARS[round((value - low) / (high - low or 1) * (len(_BARS) - 1))] for value in shown)
    return f"{name:>9} {values[0]:.3f} {''.join(bars)} {values[-1]:.3f}"


_BARS = "▁▂▃▄▅▆▇█"
