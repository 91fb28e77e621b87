"""The shape of a manifest: which fields there must be, and of which type."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """An object with any keys, whose values have one shape."""

    values: Any


Shape = Any  # a type, a tuple of types, {key: shape} of the keys that must be, [shape], Named

_ADAPTER = {"ranks": [int], "scalings": [(int, float)], "targets": int}
_MANIFEST = {
    "flavor": str,
    "model": {
        "architecture": str,
        "num_hidden_layers": int,
        "hidden_size": int,
        "vocab_size": int,
        "context_length": int,
    },
    "base": {"name": str, "fingerprint": str},
    "targets": [{"name": str, "in_features": int, "out_features": int}],
    "plan": {"format": str, "block_size": (int, type(None)), "mode": str},
    "adapters": Named({"path": str} | _ADAPTER),
    "merged": Named(_ADAPTER),
    "files": Named({"size": int, "sha256": str}),
}
_WORDS = {
    str: "a string", int: "an integer", float: "a number", type(None): "null", dict: "an object",
    list: "a list",
}  # fmt: skip


def mismatches(fields: dict[str, Any]) -> list[str]:
    """Each field that is missing or of another type, with its path; others are not looked at."""
    return list(_mismatches(fields, _MANIFEST, ""))


def _mismatches(value: Any, shape: Shape, path: str) -> Iterator[str]:
    types = _types(shape)
    if not _is_one_of(value, types):
        yield f"{path} is not {' or '.join(_WORDS[each] for each in types)}"
    elif isinstance(shape, dict):
        for key, inner in shape.items():
            place = f"{path}.{key}".lstrip(".")
            if key in value:
                yield from _mismatches(value[key], inner, place)
            else:
                yield f"{place} is missing"
    elif isinstance(shape, list):
        for i, each in enumerate(value):
            yield from _mismatches(each, shape[0], f"{path}[{i}]")
    elif isinstance(shape, Named):
        for key, each in value.items():
            yield from _mismatches(each, shape.values, f"{path}.{key}")


def _is_one_of(value: Any, types: tuple[type, ...]) -> bool:
    """JSON's true and false are no integers."""
    return isinstance(value, types) and not isinstance(value, bool)


def _types(shape: Shape) -> tuple[type, ...]:
    if isinstance(shape, (dict, Named)):
        return (dict,)
    if isinstance(shape, list):
        return (list,)
    return shape if isinstance(shape, tuple) else (shape,)
