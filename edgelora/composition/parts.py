"""The adapters of a composition, each with its weight; what must agree between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.adapter import (
    PARTS,
    Adapter,
    adapter_of,
    base_key,
    read_folder,
    refuse_copies,
    refuse_invocation,
    refuse_parts,
    refuse_prefix,
    refuse_ranges,
    refuse_replaced,
)
from edgelora.adapter.settings import Settings, read_settings
from edgelora.adapter.targets import ALL_LINEAR
from edgelora.errors import EdgeLoraError

MAX_WEIGHT = 1e38  # float32, as PEFT's


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter of the sum."""

    path: Path
    weight: float
    adapter: Adapter
    settings: Settings
    config: Mapping[str, Any]  # PEFT's, as it is in the folder

    @property
    def rank(self) -> int:
        """The largest that the config names: the one that PEFT compares and adds."""
        return max(self.settings.rank, *self.settings.rank_pattern.values(), 0)

    @property
    def has_regex(self) -> bool:
        """Whether target_modules is one; PEFT resolves "all-linear" to names."""
        wanted = self.settings.target_modules
        return isinstance(wanted, str) and wanted.lower() != ALL_LINEAR


def read_parts(adapters: Mapping[Path, float]) -> tuple[Part, ...]:
    """Reads PEFT folders, in the order given.

    Raises EdgeLoraError for a folder that cannot be read, an adapter that cannot be added (DoRA
    and biases among them), weights that are no numbers, or adapters that cannot belong to one base.
    """
    if not adapters:
        raise EdgeLoraError("no adapters to compose: give PATH:WEIGHT of one or more PEFT folders")
    _check_twice(adapters)
    parts = tuple(_read_part(path, weight) for path, weight in adapters.items())
    _check_kinds(parts)
    _check_sizes(parts)
    return parts


def base_of(parts: tuple[Part, ...]) -> tuple[str | None, str | None]:
    """The base's name, of the first that has one, and a warning if another names another."""
    named = [(part, name) for part in parts if (name := part.adapter.base_model_name_or_path)]
    if not named:
        return None, None
    first, base = named[0]
    others = [(part, name) for part, name in named if base_key(name) != base_key(base)]
    if not others:
        return base, None
    listed = ", ".join(f"{part.path} on {name}" for part, name in others)
    return base, f"{first.path} was trained on {base}, but {listed}: {base} is written"


def _check_twice(adapters: Mapping[Path, float]) -> None:
    seen: dict[Path, Path] = {}
    for path in adapters:
        if (other := seen.setdefault(path.resolve(), path)) != path:
            raise EdgeLoraError(f"{path}: the folder {other} again: give it once, weights added")


def _read_part(path: Path, weight: float) -> Part:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise EdgeLoraError(f"{path}: the weight {weight!r} is not a finite number")
    if abs(weight) > MAX_WEIGHT:
        raise EdgeLoraError(f"{path}: the weight {weight:g} does not fit float32")
    refuse_ranges(path, "a sum does not say of which layers: weigh it at run time (--adapter)")
    folder = read_folder(path)
    adapter = adapter_of(folder, None)
    refuse_replaced(adapter, path)
    refuse_copies(adapter, path, "a sum has no base: save with save_embedding_layers=False")
    why = "PEFT's sum does not wait for them: weigh it at run time (--adapter)"
    refuse_invocation(adapter, path, why)
    refuse_prefix(adapter, path, "they have no factors to add: name the adapter alone at run time")
    refuse_parts(
        adapter, path, PARTS, "a sum of factors leaves that out: weigh it at run time (--adapter)"
    )
    if (kind := folder.config["peft_type"]) != "LORA":
        raise EdgeLoraError(f"{path}: peft_type {kind}: only LoRA is added: weigh it at run time")
    settings, _ = read_settings(folder.config)
    assert settings is not None, "adapter_of refuses what has none"
    if settings.qalora_group_size is not None:
        raise EdgeLoraError(
            f"{path}: use_qalora: only the base tells which factors are of pooled inputs: weigh it "
            "at run time (--adapter)"
        )
    return Part(path, float(weight), adapter, settings, folder.config)


def _check_kinds(parts: tuple[Part, ...]) -> None:
    """PEFT's rule."""
    regex = [str(part.path) for part in parts if part.has_regex]
    if 0 < len(regex) < len(parts):
        raise EdgeLoraError(
            f"{', '.join(regex)}: target_modules is a regex, of the others a list, which PEFT does "
            "not mix: write the modules as a list into its adapter_config.json"
        )


def _check_sizes(parts: tuple[Part, ...]) -> None:
    """A target has one size in all adapters."""
    sizes: dict[str, tuple[Part, tuple[int, int]]] = {}
    for part in parts:
        for target, branch in part.adapter.branches.items():
            size = len(branch.lora_b), branch.lora_a.shape[1]
            first, known = sizes.setdefault(target, (part, size))
            if size != known:
                raise EdgeLoraError(
                    f"{part.path}: {target} is {size[0]} × {size[1]}, in {first.path} "
                    f"{known[0]} × {known[1]}: adapters of different bases cannot be composed"
                )
