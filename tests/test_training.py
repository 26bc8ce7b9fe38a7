"""Training: the Trainer's own losses, the same gradient however a window is cut, and a run that resumes to the bit."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import Result
from conftest import REFERENCE, SHARED, dialogue, lively, relative, small_config, tensors_of, warm_adapter, write_rows
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from brie_mlx import files, randomness
from brie_mlx.config import Config
from brie_mlx.data.rows import Example
from brie_mlx.errors import NumbersError, RunError, Stopped
from brie_mlx.lora import Adapter
from brie_mlx.qwen import Qwen
from brie_mlx.recipe import Recipe
from brie_mlx.training import checkpoint, signals, windows, workers
from brie_mlx.training import run as runs
from brie_mlx.training.loop import Trainer, evaluation_loss, train
from brie_mlx.training.loss import HEAD_CHUNK, Dropout, head_loss, loss_sum
from brie_mlx.training.optimizer import learning_rate
from brie_mlx.training.plan import make_plan
from brie_mlx.training.progress import JsonListener
from brie_mlx.training.run import read_metrics

SMALL = Config.from_dict(small_config())


class Quiet(JsonListener):
    """A listener for runs whose output nobody reads; `at` is called after each step."""

    def __init__(self, at: Callable[[int], None] = lambda _: None) -> None:
        self.at = at

    def started(self, *_: Any) -> None:
        pass

    def stepped(self, step: int, *_: Any) -> None:
        self.at(step)

    def recorded(self, row: dict[str, Any]) -> None:
        pass

    def saved(self, folder: Path) -> None:
        pass


# --- parity with transformers' Trainer and PEFT ------------------------------------------------


def reference_runs() -> list[Any]:
    ours = [(REFERENCE, f"{run}.json", f"{run}.jsonl", run) for run in ("main", "hot")]
    shared = SHARED / "reference"
    theirs = [
        (shared, f"trajectory_{run}.json", data, run)
        for run, data in (("main", "data.jsonl"), ("hot", "data_mixed.jsonl"))
    ]
    return [
        pytest.param(*row, id=f"{row[3]} of {row[0].parent.name}")
        for row in [*ours, *(theirs if shared.is_dir() else [])]
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "main": {"num_train_epochs": 3, "warmup_steps": 5},
    "hot": {
        "num_train_epochs": 3,
        "warmup_steps": 3,
        "learning_rate": 5e-3,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
    },
}
START = {"main": "adapter_init", "hot": "adapter_init_warm"}


@pytest.mark.parametrize(("folder", "trajectory", "data", "run"), reference_runs())
def test_a_run_has_the_losses_norms_and_tensors_of_the_trainer(
    folder: Path, trajectory: str, data: str, run: str, tmp_path: Path, brie: Callable[..., Result]
) -> None:
    recorded = json.loads((folder / trajectory).read_text())
    steps = recorded["steps"]
    epochs = SETTINGS[run]["num_train_epochs"] * len(steps) // 15  # shared's main run is twice as long as ours
    settings = {**SETTINGS[run], "num_train_epochs": epochs, "shuffle": "false", "logging_steps": 1}
    result = brie(
        *("train", "--model", folder / "model", "--data", folder / data, "--valid", "none"),
        *("--adapter", folder / START[run], "--out", tmp_path / "run"),
        *(part for name, value in settings.items() for part in ("-o", f"{name}={value}")),
    )
    assert result.exit_code == 0, result.output
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == len(steps)
    for ours, theirs in zip(rows, steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-5)
        assert ours["learning_rate"] == pytest.approx(theirs.get("lr", theirs.get("learning_rate")), abs=1e-12)
    expected = tensors_of(folder / f"adapter_final_{run}" / "adapter_model.safetensors")
    written = tensors_of(tmp_path / "run" / f"checkpoint-{len(steps)}" / "adapter_model.safetensors")
    assert set(written) == set(expected)
    for name in expected:
        assert relative(written[name], expected[name]) <= 1e-4, name


def test_the_mean_of_micro_batch_means_is_told_apart() -> None:
    """The contrast run averages means; if it passed the comparison above, the comparison would be worth nothing."""
    right = json.loads((REFERENCE / "main.json").read_text())["steps"]
    wrong = json.loads((REFERENCE / "main_mean_of_means.json").read_text())["steps"]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(wrong, right, strict=True))
    assert worst > 100 * 2e-5


def test_the_evaluation_loss_is_the_mean_over_tokens() -> None:
    plan = make_plan(
        Recipe(
            model=str(REFERENCE / "model"),
            data=str(REFERENCE / "valid.jsonl"),
            valid=None,
            adapter=str(REFERENCE / "adapter_final_main"),
        )
    )
    from brie_mlx import weights

    model = weights.load_model(REFERENCE / "model")
    adapter = weights.load_adapter(REFERENCE / "adapter_final_main", model.config)
    recorded = json.loads((REFERENCE / "main.json").read_text())["eval"][-1]
    loss = evaluation_loss(model, adapter, plan.train.rows, 64)
    assert loss == pytest.approx(recorded["eval_loss_per_token"], rel=1e-5)
    assert plan.train.num_supervised == recorded["num_tokens"]


def test_rows_are_visited_in_the_trainers_order() -> None:
    import hashlib

    recorded = json.loads((REFERENCE / "shuffled.json").read_text())
    assert len(recorded["orders"]) >= 6
    for entry in recorded["orders"]:
        order = randomness.order(entry["n"], seed=recorded["seed"], epoch=entry["epoch"])
        assert order[: len(entry["first"])] == entry["first"]
        assert hashlib.sha256(",".join(map(str, order)).encode()).hexdigest() == entry["sha256"]


# --- steps and rates ---------------------------------------------------------------------------


def test_1153_rows_make_290_steps_and_three_checkpoints(
    tmp_path: Path, base: Path, brie: Callable[..., Result]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [dialogue("why?", "because.")] * 1153)
    arguments = ("train", "--model", base, "--data", data, "--valid", "none", "--dry-run")
    shown = json.loads(brie(*arguments, "--json").output)
    assert (shown["rows"], shown["steps"], shown["checkpoints"]) == (1153, 290, [100, 200, 290])
    expected = {1: 0.0, 10: 9e-5, 20: 1.9e-4, 21: 2e-4, 200: 6.741e-5, 290: 7.407e-7}
    for step, rate in expected.items():
        assert shown["learning_rate"][str(step)] == pytest.approx(rate, rel=1e-3)
    text = brie(*arguments).output
    assert "1,153 rows" in text
    assert "290 steps, 145 an epoch; checkpoints 100, 200, 290" in text
    assert "1: 0, 10: 9e-05, 20: 0.00019, 21: 0.0002" in text


def test_every_row_is_visited_once_an_epoch_and_a_partial_window_is_a_step() -> None:
    recipe = Recipe(num_train_epochs=2)
    steps = windows.total_steps(recipe, 1153)
    visited = [windows.window_rows(recipe, 1153, step) for step in range(1, steps + 1)]
    assert [len(rows) for rows in visited].count(1) == 2
    assert [len(visited[145 - 1]), len(visited[290 - 1])] == [1, 1]
    for epoch in (visited[:145], visited[145:]):
        assert sorted(row for rows in epoch for row in rows) == list(range(1153))
    assert visited[0] != visited[145]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_equal_those_of_transformers(kind: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    recipe = Recipe().override({"lr_scheduler_type": kind, "warmup_steps": "7"})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    schedule = transformers.get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=40)
    for step in range(1, 41):
        assert learning_rate(recipe, step=step, total=40) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


# --- the window --------------------------------------------------------------------------------


def some_window(rows: int = 6, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    window = []
    for row in range(rows):
        ids = random.integers(0, SMALL.vocab_size, int(random.integers(5, 40))).astype(np.int32)
        labels = np.where(random.random(len(ids)) < 0.6, ids, -100).astype(np.int32)
        labels[-1] = ids[-1]
        window.append(Example(ids, labels, f"row {row}"))
    return window


def gradient(
    model: Qwen,
    adapter: Adapter,
    batches: Sequence[windows.MicroBatch],
    *,
    share: float = 0.05,
    checkpointing: bool = False,
) -> tuple[float, dict[str, mx.array]]:
    """Return a window's loss sum and gradient, however it is cut."""
    dropout = Dropout(share, seed=42, step=3, num_layers=2) if share else None
    total, sums = 0.0, None
    for batch in batches:

        def loss(layers: Any, batch: windows.MicroBatch = batch) -> mx.array:
            return loss_sum(
                layers, adapter=adapter, model=model, batch=batch, dropout=dropout, checkpoint=checkpointing
            )

        value, slope = mx.value_and_grad(loss)(adapter.layers)
        sums = slope if sums is None else tree_map(mx.add, sums, slope)
        total += float(value)
    return total, dict(tree_flatten(sums))


