"""Which modules a PEFT config names, and each one's rank and scaling: PEFT 0.21.2's own rules.

Sources: `check_target_module_exists` and `_maybe_include_all_linear_layers` in
peft/tuners/tuners_utils.py, `get_pattern_key` and `match_target_against_key` in
peft/utils/other.py, `update_layer` in peft/tuners/lora/layer.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from edgelora.adapter.ledger import LedgerEntry, doubtful, harmless, refused
from edgelora.adapter.settings import Settings, Targeting

Value = TypeVar("Value", int, float)

ALL_LINEAR = "all-linear"
NOT_IN_ALL_LINEAR = ("lm_head", "model.embed_tokens")


def check_patterns(settings: Targeting) -> list[LedgerEntry]:
    """A refusal for every regex that Python cannot compile where PEFT uses it."""
    patterns = []
    if isinstance(settings, Settings):
        patterns += [(f"rank_pattern {key!r}", _ending(key)) for key in settings.rank_pattern]
        patterns += [(f"alpha_pattern {key!r}", _ending(key)) for key in settings.alpha_pattern]
    patterns += [(f"layers_pattern {key!r}", _layer(key)) for key in settings.layers_pattern]
    for name in ("target_modules", "exclude_modules"):
        value = getattr(settings, name)
        patterns += [(f"{name} {value!r}", value)] if isinstance(value, str) else []
    patterns += [(f"modules_to_save {key!r}", _saved(key)) for key in settings.modules_to_save]
    bad = [item for item, expression in patterns if not compiles(expression)]
    return [refused(item, "not a valid regex") for item in bad]


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _layer(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def _saved(pattern: str) -> str:
    return rf"(^|.*\.){pattern}($|\..*)"


def compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError):
        return False
    return True


def implied_targets(settings: Targeting, modules: Iterable[str]) -> list[str]:
    """The modules, of those given, that PEFT would adapt."""
    wanted = settings.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return [
            each
            for each in modules
            if has_parameter(settings, each)
            or (each not in NOT_IN_ALL_LINEAR and not _is_excluded(settings, each))
        ]
    return [
        each
        for each in modules
        if has_parameter(settings, each)
        or (not _is_excluded(settings, each) and _is_targeted(settings, each))
    ]


def has_parameter(settings: Targeting, module: str) -> bool:
    """Whether its weight is among target_parameters, which no other field narrows
    (`_inject_parameters`).
    """
    return _ends_with_one_of(f"{module}.weight", settings.target_parameters)


def _key(settings: Targeting, module: str) -> str:
    """What PEFT matches patterns of ranks and alphas against."""
    return f"{module}.weight" if has_parameter(settings, module) else module


def _is_excluded(settings: Targeting, module: str) -> bool:
    """What is saved whole is no target either (`check_target_module_exists`)."""
    if any(re.match(_saved(name), module) for name in settings.modules_to_save):
        return True
    if isinstance(settings.exclude_modules, str):
        return bool(settings.exclude_modules and re.fullmatch(settings.exclude_modules, module))
    return _ends_with_one_of(module, settings.exclude_modules)


def _ends_with_one_of(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_targeted(settings: Targeting, module: str) -> bool:
    if isinstance(settings.target_modules, str):
        return re.fullmatch(settings.target_modules, module) is not None
    if module in settings.target_modules:  # a full path is taken whatever the layers
        return True
    return _ends_with_one_of(module, settings.target_modules) and _is_in_layers(settings, module)


def _is_in_layers(settings: Targeting, module: str) -> bool:
    wanted = settings.layers_to_transform
    if wanted is None:
        return True
    index = _layer_index(settings.layers_pattern, module)
    return index == wanted if isinstance(wanted, int) else index in wanted


def _layer_index(patterns: tuple[str, ...], module: str) -> int | None:
    """The first numbered segment; with patterns, the one behind the first pattern that matches."""
    for expression in [_layer(pattern) for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if found := re.match(expression, module):
            return int(found["idx"])
    return None


def pattern_value(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The value of the first pattern, in the file's order, that matches the module path's end."""
    return next((value for key, value in patterns.items() if _matches_end(key, module)), default)


def _matches_end(pattern: str, module: str) -> bool:
    return re.match(_ending(pattern), module) is not None


def unmatched_patterns(settings: Settings, modules: Iterable[str]) -> list[LedgerEntry]:
    """A refusal for every rank or alpha pattern that matches none of the adapter's targets."""
    keys = [_key(settings, module) for module in modules]
    fields = {"rank_pattern": settings.rank_pattern, "alpha_pattern": settings.alpha_pattern}
    return [
        refused(f"{field} {pattern!r}", "matches no target of the adapter: take it out")
        for field, patterns in fields.items()
        for pattern in patterns
        if not any(_matches_end(pattern, key) for key in keys)
    ]


def overlapping_alphas(settings: Settings, modules: Iterable[str]) -> list[LedgerEntry]:
    """A doubt for patterns of different alphas that match one target: which came first in training
    is lost, since PEFT writes a config's keys sorted.
    """
    patterns, found = settings.alpha_pattern, dict[tuple[str, ...], str]()
    for module in modules:
        key = _key(settings, module)
        matching = tuple(each for each in patterns if _matches_end(each, key))
        if len({patterns[each] for each in matching}) > 1 and matching == tuple(sorted(matching)):
            found.setdefault(matching, module)
    return [
        doubtful(
            f"alpha_pattern {', '.join(map(repr, matching))}",
            f"all match {module}: the first is taken, as PEFT does when it loads them; it sorts "
            "them when it saves, so training may have taken another: compare with the script",
        )
        for matching, module in found.items()
    ]


def unmatched_names(settings: Targeting, modules: Iterable[str]) -> list[LedgerEntry]:
    """An entry for every listed name that ends no module path."""
    modules = list(modules)
    names = () if isinstance(settings.target_modules, str) else settings.target_modules
    unused = [
        name for name in names if not any(_ends_with_one_of(each, [name]) for each in modules)
    ]
    parameters = [
        name
        for name in settings.target_parameters
        if not any(_ends_with_one_of(f"{each}.weight", [name]) for each in modules)
    ]
    reason = "matches no linear of the base; PEFT skips it too"
    return [harmless(f"target_modules {name!r}", reason) for name in unused] + [
        harmless(f"target_parameters {name!r}", reason) for name in parameters
    ]


def rank_and_scaling(settings: Settings, module: str) -> tuple[int, float]:
    """The rank and alpha/rank, or alpha/√rank for rsLoRA, of one target."""
    key = _key(settings, module)
    rank = pattern_value(settings.rank_pattern, key, settings.rank)
    alpha = pattern_value(settings.alpha_pattern, key, settings.alpha)
    return rank, alpha / (math.sqrt(rank) if settings.use_rslora else rank)
