"""A PEFT config's fields: each exported, harmless or refused by name."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelora.adapter.ledger import LedgerEntry, exported, harmless, refused

Check = Callable[[Any], bool]
PEFT = (0, 21, 2)  # the version whose meanings are read
MERGE = (  # what can be done with most that is refused
    "merge it with PEFT (model.merge_and_unload().save_pretrained(FOLDER)) and export that folder "
    "as the base"
)
TRANSPOSED = (
    "transposed weights (Conv1D), which no base that is exported has: set it to false, as PEFT does"
)


@dataclass(frozen=True)
class Fields:
    """Of one class of PEFT's configs; all that it knows is here."""

    owner: str  # the class
    exported: Mapping[str, tuple[Any, Check, str]]  # PEFT's default, check, what it must be
    harmless: Mapping[str, str]  # why
    off: Mapping[str, tuple[tuple[object, ...], str]]  # values that mean off; else why refused
    judged: Mapping[str, Callable[[str, Any], LedgerEntry]] = field(default_factory=dict)
    never_null: tuple[str, ...] = ()  # of those exported: PEFT cannot compute with null

    def values(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Those exported; absent ones, and null where PEFT takes it, as PEFT's default."""
        given = {n: v for n, v in config.items() if v is not None or n in self.never_null}
        return {name: given.get(name, default) for name, (default, _, _) in self.exported.items()}

    def ledger(self, config: Mapping[str, Any]) -> list[LedgerEntry]:
        """An entry for each field that is in the config or decides the arithmetic."""
        entries = [self._check_exported(*each) for each in self.values(config).items()]
        others = sorted(config.items())
        return entries + [
            self._check_other(*each) for each in others if each[0] not in self.exported
        ]

    def _check_exported(self, name: str, value: Any) -> LedgerEntry:
        _, check, expected = self.exported[name]
        item = f"{name} = {_short(value)}"
        return exported(item, "resolved as PEFT does") if check(value) else refused(item, expected)

    def _check_other(self, name: str, value: Any) -> LedgerEntry:
        item = f"{name} = {_short(value)}"
        if name in self.judged:
            return self.judged[name](item, value)
        if name in self.harmless:
            return harmless(item, self.harmless[name])
        if name not in self.off:
            reason = f"not a field of PEFT 0.21.2's {self.owner}, so its meaning is unknown"
            return refused(item, reason)
        off, reason = self.off[name]
        is_off = any(type(value) is type(each) and value == each for each in off)
        return harmless(item, "off") if is_off else refused(item, reason)


def check_version(item: str, value: Any) -> LedgerEntry:
    """What wrote the config; PEFT writes it since 0.18."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", value) if isinstance(value, str) else None
    if value is None:
        return harmless(item, "not said")
    if found is None:
        return refused(item, "no version of PEFT; save the adapter with PEFT again")
    if tuple(int(number or 0) for number in found.groups()) <= PEFT:
        return harmless(item, "its fields mean what they mean here")
    return refused(
        item,
        "newer than the 0.21.2 that is read here, so a field may mean something else: update "
        "edgelora, or set peft_version to 0.21.2 if you know that none does",
    )


def is_broken(fields: Fields, ledger: list[LedgerEntry]) -> bool:
    """Whether a field that decides the arithmetic is refused."""
    names = {entry.item.split(" ")[0] for entry in ledger if entry.verdict == "refused"}
    return bool(names & fields.exported.keys())


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def is_alpha(value: Any) -> bool:
    """False for NaN and for what float32 cannot hold."""
    return type(value) in (int, float) and 0 < value < 1e38


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_text_or_names(value: object) -> bool:
    return isinstance(value, str) or is_names(value)


def is_layers(value: object) -> bool:
    return type(value) is int or (
        isinstance(value, list) and all(type(index) is int for index in value)
    )


def is_ranges(value: object) -> bool:
    """Pairs of layers, the second beyond the last."""
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == len(("first", "end"))
        and all(type(index) is int for index in pair)
        and 0 <= pair[0] < pair[1]
        for pair in value
    )


def is_map_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(each) for each in value.values())