def assert_same(first: tuple[float, dict[str, mx.array]], second: tuple[float, dict[str, mx.array]]) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    for name, expected in second[1].items():
        assert relative(first[1][name], expected) <= 1e-5, name


def test_any_cut_of_a_window_gives_the_same_gradient_with_and_without_checkpointing() -> None:
    """With dropout on: its masks belong to the examples, not to the pieces."""
    model, adapter, window = lively(SMALL), warm_adapter(SMALL, r=4), some_window()
    whole = gradient(model, adapter, list(windows.cut(window, 10_000)))
    for budget in (1, 50, 80):
        for checkpointing in (False, True):
            pieces = list(windows.cut(window, budget))
            assert len(pieces) > 1
            assert_same(gradient(model, adapter, pieces, checkpointing=checkpointing), whole)
    assert_same(gradient(model, adapter, list(windows.cut(window, 10_000)), checkpointing=True), whole)


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=12), budget=st.integers(1, 100))
def test_a_cut_keeps_every_example_whole_in_order_and_within_the_budget(lengths: list[int], budget: int) -> None:
    window = [
        Example(np.full(length, at, np.int32), np.full(length, 7, np.int32), "") for at, length in enumerate(lengths)
    ]
    pieces = list(windows.cut(window, budget))
    assert [place for piece in pieces for place in piece.places] == list(range(len(lengths)))
    assert [length for piece in pieces for length in piece.lengths] == lengths
    for piece in pieces:
        assert sum(piece.lengths) <= budget or len(piece.lengths) == 1
        assert piece.positions.size == piece.targets.size == sum(piece.lengths) - len(piece.lengths)


