"""Make the reference runs that brie's training is compared with.

Everything beside this file, except README.md, comes from one command at the root of the repository:

    python tests/reference/make.py

From fixed seeds it makes a tiny random Qwen2, tokenized rows and two LoRA adapters, and trains them with
the Hugging Face Trainer and PEFT; the Trainer's subclass below only takes notes. A plain torch loop, which
shares nothing with the Trainer, then has to arrive at the same losses. README.md says what each file is.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

Row = dict[str, list[int]]
Record = dict[str, Any]

HERE = Path(__file__).parent
BASE, BASE_NAME = HERE / "model", "tests/reference/model"
VOCABULARY, PAD, END, IGNORED = 160, 0, 1, -100
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BOUNDS = {"loss": 1e-6, "grad_norm": 1e-5, "learning_rate": 1e-12}
VERSIONS = {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}

COMMON: Record = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "train_sampling_strategy": "sequential",
    "eval_steps": 5,
    "seed": 42,
}
MAIN = COMMON | {"learning_rate": 2e-4, "warmup_steps": 5, "max_grad_norm": 1.0, "weight_decay": 0.0}
HOT = COMMON | {"learning_rate": 5e-3, "warmup_steps": 3, "max_grad_norm": 0.5, "weight_decay": 0.1}


# The model and the adapters


def make_model() -> None:
    """Save a random Qwen2 whose biases and norms are not the usual zeros and ones."""
    torch.manual_seed(1)
    sizes: Record = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: Record = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens: Record = {"pad_token_id": PAD, "eos_token_id": END, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen2Config(**sizes, **heads, **tokens, rope_parameters=rope, initializer_range=0.2)
    model = Qwen2ForCausalLM(config).float()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, 0.0, 0.3)
        elif "norm" in name:
            torch.nn.init.normal_(value, 1.0, 0.2)
    model.save_pretrained(BASE)
    (BASE / "generation_config.json").unlink()


def load(adapter: str, base: Path = BASE) -> PeftModel:
    """Load the base model in float32 with a trainable adapter on it."""
    model = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, HERE / adapter, is_trainable=True)


def save(model: PeftModel, adapter: str) -> None:
    """Save as PEFT does, without its README.md, naming the base model by a path that holds anywhere."""
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path, config.target_modules = BASE_NAME, sorted(PROJECTIONS)
    model.save_pretrained(str(HERE / adapter), save_embedding_layers=False)
    (HERE / adapter / "README.md").unlink()


def make_adapters() -> None:
    """Save a fresh adapter (B = 0), and the same one with B drawn at random."""
    torch.manual_seed(2)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(Qwen2ForCausalLM.from_pretrained(BASE, dtype=torch.float32), config)
    save(model, "adapter_init")
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, 0.0, 0.1)
    save(model, "adapter_init_warm")


# The rows


def make_ids(draw: random.Random, length: int) -> list[int]:
    """Draw ids that mostly count upwards by a small stride, so that there is something to learn."""
    start, stride = draw.randrange(VOCABULARY), draw.choice([1, 2, 3])
    ids = [2 + (start + i * stride) % (VOCABULARY - 2) for i in range(length - 1)]
    return [draw.randrange(2, VOCABULARY) if draw.random() < 0.3 else token for token in ids] + [END]


def stretches(draw: random.Random, length: int, mixed: bool) -> list[tuple[int, int]]:
    """Choose what is supervised: an answer at the end or, if mixed, also a whole row or parts of one."""
    third = length // 3
    answer = [(length - draw.choice([1, 2, 3, length // 4, length // 2, length - 2]), length)]
    ends = [(0, draw.randint(1, third)), (length - third, length)]
    three = [(1, third), (third + 1, 2 * third - 1), (length - 1, length)]
    return draw.choice([[(0, length)], ends, three, answer, [(length - 1, length)]]) if mixed else answer


def make_rows(name: str, seed: int, rows: int, mixed: bool = False) -> list[Row]:
    """Draw the rows of one file and write them, a line each."""
    draw, made = random.Random(seed), []
    for _ in range(rows):
        ids = make_ids(draw, draw.randint(6, 40))
        labels = [IGNORED] * len(ids)
        for start, stop in stretches(draw, len(ids), mixed):
            labels[start:stop] = ids[start:stop]
        made.append({"input_ids": ids, "labels": labels})
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in made))
    return made


# The Trainer


def count(labels: torch.Tensor) -> int:
    """Count the predictions that are scored: nothing comes before a row's first label, so it is none."""
    return int((labels[..., 1:] != IGNORED).sum())


