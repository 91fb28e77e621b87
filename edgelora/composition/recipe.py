"""What is computed: the method, the rank, and of each target the adapters that change it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.composition.options import ComposeOptions
from edgelora.composition.parts import Part
from edgelora.errors import EdgeLoraError

Values = NDArray[np.float32]

# Modules in the order in which the decoders define them: PEFT draws random numbers in that order.
MODEL_ORDER = (
    "model", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "o_proj",
    "mlp", "gate_proj", "up_proj", "down_proj", "lm_head",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's share of one target: weight · scaling · lora_b · lora_a."""

    source: Part
    scaling: float
    lora_a: Values  # [rank, in_features]
    lora_b: Values  # [out_features, rank]

    @property
    def weight(self) -> float:
        return self.source.weight

    @property
    def rank(self) -> int:
        return len(self.lora_a)


@dataclass(frozen=True, eq=False)
class Target:
    """A module and the adapters that change it, at least one."""

    name: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> tuple[int, int]:
        """out_features, in_features"""
        return len(self.terms[0].lora_b), self.terms[0].lora_a.shape[1]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Complete; nothing more is decided later."""

    options: ComposeOptions
    rank: int  # the one of the config; with one adapter or ties, dare, … a target may have less
    targets: tuple[Target, ...]  # in the model's order
    init: Any  # the first adapter's init_lora_weights: PEFT draws a start by it first
    warnings: tuple[str, ...]


def make_recipe(parts: tuple[Part, ...], options: ComposeOptions) -> Recipe:
    """Raises EdgeLoraError for ranks that the method cannot compose."""
    warnings = []
    if len(parts) == 1 and options.method != "linear":
        unused = " and leaves --rank and --density aside" if options != _plain(options) else ""
        warnings.append(f"one adapter: method linear, as PEFT does{unused}")
        options = ComposeOptions("linear")
    targets = _targets(parts)
    strange = [target.name for target in targets if not _is_ordered(target.name)]
    if options.draws and strange:
        warnings.append(
            f"{', '.join(strange)}: unknown modules, taken in the order of their names: the random "
            "draws may differ from PEFT's"
        )
    rank = _rank(parts, options)
    _check_ranks(targets, rank, options)
    init = parts[0].config.get("init_lora_weights", True)
    return Recipe(options, rank, targets, init, tuple(warnings))


def _plain(options: ComposeOptions) -> ComposeOptions | None:
    return None if options.prunes or options.rank is not None else options


def _targets(parts: tuple[Part, ...]) -> tuple[Target, ...]:
    """All that any of the adapters changes."""
    names = {name for part in parts for name in part.adapter.branches}
    return tuple(
        Target(name, tuple(_term(part, name) for part in parts if name in part.adapter.branches))
        for name in sorted(names, key=model_order)
    )


def _term(part: Part, name: str) -> Term:
    branch = part.adapter.branches[name]
    lora_a, lora_b = (values.astype(np.float32) for values in (branch.lora_a, branch.lora_b))
    return Term(part, branch.scaling, lora_a, lora_b)


def model_order(target: str) -> list[tuple[int, str]]:
    """Sorts module paths as a decoder defines them; layers by number, what is unknown by name."""
    known = {name: index for index, name in enumerate(MODEL_ORDER)}
    return [
        (int(name), "") if name.isdecimal() else (known.get(name, len(known)), name)
        for name in target.split(".")
    ]


def _is_ordered(target: str) -> bool:
    return all(name.isdecimal() or name in MODEL_ORDER for name in target.split("."))


def _rank(parts: tuple[Part, ...], options: ComposeOptions) -> int:
    ranks = {part.path: part.rank for part in parts}
    if options.method == "cat":
        return sum(ranks.values())
    if options.truncates:
        return options.rank or max(ranks.values())
    if len(set(ranks.values())) > 1:
        listed = ", ".join(f"{path} has {rank}" for path, rank in ranks.items())
        raise EdgeLoraError(
            f"method {options.method} needs one rank, but {listed}: {_use(options)}"
        )
    return next(iter(ranks.values()))


def _use(options: ComposeOptions) -> str:
    return f"use cat or {'svd' if options.method == 'linear' else f'{options.method}_svd'}"


def _check_ranks(targets: tuple[Target, ...], rank: int, options: ComposeOptions) -> None:
    for target in targets:
        if options.truncates and rank > min(target.size):
            rows, columns = target.size
            raise EdgeLoraError(
                f"rank {rank}: {target.name} is {rows} × {columns}: --rank up to {min(target.size)}"
            )
        ranks = {str(term.source.path): term.rank for term in target.terms}
        if not options.truncates and options.method != "cat" and len(set(ranks.values())) > 1:
            listed = ", ".join(f"{path} has {each}" for path, each in ranks.items())
            raise EdgeLoraError(
                f"method {options.method} needs one rank of {target.name}, but {listed}: "
                f"{_use(options)}"
            )