def test_other_steps_and_seeds_drop_other_inputs() -> None:
    model, adapter, window = lively(SMALL), warm_adapter(SMALL, r=4), some_window()
    pieces = list(windows.cut(window, 10_000))
    losses = set()
    for seed, step in ((42, 1), (42, 2), (43, 1)):
        dropout = Dropout(0.5, seed=seed, step=step, num_layers=2)
        loss = loss_sum(
            adapter.layers, adapter=adapter, model=model, batch=pieces[0], dropout=dropout, checkpoint=False
        )
        losses.add(float(loss))
    assert len(losses) == 3


def test_dropout_drops_its_share_scales_the_rest_and_differs_between_modules() -> None:
    dropout = Dropout(0.05, seed=1, step=1, num_layers=2)
    product = dropout.by(dropout.keys([0, 1], 1), [300, 200])
    ones, identity = mx.ones((1, 500, 400)), mx.eye(400)
    masks = [np.array(product(name, ones, identity)) for name in ("self_attn.q_proj", "self_attn.k_proj")]
    for mask in masks:
        assert abs((mask == 0).mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / mask.size)
        assert np.allclose(mask[mask != 0], 1 / 0.95)
    assert 0.08 < (masks[0] != masks[1]).mean() < 0.11
    assert not np.array_equal(masks[0][0, :200], masks[0][0, 300:])