def collate(rows: list[Record]) -> dict[str, torch.Tensor]:
    """Pad on the right, with a mask, and keep each row's index so that a run can say what it saw."""

    def pad(key: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=value)

    batch = {"input_ids": pad("input_ids", PAD), "labels": pad("labels", IGNORED)}
    return batch | {"attention_mask": pad("mask", 0), "rows": torch.tensor([row["row"] for row in rows])}


class NotingTrainer(Trainer):
    """The Trainer, which also notes what each step did; it computes everything as it always does."""

    def __init__(self, **arguments: Any) -> None:
        """Start with no notes, and print nothing."""
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)
        self.steps: list[Record] = []
        self.evaluations: list[Record] = []
        self.learning_rate = 0.0
        self.rows: list[int] = []
        self.losses: list[tuple[float, int]] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        """Note the rows, their tokens and the learning rate that the coming step will use."""
        if model.training:
            self.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.rows += inputs.pop("rows").tolist()
        tokens = count(inputs["labels"])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **rest)
        self.losses.append((loss.item(), tokens))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Close the note of a step or an evaluation with the Trainer's own numbers, unrounded."""
        tokens = sum(n for _, n in self.losses)
        note: Record = {"step": self.state.global_step}
        if "grad_norm" in logs:
            note |= {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "learning_rate": self.learning_rate}
            self.steps.append(note | {"rows": self.rows, "num_tokens": tokens})
        elif "eval_loss" in logs:
            per_token = sum(loss * n for loss, n in self.losses) / tokens
            note |= {"eval_loss": logs["eval_loss"], "eval_loss_per_token": per_token}
            self.evaluations.append(note | {"num_tokens": tokens})
        self.rows, self.losses = [], []
        super().log(logs, start_time)


def make_trainer(model: Any, rows: list[Row], valid: list[Row], recipe: Record, folder: str) -> NotingTrainer:
    """Set up a Trainer on the CPU that logs every step and writes nothing of its own."""
    quiet: Record = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    exact: Record = {"use_cpu": True, "bf16": False, "fp16": False, "remove_unused_columns": False}
    evaluation: Record = {"eval_strategy": "steps", "eval_on_start": True} if valid else {}
    arguments = TrainingArguments(output_dir=folder, **quiet, **exact, **evaluation, **recipe)
    named = [
        [{"row": index, "mask": [1] * len(row["input_ids"]), **row} for index, row in enumerate(part)]
        for part in (rows, valid)
    ]
    data: Record = {"data_collator": collate, "train_dataset": named[0], "eval_dataset": named[1] or None}
    return NotingTrainer(model=model, args=arguments, **data)


def train(model: Any, rows: list[Row], valid: list[Row], recipe: Record, mean_of_means: bool = False) -> Record:
    """Run the Trainer to its end; mean_of_means makes it average the micro-batches' means."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, rows, valid, recipe, folder)
        if mean_of_means:
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
    return {"versions": VERSIONS, "recipe": recipe, "steps": trainer.steps, "eval": trainer.evaluations}


def make_orders(rows: list[Row]) -> Iterator[Record]:
    """Shuffle a run, note the order it visits, and check that epoch e is torch's permutation for seed + e."""
    recipe = MAIN | {"train_sampling_strategy": "random", "per_device_train_batch_size": 16}
    steps = train(load("adapter_init"), rows, [], recipe)["steps"]
    seen = [index for step in steps for index in step["rows"]]
    for epoch in range(recipe["num_train_epochs"]):
        order = seen[epoch * len(rows) :][: len(rows)]
        generator = torch.Generator().manual_seed(recipe["seed"] + epoch)
        assert order == torch.randperm(len(rows), generator=generator).tolist()
        digest = hashlib.sha256(",".join(map(str, order)).encode()).hexdigest()
        yield {"n": len(rows), "epoch": epoch, "first": order[:37], "sha256": digest}


