"""Who speaks: a base, its tokenizer, and the adapter over it if there is one.

voice = load_voice(adapter="runs/brie/checkpoint-290")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brie_mlx import weights
from brie_mlx.chat import Tokenizer
from brie_mlx.errors import AdapterError
from brie_mlx.qwen import Project, Qwen
from brie_mlx.recipe import Recipe


@dataclass(frozen=True)
class Voice:
    """A model ready to answer."""

    name: str
    """The adapter's name, or the base's."""
    model: Qwen
    tokenizer: Tokenizer
    lora: Sequence[Project] | None


def load_voice(
    *, model: str | None = None, adapter: str | None = None, revision: str | None = None, dtype: str = "auto"
) -> Voice:
    """Load a base and an adapter by name or folder; without a model's name, the adapter's own base.

    `revision` is the base's on the Hub. Raises ModelError or AdapterError, each with a way on.
    """
    place = weights.find_adapter(adapter) if adapter else None
    settings = weights.read_adapter_config(place.folder) if place else None
    if settings and not model:
        model, revision = settings.base_model_name_or_path, revision or settings.revision
        if not model:
            raise AdapterError(f"{adapter} does not name its base", hint="name it: --model OWNER/NAME or a folder")
    base = weights.find_model(model or Recipe().model, revision)
    loaded = weights.load_model(base.folder, dtype=dtype)
    lora = weights.load_adapter(place.folder, loaded.config).branches() if place else None
    return Voice(adapter or base.name, loaded, Tokenizer.read(base.folder), lora)