@pytest.mark.parametrize("rows", [1, HEAD_CHUNK, HEAD_CHUNK + 1, 2 * HEAD_CHUNK + 5])
def test_the_head_gives_the_loss_and_gradient_of_a_plain_cross_entropy(rows: int) -> None:
    import mlx.nn as nn

    hidden = mx.random.normal((rows, 16), key=mx.random.key(0))
    table = mx.random.normal((50, 16), key=mx.random.key(1))
    targets = mx.array(np.random.default_rng(0).integers(0, 50, rows))

    def head(x: mx.array) -> mx.array:
        return x @ table.T

    def plain(x: mx.array) -> mx.array:
        return nn.losses.cross_entropy(head(x), targets, reduction="sum")

    ours = mx.value_and_grad(lambda x: 3 * head_loss(head, x, targets))(hidden)
    theirs = mx.value_and_grad(lambda x: 3 * plain(x))(hidden)
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-5)
    assert relative(ours[1], theirs[1]) <= 1e-5


def test_training_on_a_4_bit_base_has_the_gradient_of_its_dequantized_weights() -> None:
    import mlx.nn as nn

    config = Config.from_dict(small_config(hidden_size=64, intermediate_size=128))
    quantized, plain, adapter = lively(config), lively(config), warm_adapter(config, r=4)
    nn.quantize(quantized, 32, 4)
    table = quantized.model.embed_tokens
    plain.model.embed_tokens.weight = mx.dequantize(table.weight, table.scales, table.biases, 32, 4)
    for block, other in zip(quantized.model.layers, plain.model.layers, strict=True):
        for name in config.module_shapes():
            group, projection = name.split(".")
            q = block[group][projection]
            other[group][projection].weight = mx.dequantize(q.weight, q.scales, q.biases, 32, 4)
    pieces = list(windows.cut(some_window(), 10_000))
    ours, theirs = (gradient(model, adapter, pieces) for model in (quantized, plain))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for name, expected in theirs[1].items():
        assert relative(ours[1][name], expected) <= 1e-3, name


def test_on_a_bfloat16_base_the_adapter_stays_float32_and_its_gradient_near() -> None:
    model, rough, adapter = lively(SMALL), lively(SMALL), warm_adapter(SMALL, r=4)
    rough.update(tree_map(lambda weight: weight.astype(mx.bfloat16), rough.parameters()))
    pieces = list(windows.cut(some_window(), 10_000))
    exact, near = (gradient(base, adapter, pieces, share=0) for base in (model, rough))
    assert near[0] == pytest.approx(exact[0], rel=0.02)
    for name, expected in exact[1].items():
        assert near[1][name].dtype == mx.float32
        assert relative(near[1][name], expected) <= 0.15, name


