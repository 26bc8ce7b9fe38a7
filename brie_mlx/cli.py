"""The command `brie`: parse, call, print. Mistakes leave as one message and exit 1, misuse as 2.

Imports of MLX happen inside the commands, so that `brie --help` does not wait for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import brie_mlx
from brie_mlx.errors import BrieError, DataError, Stopped
from brie_mlx.recipe import Recipe

if TYPE_CHECKING:
    from brie_mlx.training.plan import Plan

FOLDER = click.Path(path_type=Path, file_okay=False)


class _Brie(click.Group):
    """A group whose commands end in a message, never a traceback, when the mistake is the user's."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            click.echo(str(stopped), err=True)
            ctx.exit(stopped.exit_code)
        except BrieError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Brie, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(brie_mlx.__version__, prog_name="brie")
def main() -> None:
    """A domain voice for a small Qwen2.5: train it, talk to it, hand it on."""


def _common(*options: Callable[..., Any]) -> Callable[..., Any]:
    """Apply several click options to a command, in the order given."""

    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


# --- train -------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), help="Settings in TOML; see -o for their names."
)
@click.option("--model", help="The base: a repository on the Hub, or a folder.")
@click.option("--data", help="Training rows, JSON lines.")
@click.option("--valid", help="Rows for the evaluation loss; 'none' leaves it out.")
@click.option("--adapter", help="An adapter to start from: a repository or a folder.")
@click.option("--out", type=FOLDER, default=Path("runs/brie"), show_default=True, help="The run's folder.")
@click.option("-o", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of the recipe; repeatable.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, to the same bits.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; needs no weights.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines.")
def train(
    recipe_file: Path | None,
    out: Path,
    assignments: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    as_json: bool,
    **named: str | None,
) -> None:
    """Train an adapter on the rows of a file."""
    from brie_mlx.training.loop import train as run
    from brie_mlx.training.picture import curve, draw_loss
    from brie_mlx.training.plan import make_plan
    from brie_mlx.training.progress import watching
    from brie_mlx.training.run import check_vacant, read_recipe

    asked = {name: value for name, value in named.items() if value is not None} | _assignments(assignments)
    if resume:
        if asked or recipe_file:
            raise click.UsageError("--resume takes its settings from the run; leave the others out")
        recipe = read_recipe(out)
    else:
        recipe = (Recipe.read(recipe_file) if recipe_file else Recipe()).override(asked)
    if not resume and not dry_run:
        check_vacant(out)  # before minutes of downloading
    plan = make_plan(recipe, weights_too=not dry_run)
    if dry_run:
        click.echo(json.dumps(plan.to_dict(), indent=2) if as_json else _describe(plan))
        return
    with watching(as_json=as_json) as listener:
        summary = run(plan, out, listener=listener, resume=resume)
    picture = draw_loss(out)
    done = {
        "last": str(summary.last),
        "best": str(summary.best),
        "best_eval_loss": summary.best_eval_loss,
        "picture": str(picture),
    }
    if as_json:
        click.echo(json.dumps(done))
        return
    for line in filter(None, (curve(out, "loss"), curve(out, "eval_loss"))):
        click.echo(line)
    best = f", best {summary.best} (eval_loss {summary.best_eval_loss:.4f})" if summary.best else ""
    click.echo(f"Done: last {summary.last}{best}; curves in {picture}")
    click.echo(f"Next: brie generate --adapter {summary.best or summary.last} --prompt '...'")


def _assignments(texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [name for name, equals, _ in pairs if not equals]
    if wrong:
        raise click.UsageError(f"-o takes KEY=VALUE, not {', '.join(wrong)}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _describe(plan: Plan) -> str:
    """Return a plan as lines for people."""
    figures = plan.to_dict()
    rates = ", ".join(f"{step}: {rate:.4g}" for step, rate in plan.learning_rates().items())
    lines = [
        f"{figures['rows']:,} rows, {figures['num_tokens']:,} tokens, {figures['supervised_share']:.1%} supervised",
        f"the longest row has {figures['longest_row_tokens']:,} tokens",
        f"{figures['rows_truncated']} rows truncated at {plan.recipe.max_length:,} tokens, "
        f"which cuts {figures['supervised_tokens_cut']:,} supervised tokens",
        f"{figures['valid_rows']:,} rows for evaluation",
        f"{figures['steps']:,} steps, {figures['steps_per_epoch']:,} an epoch; "
        f"checkpoints {', '.join(map(str, figures['checkpoints']))}",
        f"learning rate at step {rates}",
        f"{figures['trainable_parameters']:,} trainable parameters",
    ]
    return "\n".join(lines)


# --- talk --------------------------------------------------------------------------------------

_VOICE = (
    click.option("--model", help="The base: a repository or a folder. Default: the adapter's own."),
    click.option("--adapter", help="A checkpoint, an exported folder, or a repository on the Hub."),
    click.option("--revision", help="The base's branch, tag or commit on the Hub."),
    click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
    click.option("--system", help="The system prompt. Default: Qwen's own."),
)
_SAMPLING = (
    click.option("--temperature", type=float, default=0.75, show_default=True, help="0 takes the likeliest word."),
    click.option("--max-tokens", type=int, default=512, show_default=True, help="Tokens of the answer at most."),
    click.option("--top-p", type=float, default=1.0, show_default=True),
    click.option("--top-k", type=int, default=0, show_default=True),
    click.option("--min-p", type=float, default=0.0, show_default=True),
    click.option("--repetition-penalty", type=float, default=1.0, show_default=True),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same answer."),
)
_VOICE_NAMES = ("model", "adapter", "revision", "dtype")


@main.command()
@click.option("--prompt", help="What to ask; without it, standard input.")
@_common(*_VOICE, *_SAMPLING)
@click.option("--json", "as_json", is_flag=True, help="Print the answer with its figures as JSON.")
def generate(prompt: str | None, system: str | None, as_json: bool, **settings: Any) -> None:
    """Answer one prompt, word by word."""
    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("give --prompt TEXT, or the prompt on standard input")
        prompt = _standard_input()
    from brie_mlx.generation.dialogue import Dialogue, printable
    from brie_mlx.generation.sampling import Sampling
    from brie_mlx.generation.voice import load_voice

    which = {name: settings.pop(name) for name in _VOICE_NAMES}
    sampling = Sampling(**settings)  # before minutes of loading
    voice = load_voice(**which)
    dialogue = Dialogue(voice.model, voice.tokenizer, sampling=sampling, lora=voice.lora, system=system)
    if as_json:
        reply = dialogue.ask(prompt)
        click.echo(json.dumps({"voice": voice.name, "prompt": prompt, **reply.to_dict()}, ensure_ascii=False))
        return
    show = printable if sys.stdout.isatty() else str
    reply = dialogue.ask(prompt, on_text=lambda piece: click.echo(show(piece), nl=False))
    click.echo()
    if not reply.text:
        click.echo("(the model ended its answer at once; try another --seed)", err=True)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"Standard input is not UTF-8 at byte {error.start + 1}", hint="iconv -t utf-8") from None


@main.command()
@_common(*_VOICE, *_SAMPLING)
def chat(system: str | None, **settings: Any) -> None:
    """Talk, turn by turn."""
    from brie_mlx.generation.dialogue import Dialogue
    from brie_mlx.generation.repl import talk
    from brie_mlx.generation.sampling import Sampling
    from brie_mlx.generation.voice import load_voice

    which = {name: settings.pop(name) for name in _VOICE_NAMES}
    sampling = Sampling(**settings)
    voice = load_voice(**which)
    dialogue = Dialogue(voice.model, voice.tokenizer, sampling=sampling, lora=voice.lora, system=system)
    talk(dialogue, read=_read_line, write=lambda text: click.echo(text, nl=False))


def _read_line() -> str | None:
    """Return a line that a person typed, None at the end of input or at Ctrl-C."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        click.echo()
        return None


# --- nano --------------------------------------------------------------------------------------


@main.command()
@click.argument("out", type=FOLDER, default=Path("models/nano"))
@click.option("--data", type=click.Path(path_type=Path), multiple=True, help="Rows to learn from; repeatable.")
@click.option("--steps", type=click.IntRange(1), help="Training steps.")
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True)
def nano(out: Path, data: tuple[Path, ...], steps: int | None, seed: int) -> None:
    """Make the embedded model: Qwen2.5's architecture in small, for the demo and for trying things out."""
    from brie_mlx.nano import STEPS, make_nano

    files = list(data) or [Path("data/train.jsonl")]  # rows for validation stay unseen

    def report(step: int, steps: int, loss: float) -> None:
        if step % 100 == 0 or step == steps:
            click.echo(f"nano: step {step} of {steps}, loss {loss:.3f}")

    make_nano(files, out, steps=steps or STEPS, seed=seed, report=report)
    click.echo(f"nano: {out}, a model that says nothing clever and runs every line that the real one runs")


# --- export ------------------------------------------------------------------------------------


@main.group()
def export() -> None:
    """Write a checkpoint in the formats that other tools read."""


@export.command("peft")
@click.argument("checkpoint", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--base-model", help="The base's name on the Hub, where the run's base was a folder.")
@click.option("--model", help="Where the base lies, if not where the checkpoint says.")
def export_peft(checkpoint: Path, out: Path, base_model: str | None, model: str | None) -> None:
    """Write the folder that PEFT and the Hub read, and check it by loading it."""
    from brie_mlx.export.peft import export_peft as write

    done = write(checkpoint, out, base_model=base_model, model=model)
    click.echo(f"{done.folder}: PEFT adapter for {done.base_model}")
    click.echo(f"Checked: {done.check}")
    click.echo(
        f"Use it: PeftModel.from_pretrained(base, {str(done.folder)!r}), or brie generate --adapter {done.folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
