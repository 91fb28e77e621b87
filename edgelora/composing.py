"""The orchestrator of `compose`: adapters, weighted → one in a PEFT folder; needs no base."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.adapter import doubts
from edgelora.composition import (
    PEFT_FOLDER,
    ComposeOptions,
    compose_factors,
    make_recipe,
    read_parts,
    write_folder,
)
from edgelora.composition.parts import base_of
from edgelora.whole_folder import check_target, new_folder

Progress = Callable[[int, int], None]  # targets done, targets in all


@dataclass(frozen=True)
class ComposeReport:
    """What was made."""

    folder: Path
    method: str  # the one used: one adapter alone is always linear
    rank: int
    targets: int
    adapters: Mapping[str, float]  # path → weight
    base_model_name_or_path: str | None
    size: int  # bytes of adapter_model.safetensors
    seconds: float
    warnings: tuple[str, ...]


def compose(
    adapters: Mapping[str, float] | Mapping[Path, float],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ComposeReport:
    """Composes PEFT LoRA folders (path → weight) into the PEFT folder `out`.

    `options` are the fields of ComposeOptions: method (by default "cat", which is the weighted
    sum), rank, density, majority_sign, seed. The folder appears whole or not at all. Raises
    EdgeLoraError on any bad input, and where a method needs torch and peft that are not there.
    """
    started = time.perf_counter()
    folder, chosen = Path(out), ComposeOptions(**options)
    check_target(folder, PEFT_FOLDER, force=force)
    parts = read_parts({Path(path): weight for path, weight in adapters.items()})
    recipe = make_recipe(parts, chosen)
    factors = {}
    for target, pair in compose_factors(recipe):
        factors[target] = pair
        if progress is not None:
            progress(len(factors), len(recipe.targets))
    with new_folder(folder, PEFT_FOLDER, force=force) as partial:
        write_folder(partial, parts, recipe.rank, factors)
    base, warning = base_of(parts)
    doubtful = [line for part in parts for line in doubts(part.adapter)]
    return ComposeReport(
        folder=folder,
        method=recipe.options.method,
        rank=recipe.rank,
        targets=len(factors),
        adapters={str(part.path): part.weight for part in parts},
        base_model_name_or_path=base,
        size=sum(values.nbytes for pair in factors.values() for values in pair),
        seconds=time.perf_counter() - started,
        warnings=(*recipe.warnings, *doubtful, *((warning,) if warning else ())),
    )