# The same run without the Trainer


def window_loss(model: Any, window: list[Row]) -> torch.Tensor:
    """Sum the token losses, a row at a time and without padding; divide by all of the window's tokens."""
    total, tokens = torch.zeros(()), 0
    for row in window:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        logits = model(input_ids=ids[None]).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
        tokens += count(labels)
    return total / tokens


def plain_run(model: Any, rows: list[Row], recipe: Record) -> Iterator[Record]:
    """Train in plain torch, every rule of the recipe spelled out; yield what each step did."""
    size = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    windows = [rows[at : at + size] for at in range(0, len(rows), size)] * recipe["num_train_epochs"]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    decay, warmup, total = recipe["weight_decay"], recipe["warmup_steps"], len(windows)
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    for step, window in enumerate(windows):
        factor = step / warmup if step < warmup else (total - step) / (total - warmup)
        rate = optimizer.param_groups[0]["lr"] = recipe["learning_rate"] * factor
        loss = window_loss(model, window)
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt().item()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient * min(1.0, recipe["max_grad_norm"] / (norm + 1e-6))
        optimizer.step()
        yield {"loss": loss.item(), "grad_norm": norm, "learning_rate": rate}


def worst(run: list[Record], other: list[Record], key: str) -> float:
    """Give the largest relative difference between two runs, step by step."""
    pairs: list[tuple[float, float]] = [(a[key], b[key]) for a, b in zip(run, other, strict=True)]
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)


# Writing it all down


def write(name: str, record: Record) -> None:
    """Write a JSON object with a line for each item of its lists, floats in full."""
    parts = []
    for key, value in record.items():
        lines = [json.dumps(item) for item in value] if isinstance(value, list) else []
        text = "[\n    " + ",\n    ".join(lines) + "\n  ]" if lines else json.dumps(value)
        parts.append(f'  "{key}": {text}')
    (HERE / name).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def make_run(name: str, rows: list[Row], valid: list[Row], recipe: Record, start: str) -> Record:
    """Train, write down the run and its last adapter, and hold the run against the plain loop."""
    model = load(start)
    record = train(model, rows, valid, recipe)
    write(f"{name}.json", record)
    save(model, f"adapter_final_{name}")
    plain = list(plain_run(load(start), rows, recipe))
    errors = {key: worst(record["steps"], plain, key) for key in BOUNDS}
    print(f"{name}: the plain loop differs by", {key: f"{error:.1e}" for key, error in errors.items()})
    assert all(errors[key] < bound for key, bound in BOUNDS.items())
    return record


def make_logits() -> None:
    """Save the logits of the base model, and of main's last adapter on it, for ids drawn at random."""
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(6))
    model = load("adapter_final_main").eval()
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    save_file({"input_ids": ids, "base_logits": base, "tuned_logits": tuned}, HERE / "logits.safetensors")


def main() -> None:
    """Make everything; see the top of this file."""
    torch.set_num_threads(1)
    disable_progress_bar()
    for folder in [*HERE.glob("adapter_*"), *HERE.glob("model")]:
        shutil.rmtree(folder)
    make_model()
    make_adapters()
    rows, mixed = make_rows("main.jsonl", 3, 37), make_rows("hot.jsonl", 4, 33, mixed=True)
    valid = make_rows("valid.jsonl", 5, 9)
    run = make_run("main", rows, valid, MAIN, "adapter_init")
    make_run("hot", mixed, valid, HOT, "adapter_init_warm")
    contrast = train(load("adapter_init"), rows, valid, MAIN, mean_of_means=True)
    write("main_mean_of_means.json", contrast)
    print(f"main: a mean of means differs by {worst(run['steps'], contrast['steps'], 'loss'):.1e}")
    assert worst(run["steps"], contrast["steps"], "loss") > 1e-3
    orders = [*make_orders(rows), *make_orders([rows[0]] * 1153)]
    write("shuffled.json", {"seed": MAIN["seed"], "orders": orders})
    make_logits()


if __name__ == "__main__":
    main()