# --- runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["the", "hammer", "forgets", "the", "hand", "that", "grief", "has", "a", "grammar", "for"]
    turns = [dialogue(" ".join(words[at % 5 :]), " ".join(words[: 3 + at % 8]) + ".") for at in range(13)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", turns)


@pytest.fixture
def recipe(base: Path, rows: Path) -> Recipe:
    """13 rows in windows of 4, three epochs: 12 steps, each epoch with a partial window."""
    return Recipe(
        model=str(base),
        data=str(rows),
        valid=str(rows),
        r=2,
        num_train_epochs=3,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        learning_rate=1e-2,
        logging_steps=3,
        eval_steps=4,
        save_steps=5,
        micro_batch_tokens=1100,  # two workers, where there are two cores
    )


def timeless(run: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without what a clock or an allocator says."""
    skipped = ("tokens_per_second", "peak_memory_bytes")
    return [{k: v for k, v in row.items() if k not in skipped} for row in read_metrics(run / "metrics.jsonl")]


def last_bytes(run: Path) -> dict[str, bytes]:
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return {name: (checkpoint.checkpoints(run)[-1] / name).read_bytes() for name in names}


def stop_at(step: int, number: int = signal.SIGINT) -> Quiet:
    return Quiet(lambda at: os.kill(os.getpid(), number) if at == step else None)


def test_a_run_cut_at_any_of_20_places_and_resumed_is_identical_to_the_bit(tmp_path: Path, recipe: Recipe) -> None:
    """After each of the 12 steps (mid-epoch, epoch's edge, last step), and eight runs cut twice."""
    plan = make_plan(recipe)
    whole = tmp_path / "whole"
    train(plan, whole, listener=Quiet())
    cuts = [(step,) for step in range(1, 13)] + [(1, 2), (2, 7), (3, 4), (4, 8), (5, 6), (5, 12), (7, 11), (9, 10)]
    for number, places in enumerate(cuts):
        run = tmp_path / f"cut-{number}"
        for again, place in enumerate(places):
            with pytest.raises(Stopped, match=f"after step {place} of 12"):
                train(plan, run, listener=stop_at(place), resume=again > 0)
        train(plan, run, listener=Quiet(), resume=True)
        assert timeless(run) == timeless(whole), places
        assert last_bytes(run) == last_bytes(whole), places


def test_a_run_killed_between_checkpoints_repeats_what_it_lost_to_the_bit(tmp_path: Path, recipe: Recipe) -> None:
    """A kill leaves rows of metrics past the last checkpoint; they are made again, once."""
    plan = make_plan(recipe)
    train(plan, tmp_path / "whole", listener=Quiet())
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("checkpoint-10", "checkpoint-12"):
        shutil.rmtree(tmp_path / "killed" / name)
    with open(tmp_path / "killed" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 12, "lo')
    train(plan, tmp_path / "killed", listener=Quiet(), resume=True)
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    assert last_bytes(tmp_path / "killed") == last_bytes(tmp_path / "whole")


def test_pieces_side_by_side_give_the_gradient_of_one_after_another(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads share the weights' tree, and MLX puts tracers into the tree it differentiates by: each needs its own."""
    plan = make_plan(replace(recipe, micro_batch_tokens=100_000))
    runs.create(tmp_path / "run", plan)
    trainer = Trainer(plan, tmp_path / "run", Quiet(), signals.Stop())
    monkeypatch.setattr(workers, "count", lambda: 1)
    loss, expected = trainer._gradients(plan.train.rows, 1)
    monkeypatch.setattr(workers, "count", lambda: 4)
    first = trainer._gradients(plan.train.rows, 1)
    for _ in range(15):
        again = trainer._gradients(plan.train.rows, 1)
        assert again[0] == first[0]
        for (name, ours), (_, same) in zip(tree_flatten(again[1]), tree_flatten(first[1]), strict=True):
            assert mx.array_equal(ours, same), name
    assert first[0] == pytest.approx(loss, rel=1e-5)
    for (name, ours), (_, theirs) in zip(tree_flatten(first[1]), tree_flatten(expected), strict=True):
        if mx.abs(theirs).max() > 0:
            assert relative(ours, theirs) <= 1e-5, name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_with_the_way_to_go_on(
    tmp_path: Path, recipe: Recipe, number: int, code: int
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with it ignored
    with pytest.raises(Stopped) as caught:
        train(make_plan(recipe), tmp_path / "run", listener=stop_at(2, number))
    assert caught.value.exit_code == code
    assert f"brie train --resume --out {tmp_path / 'run'}" in str(caught.value)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before


def test_the_loss_falls_and_every_due_row_and_checkpoint_is_there(tmp_path: Path, recipe: Recipe) -> None:
    summary = train(make_plan(recipe), tmp_path / "run", listener=Quiet())
    rows = timeless(tmp_path / "run")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    evaluations = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(losses) == [3, 6, 9, 12]
    assert list(evaluations) == [4, 8, 12]
    assert losses[12] < losses[3] - 0.1
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path / "run")] == [5, 10, 12]
    assert summary.best == tmp_path / "run" / "checkpoint-12"
    assert summary.best_eval_loss == evaluations[12]


def test_the_best_checkpoint_outlives_the_limit(tmp_path: Path, recipe: Recipe) -> None:
    """With a rate that ruins the model, the first evaluated checkpoint stays the best."""
    wild = replace(
        recipe, eval_steps=1, save_steps=1, save_total_limit=2, learning_rate=30.0, warmup_steps=2, max_grad_norm=0
    )
    summary = train(make_plan(wild), tmp_path / "run", listener=Quiet())
    losses = {row["step"]: row["eval_loss"] for row in timeless(tmp_path / "run") if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 11
    assert summary.best == tmp_path / "run" / f"checkpoint-{best}"
    kept = [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path / "run")]
    assert kept == [best, 12]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_rows(
    tmp_path: Path, recipe: Recipe
) -> None:
    """The learning rate is infinite for one step's worth: step 7's weights overflow, step 8 sees it."""
    wild = replace(recipe, learning_rate=1e38, max_grad_norm=0, save_steps=1, eval_steps=0)
    plan = make_plan(wild)
    with pytest.raises(NumbersError) as caught:
        train(plan, tmp_path / "run", listener=Quiet())
    text = str(caught.value)
    last = checkpoint.checkpoints(tmp_path / "run")[-1]
    step = checkpoint.step_of(last) + 1
    assert f"Step {step} gave loss" in text
    assert str(last) in text
    assert all(f"row {plan.train.rows[row].where}" in text for row in windows.window_rows(wild, 13, step))
    assert files.damage(last) == []
    tensors = tensors_of(last / "adapter_model.safetensors")
    assert all(mx.isfinite(tensor).all() for tensor in tensors.values())


def test_a_resumed_run_refuses_other_rows(tmp_path: Path, recipe: Recipe, rows: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    shutil.copy(rows, mine)
    with pytest.raises(Stopped):
        train(make_plan(replace(recipe, data=str(mine))), tmp_path / "run", listener=stop_at(1))
    mine.write_text(mine.read_text().replace("hammer", "spade"))
    with pytest.raises(RunError, match=r"mine.jsonl is not what the run started with"):
        train(make_plan(replace(recipe, data=str(mine))), tmp_path / "run", listener=Quiet(), resume=True)


def test_a_damaged_newest_checkpoint_is_named_with_the_good_one_before_it(tmp_path: Path, recipe: Recipe) -> None:
    train(make_plan(recipe), tmp_path / "run", listener=Quiet())
    newest = tmp_path / "run" / "checkpoint-12" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(RunError) as caught:
        train(make_plan(recipe), tmp_path / "run", listener=Quiet(), resume=True)
    assert "optimizer.safetensors does not have the manifest's SHA-256" in str(caught.value)
    assert "goes on from" in str(caught.value)
    assert "checkpoint-10" in str(caught.value)


def test_too_little_space_is_said_before_the_run_starts(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(RunError, match=r"too little space for 3 checkpoints: needs .* MB, 0.0 MB are free"):
        train(make_plan(recipe), tmp_path / "run", listener=Quiet())


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_good(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    push, calls = files._push, []

    def filling(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 10:  # the second checkpoint's first file
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        push(descriptor)

    monkeypatch.setattr(files, "_push", filling)
    with pytest.raises(RunError, match="No space left"):
        train(make_plan(recipe), tmp_path / "run", listener=Quiet())
    monkeypatch.undo()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-5"]
    train(make_plan(recipe), tmp_path / "run", listener=Quiet(), resume=True)
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == "checkpoint-12"


def test_a_run_goes_on_from_an_adapter_with_its_own_settings(
    tmp_path: Path, recipe: Recipe, brie: Callable[..., Result]
) -> None:
    from brie_mlx import weights

    start = tmp_path / "start"
    start.mkdir()
    weights.write_adapter(start, warm_adapter(SMALL, r=3, lora_alpha=5, target_modules=("q_proj", "up_proj")))
    plan = make_plan(replace(recipe, r=8, adapter=str(start)))
    assert (plan.recipe.r, plan.recipe.lora_alpha, plan.recipe.target_modules) == (3, 5, ("q_proj", "up_proj"))
    train(plan, tmp_path / "run", listener=Quiet())
    assert weights.read_adapter_config(tmp_path / "run" / "checkpoint-12").r == 3
    arguments = ("train", "--model", recipe.model, "--data", recipe.data, "--valid", "none", "--adapter", start)
    result = brie(*arguments, "--out", tmp_path / "other", "-o", "r=4")
    assert result.exit_code == 1
    assert "r = 4, but the adapter has 3" in result.output
