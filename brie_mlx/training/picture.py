"""loss.svg: the curves of a run, drawn from its metrics.jsonl."""

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
