"""LoRA in the seven projections: one adapter, or a stack of them, beside base weights that stay as they are.

    y = W x + scale * B A dropout(x),   scale = alpha / r, or alpha / sqrt(r) with use_rslora

A is (R, in), B is (out, R), both float32 whatever the base's type. https://arxiv.org/abs/2106.09685

Adapters stack along the rank: A's on top of each other, B's side by side, and each row of a batch
keeps the columns of its own adapter. So one pass over the base serves rows of many adapters.

    adapter = Adapter.fresh(LoraConfig(r=8, lora_alpha=16), model.config, seed=42)
    logits = model(ids, attend=attend, lora=adapter.branches())
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from brie_mlx import randomness
from brie_mlx.config import MODULES, Config, LoraConfig
from brie_mlx.errors import AdapterError
from brie_mlx.qwen import Project, Qwen

_NAMES = "|".join(map(re.escape, MODULES))
_KEY = re.compile(rf"base_model\.model\.model\.layers\.(\d{{1,4}})\.({_NAMES})\.lora_([AB])(?:\.[^.]+)?\.weight")

Layer = dict[str, dict[str, mx.array]]
"""One layer's weights: module name -> {"lora_A": (R, in), "lora_B": (out, R)}."""


@dataclass
class Adapter:
    """One adapter: its settings and its weights, a dict a layer."""

    config: LoraConfig
    layers: list[Layer]

    @classmethod
    def fresh(cls, config: LoraConfig, base: Config, *, seed: int) -> Adapter:
        """Return a new adapter by PEFT's initialisation: A uniform within 1 / sqrt(in), B zero."""
        layers: list[Layer] = [{} for _ in range(base.num_hidden_layers)]
        for (layer, name), (a, b) in _shapes(config, base).items():
            key = mx.random.key(randomness.number("lora_A", seed, layer, name))
            bound = 1 / math.sqrt(a[1])
            layers[layer][name] = {"lora_A": mx.random.uniform(-bound, bound, a, key=key), "lora_B": mx.zeros(b)}
        return cls(config, layers)

    @classmethod
    def from_peft(cls, config: LoraConfig, tensors: Mapping[str, mx.array], base: Config) -> Adapter:
        """Put a PEFT file's tensors in their places; raise AdapterError that lists all that do not fit."""
        expected = {
            (layer, name, part): shape
            for (layer, name), shapes in _shapes(config, base).items()
            for part, shape in zip(("lora_A", "lora_B"), shapes, strict=True)
        }
        placed: dict[tuple[int, str, str], mx.array] = {}
        problems = config.stray_targets()
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            place = (int(match[1]), match[2], f"lora_{match[3]}") if match else None
            if place is None or place not in expected or place in placed:
                problems.append(f"{key}: unknown, twice, or not among the modules that adapter_config.json targets")
                continue
            if tensor.shape != expected[place]:
                problems.append(f"{key}: shape {tensor.shape}, expected {expected[place]}")
            placed[place] = tensor.astype(mx.float32)
        problems += [f"{peft_key(*place)}: missing" for place in expected if place not in placed]
        if problems:
            hint = f"check that the adapter was made for this base: it names {config.base_model_name_or_path!r}"
            raise AdapterError("The adapter does not fit the base and its own settings.", problems=problems, hint=hint)
        layers: list[Layer] = [{} for _ in range(base.num_hidden_layers)]
        for layer, name, part in expected:  # in this order, not the file's: sums over tensors stay the same to the bit
            layers[layer].setdefault(name, {})[part] = placed[layer, name, part]
        return cls(config, layers)

    def to_peft(self) -> dict[str, mx.array]:
        """Return the tensors by PEFT's names."""
        return {peft_key(layer, name, part): tensor for layer, name, part, tensor in self._tensors()}

    def _tensors(self) -> Iterator[tuple[int, str, str, mx.array]]:
        for at, layer in enumerate(self.layers):
            for name, parts in layer.items():
                for part, tensor in parts.items():
                    yield at, name, part, tensor

    @property
    def num_parameters(self) -> int:
        """Trainable numbers in all."""
        return sum(tensor.size for *_, tensor in self._tensors())

    def branches(self) -> list[Project]:
        """Return a branch a layer, for a forward pass in which every row uses this adapter."""
        return [branch(layer, self.scales(at)) for at, layer in enumerate(self.layers)]

    def scales(self, layer: int) -> dict[str, float]:
        """Return the factor of each module in a layer."""
        return {name: self.config.scale(layer, name) for name in self.layers[layer]}

    def merge_into(self, model: Qwen) -> None:
        """Add the adapter to the base's own weights, in their type; raise AdapterError for a quantized base."""
        for at, layer in enumerate(self.layers):
            for name, parts in layer.items():
                group, projection = name.split(".")
                linear = model.model.layers[at][group][projection]
                if isinstance(linear, nn.QuantizedLinear):
                    raise AdapterError(
                        "An adapter cannot be merged into a quantized base",
                        hint="merge into the base it was quantized from",
                    )
                update = self.config.scale(at, name) * (parts["lora_B"] @ parts["lora_A"])
                linear.weight = (linear.weight.astype(mx.float32) + update).astype(linear.weight.dtype)


