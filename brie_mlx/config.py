"""The two JSON files that shape a computation: a model's config.json and an adapter's adapter_config.json.

Both are read strictly: what brie does not implement is refused by name, everything at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from brie_mlx.errors import AdapterError, ModelError
from brie_mlx.recipe import TARGET_MODULES, Recipe

MODULES = tuple(
    f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}" for name in TARGET_MODULES
)
"""The seven projections by their names in a layer."""


@dataclass(frozen=True)
class Config:
    """The numbers of a config.json that shape the computation."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    quantization: tuple[int, int] | None = None
    """(group size, bits) of MLX's affine quantization."""

    @property
    def head_dim(self) -> int:
        """Size of a head, Dh."""
        return self.hidden_size // self.num_attention_heads

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of the seven projections."""
        D, F, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        return dict(zip(MODULES, [(D, D), (kv, D), (kv, D), (D, D), (F, D), (F, D), (D, F)], strict=True))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Read a config.json in its old and new spelling; raise ModelError for what is not implemented."""
        if raw.get("model_type") != "qwen2":
            raise ModelError(
                f"model_type is {raw.get('model_type')!r}; brie implements 'qwen2', which is Qwen2 and Qwen2.5",
                hint="--model Qwen/Qwen2.5-0.5B-Instruct",
            )
        rope = raw.get("rope_parameters") or {}
        problems = _not_implemented(raw, rope)
        sizes: dict[str, Any] = {name: raw.get(name) for name in _SIZES}
        wrong = {name: size for name, size in sizes.items() if type(size) is not int or size < 1}
        problems += [f"{name} = {size!r}: expected a whole number above 0" for name, size in wrong.items()]
        problems += [] if wrong else _misfits(**sizes)
        if problems:
            raise ModelError("This config.json is not one that brie can run.", problems=problems)
        quantization = raw.get("quantization")
        return cls(
            **sizes,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e4))),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
            quantization=(quantization["group_size"], quantization["bits"]) if quantization else None,
        )


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def _not_implemented(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    scaling = raw.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    quantization = raw.get("quantization") or {}
    checks = {
        f"rope scaling {kind!r}": kind != "default",
        "use_sliding_window = true": bool(raw.get("use_sliding_window")),
        "layers with sliding attention": any(kind != "full_attention" for kind in raw.get("layer_types") or ()),
        f"hidden_act = {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "quantization other than MLX's (quantization_config)": bool(raw.get("quantization_config"))
        and not quantization,
        f"quantization mode {quantization.get('mode')!r}": quantization.get("mode", "affine") != "affine",
        "quantization that differs from layer to layer": any(
            isinstance(value, dict) for value in quantization.values()
        ),
        "quantization without group_size and bits": bool(quantization)
        and not {"group_size", "bits"} <= set(quantization),
    }
    return [f"{what} is not implemented" for what, found in checks.items() if found]


def _misfits(*, hidden_size: int, num_attention_heads: int, num_key_value_heads: int, **_: int) -> list[str]:
    checks = {
        f"hidden_size {hidden_size} is not a multiple of {num_attention_heads} heads": hidden_size
        % num_attention_heads,
        f"{num_attention_heads} heads are not a multiple of {num_key_value_heads} key heads": num_attention_heads
        % num_key_value_heads,
    }
    return [what for what, rest in checks.items() if rest]


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's settings, by the names of peft.LoraConfig."""

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = TARGET_MODULES
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, *, base: str | None = None, revision: str | None = None) -> LoraConfig:
        """Return the settings of a fresh adapter."""
        names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
        return cls(**{name: getattr(recipe, name) for name in names}, base_model_name_or_path=base, revision=revision)

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any]) -> LoraConfig:
        """Read an adapter_config.json of any peft version; raise AdapterError for what brie cannot honour."""
        problems = [f"{name} = {raw[name]!r} is not implemented" for name in _REFUSED if raw.get(name)]
        if raw.get("peft_type") != "LORA":
            problems.append(f"peft_type = {raw.get('peft_type')!r}: expected 'LORA'")
        if raw.get("bias", "none") != "none":
            problems.append(f"bias = {raw['bias']!r}: only 'none' is implemented")
        problems += [f"{name} is missing" for name in ("r", "lora_alpha", "target_modules") if raw.get(name) is None]
        targets: Any = raw.get("target_modules")
        patterns = [targets] if isinstance(targets, str) else []
        patterns += [*(raw.get("rank_pattern") or {}), *(raw.get("alpha_pattern") or {})]
        problems += [f"pattern {text!r} cannot be used" for text in patterns if not _is_safe_pattern(text)]
        numbers = [raw.get("r", 1), *(raw.get("rank_pattern") or {}).values()]
        problems += [
            f"rank {rank!r}: expected a whole number above 0" for rank in numbers if type(rank) is not int or rank < 1
        ]
        if problems:
            raise AdapterError("This adapter_config.json is not one that brie can use.", problems=problems)
        layers = raw.get("layers_to_transform")
        return cls(
            r=raw["r"],
            lora_alpha=raw["lora_alpha"],
            lora_dropout=raw.get("lora_dropout") or 0.0,
            target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=dict(raw.get("rank_pattern") or {}),
            alpha_pattern=dict(raw.get("alpha_pattern") or {}),
            layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers) if layers is not None else None,
            base_model_name_or_path=raw.get("base_model_name_or_path"),
            revision=raw.get("revision"),
        )

    def to_peft(self) -> dict[str, Any]:
        """Return an adapter_config.json: the fields that load back to peft 0.6.2, and use_rslora where it is on."""
        targets = self.target_modules
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model_name_or_path,
            "revision": self.revision,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.r,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "fan_in_fan_out": False,
            "bias": "none",
            "modules_to_save": None,
            "init_lora_weights": True,
            "layers_to_transform": list(self.layers_to_transform) if self.layers_to_transform else None,
            "layers_pattern": None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }
        return config | ({"use_rslora": True} if self.use_rslora else {})

    def rank(self, layer: int, name: str) -> int:
        """Return the rank of one module."""
        return int(_by_pattern(self.rank_pattern, _path(layer, name), self.r))

    def scale(self, layer: int, name: str) -> float:
        """Return the factor of one module's branch."""
        alpha, rank = (
            float(_by_pattern(self.alpha_pattern, _path(layer, name), self.lora_alpha)),
            self.rank(layer, name),
        )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def modules(self, num_layers: int) -> list[tuple[int, str]]:
        """Return (layer, module name) of every projection that the settings target, in order."""
        layers = range(num_layers) if self.layers_to_transform is None else self.layers_to_transform
        return [(layer, name) for layer in layers for name in MODULES if self._targets(_path(layer, name))]

    def stray_targets(self) -> list[str]:
        """Return a problem for each target that is none of the seven projections (an embedding, a head, a typo)."""
        if isinstance(self.target_modules, str):
            return []
        known = [f".{_path(layer, name)}" for layer in (self.layers_to_transform or range(1000)) for name in MODULES]
        strays = [name for name in self.target_modules if not any(path.endswith(f".{name}") for path in known)]
        where = ", ".join(TARGET_MODULES)
        return [f"target_modules has {name!r}: brie puts LoRA in {where} only" for name in strays]

    def _targets(self, path: str) -> bool:
        if self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in self.target_modules)


_REFUSED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "exclude_modules",
    "layers_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)


def _path(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def _is_safe_pattern(text: str) -> bool:
    """Tell whether a stranger's pattern compiles and repeats no group (which could take forever)."""
    try:
        re.compile(text)
    except re.error:
        return False
    return len(text) <= 1000 and re.search(r"\)[*+{]", text) is None


def _by_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Look a module up the way PEFT does: a pattern matches the end of its path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
