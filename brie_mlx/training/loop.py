"""The training loop: windows in, checkpoints and metrics out, and nothing lost on the way.

    summary = train(plan, Path("runs/brie"), listener=PlainListener())

A step's gradient is the sum over its micro-batches, divided once by the window's supervised tokens.
A loss or gradient that is not finite stops the run before anything is updated. A signal stops it
after the micro-batch in flight; what was done is saved, and `resume=True` goes on to the same bits.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_map

from brie_mlx import files, weights
from brie_mlx.data.rows import Example
from brie_mlx.errors import NumbersError, Stopped
from brie_mlx.lora import Adapter, Layer
from brie_mlx.qwen import Qwen
from brie_mlx.training import checkpoint, optimizer, signals, windows, workers
from brie_mlx.training import run as runs
from brie_mlx.training.checkpoint import Progress
from brie_mlx.training.loss import Dropout, loss_sum
from brie_mlx.training.plan import Plan


class Listener(Protocol):
    """Who is told how a run goes; the loop itself prints nothing."""

    def started(self, plan: Plan, step: int) -> None:
        """The weights are loaded and the run goes on after `step`."""

    def stepped(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """A step was made."""

    def recorded(self, row: dict[str, Any]) -> None:
        """A row of metrics was written."""

    def saved(self, folder: Path) -> None:
        """A checkpoint was written."""


@dataclass(frozen=True)
class Summary:
    """What a finished run leaves."""

    run: Path
    last: Path
    best: Path | None
    best_eval_loss: float | None


class _Interrupted(Exception):
    """A signal came while a window or an evaluation was being computed."""


def train(plan: Plan, out: Path, *, listener: Listener, resume: bool = False) -> Summary:
    """Run a plan to its last step. Raises Stopped after a signal, NumbersError, RunError; what was saved stays good."""
    if resume:
        runs.check_same(out, plan)
        runs.check_space(out, plan)
    else:
        runs.create(out, plan)
    files.sweep(out)
    with signals.watch() as stop:
        trainer = Trainer(plan, out, listener, stop, start=checkpoint.newest_good(out) if resume else None)
        try:
            trainer.fit()
        except _Interrupted:
            raise trainer.stopped() from None
    return trainer.summary()


class Trainer:
    """A run in memory: base, adapter, optimizer, and how far it has come."""

    def __init__(
        self, plan: Plan, out: Path, listener: Listener, stop: signals.Stop, *, start: Path | None = None
    ) -> None:
        self.plan, self.recipe, self.out, self.listener, self.stop = plan, plan.recipe, out, listener, stop
        self.metrics = runs.Metrics(out)
        self.model = weights.load_model(plan.base.folder, dtype=self.recipe.dtype)
        if start is None:
            self.progress, self.adapter = Progress(), self._first_adapter()
            self.optimizer = optimizer.AdamW(self.recipe, self.adapter.layers)
        else:
            self.progress, self.adapter, self.optimizer = checkpoint.load(start, plan.config, self.recipe)
        # a worker cannot compute what another thread has only described
        mx.eval(self.adapter.layers, self.optimizer.mean, self.optimizer.square)
        self.started_from = self.progress.step
        self.metrics.keep(lambda row: row["step"] <= self.progress.step)
        self._seconds, self._tokens = 0.0, 0

    def _first_adapter(self) -> Adapter:
        if self.plan.adapter is None:
            return Adapter.fresh(self.plan.lora, self.plan.config, seed=self.recipe.seed)
        loaded = weights.load_adapter(self.plan.adapter.folder, self.plan.config)
        return Adapter(self.plan.lora, loaded.layers)

    def fit(self) -> None:
        """Make the steps that are left, with what is due after each."""
        self.listener.started(self.plan, self.progress.step)
        if self._evaluation_missing():
            self._evaluate()
        while self.progress.step < self.plan.steps:
            self._step(self.progress.step + 1)
            step = self.progress.step
            if self.plan.evaluates_at(step):
                self._evaluate()
            if self.plan.saves_at(step):
                self._save()

    # 1) a step

    def _step(self, step: int) -> None:
        began = time.perf_counter()
        rows = windows.window_rows(self.recipe, len(self.plan.train.rows), step)
        window = [self.plan.train.rows[row] for row in rows]
        loss, gradients = self._gradients(window, step)
        gradients, norm = optimizer.clip(gradients, self.recipe.max_grad_norm)
        mx.eval(gradients, norm)
        self._check_finite(step, loss, float(norm), window)
        rate = optimizer.learning_rate(self.recipe, step=step, total=self.plan.steps)
        self.adapter.layers = self.optimizer.update(self.adapter.layers, gradients, rate=rate, step=step)
        mx.eval(self.adapter.layers, self.optimizer.mean, self.optimizer.square)
        self._count(step, loss, sum(len(example.ids) for example in window), time.perf_counter() - began)
        self.listener.stepped(step, loss, rate, self._tokens / self._seconds)
        if self.plan.logs_at(step):
            self._log(float(norm), rate)

    def _gradients(self, window: Sequence[Example], step: int) -> tuple[float, list[Layer]]:
        """Return the window's loss and its gradient by the LoRA weights."""
        share, num_layers = self.adapter.config.lora_dropout, len(self.adapter.layers)
        dropout = Dropout(share, seed=self.recipe.seed, step=step, num_layers=num_layers) if share else None

        def piece(batch: windows.MicroBatch) -> tuple[float, list[Layer]]:
            self._look_up()
            loss_of = functools.partial(
                loss_sum,
                adapter=self.adapter,
                model=self.model,
                batch=batch,
                dropout=dropout,
                checkpoint=self.recipe.gradient_checkpointing,
            )
            # a tree of its own: value_and_grad puts tracers into the one it is given
            own = tree_map(lambda tensor: tensor, self.adapter.layers)
            loss, slope = mx.value_and_grad(loss_of)(own)
            mx.eval(loss, slope)
            return float(loss), slope

        total, gradients = 0.0, None
        for loss, slope in workers.each_piece(piece, window, self.recipe.micro_batch_tokens):
            total += loss
            gradients = slope if gradients is None else tree_map(mx.add, gradients, slope)
            mx.eval(gradients)
        count = sum(example.num_supervised for example in window)
        return total / count, tree_map(lambda gradient: gradient / count, gradients)

    def _check_finite(self, step: int, loss: float, norm: float, window: Sequence[Example]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        saved = checkpoint.checkpoints(self.out)
        raise NumbersError(
            f"Step {step} gave loss {loss} and gradient norm {norm}; nothing was updated. "
            + (f"The last checkpoint is {saved[-1]}." if saved else "There is no checkpoint yet."),
            problems=[f"row {example.where}" for example in window],
            hint="a lower learning_rate, -o dtype=float32, or a look at these rows",
        )

    def _count(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        progress = self.progress
        progress.step = step
        progress.num_tokens += tokens
        progress.loss_since_log += loss
        progress.steps_since_log += 1
        self._seconds += seconds
        self._tokens += tokens

    # 2) what is due after a step

    def _log(self, norm: float, rate: float) -> None:
        progress = self.progress
        self._record(
            {
                "step": progress.step,
                "epoch": round(progress.step / self.plan.steps_per_epoch, 4),
                "loss": progress.loss_since_log / progress.steps_since_log,
                "grad_norm": norm,
                "learning_rate": rate,
                "num_tokens": progress.num_tokens,
                "tokens_per_second": self._tokens / self._seconds,
                "peak_memory_bytes": mx.get_peak_memory(),
            }
        )
        progress.loss_since_log, progress.steps_since_log = 0.0, 0
        self._seconds, self._tokens = 0.0, 0

    def _evaluation_missing(self) -> bool:
        """Tell whether a signal came between the last step and its evaluation."""
        step = self.progress.step
        done = any(row["step"] == step and "eval_loss" in row for row in self.metrics.rows())
        return step > 0 and self.plan.evaluates_at(step) and not done

    def _evaluate(self) -> None:
        assert self.plan.valid is not None
        loss = evaluation_loss(
            self.model, self.adapter, self.plan.valid.rows, self.recipe.micro_batch_tokens, between=self._look_up
        )
        self._record({"step": self.progress.step, "eval_loss": loss})
        best = self.progress.best_eval_loss
        if self.plan.saves_at(self.progress.step) and (best is None or loss < best):
            self.progress.best_eval_loss, self.progress.best_step = loss, self.progress.step

    def _record(self, row: dict[str, Any]) -> None:
        self.metrics.append(row)
        self.listener.recorded(row)

    def _save(self) -> None:
        self.metrics.push()
        folder = checkpoint.save(self.out, self.progress, self.adapter, self.optimizer)
        self.listener.saved(folder)
        keep = [step for step in (self.progress.best_step, self.started_from) if step is not None]
        checkpoint.rotate(self.out, self.recipe.save_total_limit, keep=keep)

    # 3) the end

    def _look_up(self) -> None:
        if self.stop.requested is not None:
            raise _Interrupted

    def stopped(self) -> Stopped:
        """Save what was done and return the sentence to leave with."""
        step, number = self.progress.step, self.stop.requested or 0
        if step > 0 and not (self.out / f"checkpoint-{step}").exists():
            self._save()
        done = (
            f"after step {step} of {self.plan.steps}; all of it is saved" if step else "before the first step was done"
        )
        way_on = f"brie train --resume --out {self.out}"
        return Stopped(f"Stopped {done}. Go on: {way_on}", exit_code=128 + number)

    def summary(self) -> Summary:
        """Return what the run leaves."""
        best = self.out / f"checkpoint-{self.progress.best_step}" if self.progress.best_step else None
        return Summary(self.out, checkpoint.checkpoints(self.out)[-1], best, self.progress.best_eval_loss)


def evaluation_loss(
    model: Qwen, adapter: Adapter, rows: Sequence[Example], budget: int, *, between: Callable[[], None] = lambda: None
) -> float:
    """Return the mean loss per supervised token over all rows, without dropout, in nats."""
    mx.eval(adapter.layers)

    def piece(batch: windows.MicroBatch) -> float:
        between()
        return float(
            loss_sum(adapter.layers, adapter=adapter, model=model, batch=batch, dropout=None, checkpoint=False)
        )

    total = sum(workers.each_piece(piece, rows, budget))
    return total / sum(example.num_supervised for example in rows)