Product = Callable[[str, mx.array, mx.array], mx.array]
"""(module name, x (..., in), A (R, in)) -> x A', with what training does to x on the way."""


def branch(layer: Layer, scales: Mapping[str, float | mx.array], product: Product | None = None) -> Project:
    """Return (name, x) -> what LoRA adds to the projection of x, (..., in) -> (..., out) in float32.

    A scale may be an array over the rank, (B, 1, R), to choose adapters row by row. `product` replaces the plain
    x A', for dropout.
    """

    def project(name: str, x: mx.array) -> mx.array | None:
        if name not in layer:
            return None
        a, b = layer[name]["lora_A"], layer[name]["lora_B"]
        x = x.astype(mx.float32)
        low = product(name, x, a) if product else x @ a.T  # (..., R)
        return (scales[name] * low) @ b.T  # (..., out)

    return project


class Stack:
    """Several adapters over one base, chosen row by row. They may differ in rank, scale and modules."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)
        self._layers: list[Layer] = []
        self._owners: list[dict[str, tuple[mx.array, mx.array]]] = []
        for at in range(len(adapters[0].layers) if adapters else 0):
            names = [name for name in MODULES if any(name in adapter.layers[at] for adapter in adapters)]
            self._layers.append({name: self._joined(at, name) for name in names})
            self._owners.append({name: self._columns(at, name) for name in names})

    def _parts(self, layer: int, name: str) -> list[tuple[int, dict[str, mx.array]]]:
        holders = enumerate(adapter.layers[layer] for adapter in self.adapters)
        return [(number, weights[name]) for number, weights in holders if name in weights]

    def _joined(self, layer: int, name: str) -> dict[str, mx.array]:
        parts = [part for _, part in self._parts(layer, name)]
        return {
            "lora_A": mx.concatenate([part["lora_A"] for part in parts], axis=0),  # (sum of R, in)
            "lora_B": mx.concatenate([part["lora_B"] for part in parts], axis=1),  # (out, sum of R)
        }

    def _columns(self, layer: int, name: str) -> tuple[mx.array, mx.array]:
        """Return which adapter each column of the rank belongs to, and its scale."""
        owners, scales = [], []
        for number, part in self._parts(layer, name):
            rank = part["lora_A"].shape[0]
            owners += [number] * rank
            scales += [self.adapters[number].config.scale(layer, name)] * rank
        return mx.array(owners), mx.array(scales)

    def branches(self, rows: Sequence[int | None]) -> list[Project] | None:
        """Return a branch a layer for a batch whose row b uses adapter rows[b], or the bare base (None)."""
        if all(number is None for number in rows):
            return None
        chosen = mx.array([-1 if number is None else number for number in rows])[:, None, None]  # (B, 1, 1)
        masks = [
            {name: mx.where(owners == chosen, scales, 0.0) for name, (owners, scales) in columns.items()}
            for columns in self._owners
        ]  # each (B, 1, sum of R)
        return [branch(layer, mask) for layer, mask in zip(self._layers, masks, strict=True)]


def peft_key(layer: int, name: str, part: str) -> str:
    """Return the name of a tensor in PEFT's file."""
    return f"base_model.model.model.layers.{layer}.{name}.{part}.weight"


def _shapes(config: LoraConfig, base: Config) -> dict[tuple[int, str], tuple[tuple[int, int], tuple[int, int]]]:
    """Return the shapes of A and B for every targeted (layer, module)."""
    sizes = base.module_shapes()
    modules = config.modules(base.num_hidden_layers)
    ranks = {place: config.rank(*place) for place in modules}
    return {(at, name): ((rank, sizes[name][1]), (sizes[name][0], rank)) for (at, name), rank in ranks.items()}


def num_parameters(config: LoraConfig, base: Config) -> int:
    """Return the trainable numbers of an adapter with these settings."""
    return sum(math.prod(a) + math.prod(b) for a, b in _shapes(config, base).values())
