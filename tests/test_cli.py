"""The command: what it prints, and every mistake of a user as one message, exit 1, no traceback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy
from click.testing import Result
from conftest import dialogue, small_config, warm_adapter, write_rows

from brie_mlx import weights
from brie_mlx.config import Config

Run = Callable[..., Result]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [dialogue("why wait?", "because the letter has a stamp.")] * 6)


def refused(result: Result, *said: str) -> None:
    """Check that a command ended in words: exit 1, all of them there, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output
    for words in said:
        assert words in result.output


# --- mistakes ----------------------------------------------------------------------------------


def test_a_missing_model_folder(brie: Run, rows: Path, tmp_path: Path) -> None:
    refused(
        brie("train", "--model", "./nowhere", "--data", rows, "--out", tmp_path / "run"), "./nowhere does not exist"
    )


def test_a_model_that_cannot_be_downloaded(brie: Run, rows: Path, tmp_path: Path) -> None:
    result = brie("train", "--model", "someone/model", "--data", rows, "--out", tmp_path / "run")
    refused(result, "someone/model is not on this machine", "--model DIR", "make demo")
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_architecture(brie: Run, tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = make_base(tmp_path / "base")
    (folder / "config.json").write_text(json.dumps(small_config(model_type="llama")))
    refused(brie("generate", "--model", folder, "--prompt", "x"), "model_type is 'llama'", "'qwen2'")


def test_a_weight_file_cut_short(brie: Run, tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = make_base(tmp_path / "base")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(
        brie("generate", "--model", folder, "--prompt", "x"),
        "model.safetensors",
        "is broken",
        "download or copy it again",
    )


def test_a_missing_tensor(brie: Run, rows: Path, tmp_path: Path, make_base: Callable[..., Path]) -> None:
    folder = make_base(tmp_path / "base")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    result = brie("train", "--model", folder, "--data", rows, "--valid", "none", "--out", tmp_path / "run")
    refused(result, "model.layers.1.mlp.up_proj.weight: missing")


def test_bad_rows_many_at_once(brie: Run, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": []}\n' + json.dumps(dialogue("a", "b")) + "\n" + '{"messages": 3}\n{"a": NaN}\n' * 15)
    result = brie("train", "--model", base, "--data", path, "--out", tmp_path / "run")
    refused(
        result, "has 31 problems", f"{path}:1:messages:", f"{path}:3:messages:", f"{path}:4: NaN", "... and 11 more"
    )


def test_an_empty_data_file(brie: Run, base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    refused(brie("train", "--model", base, "--data", tmp_path / "empty.jsonl"), "has no rows", "one JSON object a line")


def test_an_unknown_setting(brie: Run) -> None:
    refused(brie("train", "-o", "lerning_rate=1"), "lerning_rate: unknown; did you mean learning_rate?")


def test_a_value_out_of_range(brie: Run) -> None:
    refused(brie("train", "-o", "lora_dropout=1.5"), "lora_dropout = 1.5: expected 0 or more, below 1")
    refused(brie("generate", "--prompt", "x", "--temperature", "-1"), "temperature = -1.0: expected")


def test_an_adapter_for_another_base(brie: Run, base: Path, tmp_path: Path) -> None:
    other = Config.from_dict(small_config(hidden_size=64))
    weights.write_adapter(tmp_path, warm_adapter(other, r=4, base_model_name_or_path="someone/larger"))
    result = brie("generate", "--model", base, "--adapter", tmp_path, "--prompt", "x")
    refused(result, "does not fit the base", "shape (4, 64), expected (4, 32)", "someone/larger")


def test_an_output_folder_that_already_holds_a_run(brie: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    result = brie("train", "--model", base, "--data", rows, "--out", tmp_path / "run")
    refused(result, "already holds something, and nothing is overwritten", "--resume")
    assert (tmp_path / "run" / "recipe.json").read_text() == "{}"


def test_a_full_disk(brie: Run, base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from brie_mlx import files

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_push", full)
    result = brie("train", "--model", base, "--data", rows, "--valid", "none", "--out", tmp_path / "run")
    refused(result, "No space left on device", "MB are free", "what was there before is intact")


def test_a_run_to_resume_that_is_not_there(brie: Run, tmp_path: Path) -> None:
    refused(brie("train", "--resume", "--out", tmp_path / "none"), "holds no run to resume")


def test_misuse_is_exit_2(brie: Run) -> None:
    assert brie("train", "-o", "nothing").exit_code == 2
    assert brie("train", "--resume", "--data", "x").exit_code == 2
    assert brie("nonsense").exit_code == 2


# --- training ----------------------------------------------------------------------------------


def test_plain_lines_where_the_output_is_no_terminal(brie: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("-o", "logging_steps=1", "-o", "num_train_epochs=3")
    result = brie("train", "--model", base, "--data", rows, "--valid", rows, "--out", out, *settings)
    assert result.exit_code == 0
    assert "step     1  loss " in result.output
    assert "step     3  eval_loss " in result.output
    assert f"saved {out / 'checkpoint-3'}" in result.output
    assert "    loss " in result.output
    assert "▁" in result.output
    assert "\x1b" not in result.output
    assert f"brie generate --adapter {out / 'checkpoint-3'}" in result.output
    assert (out / "loss.svg").read_text().startswith("<?xml")
    assert {path.name for path in out.iterdir()} == {
        "recipe.json",
        "run.json",
        "metrics.jsonl",
        "checkpoint-3",
        "loss.svg",
    }


def test_rows_that_are_cut_are_told_with_what_it_costs(brie: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    row = {"input_ids": list(range(60)), "labels": [-100] * 10 + list(range(10, 60))}
    settings = ("--valid", "none", "--out", tmp_path / "run", "-o", "max_length=40")
    result = brie("train", "--model", base, "--data", write_rows(rows, [row]), *settings)
    assert "1 rows cut at 40 tokens, which costs 20 supervised tokens" in result.output


def test_json_lines_for_programs(brie: Run, base: Path, rows: Path, tmp_path: Path) -> None:
    result = brie("train", "--model", base, "--data", rows, "--valid", "none", "--out", tmp_path / "run", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["plan"]["steps"] == 2
    assert [line["step"] for line in lines if "loss" in line] == [2]
    fields = {
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert set(lines[1]) == fields
    assert lines[-1]["last"].endswith("checkpoint-2")


def test_a_run_in_a_terminal_shows_a_bar_and_survives_ctrl_c(base: Path, rows: Path, tmp_path: Path) -> None:
    """A real process in a pseudo-terminal: Ctrl-C, exit 130, the way on, and --resume to the end."""
    import pty

    arguments = ["--model", str(base), "--data", str(rows), "--valid", "none", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "brie_mlx.train"]
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    settings = ["-o", "num_train_epochs=4000", "-o", "save_steps=0"]
    process = subprocess.Popen(
        [*command, *arguments, *settings],
        stdout=slave,
        stderr=slave,
        stdin=slave,
        env=environment,
        start_new_session=True,
    )
    os.close(slave)
    shown = b""
    while b"saved" not in shown and len(shown) < 1_000_000:
        try:
            shown += os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if b"tok/s" in shown and process.poll() is None:
            process.send_signal(signal.SIGINT)
            settings = []
            while True:
                try:
                    shown += os.read(master, 4096)
                except OSError:
                    break
            break
    assert process.wait(timeout=60) == 130, shown.decode()
    text = shown.decode()
    assert "lr " in text
    assert "left" in text
    assert "Stopped after step" in text
    assert "brie train --resume --out" in text.replace("\r\n", "")
    os.close(master)


# --- talking -----------------------------------------------------------------------------------


def test_generate_answers_the_same_for_the_same_seed(brie: Run, base: Path) -> None:
    arguments = ("generate", "--model", base, "--prompt", "why?", "--max-tokens", 8)
    first, again = (brie(*arguments, "--seed", 3).output for _ in range(2))
    assert first == again
    assert brie(*arguments, "--seed", 4).output != first


def test_generate_reads_standard_input_and_gives_json(brie: Run, base: Path) -> None:
    result = brie("generate", "--model", base, "--max-tokens", 4, "--json", input="why?")
    reply = json.loads(result.stdout)
    assert reply["prompt"] == "why?"
    assert reply["num_tokens"] == len(reply["ids"]) <= 4
    assert reply["stop_reason"] in ("stop", "length")
    assert "tokens_per_second" in reply


def test_an_adapter_knows_its_base(brie: Run, base: Path, tmp_path: Path) -> None:
    config = Config.from_dict(small_config())
    weights.write_adapter(tmp_path, warm_adapter(config, r=4, base_model_name_or_path=str(base)))
    arguments = ("generate", "--prompt", "why?", "--max-tokens", 12, "--temperature", 0)
    tuned = brie(*arguments, "--adapter", tmp_path)
    assert tuned.exit_code == 0
    assert tuned.output != brie(*arguments, "--model", base).output


def test_chat_remembers_saves_and_starts_anew(brie: Run, base: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = [
        "hello",
        "and then?",
        f"/save {saved}",
        "/system You are terse.",
        "hm",
        f"/save {saved}",
        "/nonsense",
        "/exit",
    ]
    result = brie("chat", "--model", base, "--max-tokens", 3, "--seed", 5, input="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in saved.read_text("utf-8").splitlines()]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"] * 2
    assert rows[1]["messages"][0] == {"role": "system", "content": "You are terse."}
    assert result.output.count("/system TEXT") == 2
