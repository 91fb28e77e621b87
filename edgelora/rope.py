"""The rotary settings of a Hugging Face config, in both spellings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgelora.config_keys import Lookups

DEFAULT_THETA = 10000.0  # transformers' default for all supported architectures
SUPPORTED_TYPES = ("default", "llama3")
_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def read_rope(values: Mapping[str, Any], problems: list[str]) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling), from `rope_theta` + `rope_scaling` or from `rope_parameters`.

    Whatever is not supported or contradicts itself is added to `problems`.
    """
    blocks = {name: _block(values, name, problems) for name in ("rope_scaling", "rope_parameters")}
    scalings = [
        _read_scaling(block, f"{name}.", problems) for name, block in blocks.items() if block
    ]
    if len(set(scalings)) > 1:
        problems.append("rope_scaling and rope_parameters disagree")
    return _read_theta(values, blocks, problems), scalings[0] if scalings else None


def _block(values: Mapping[str, Any], name: str, problems: list[str]) -> Mapping[str, Any]:
    block = values.get(name) or {}
    if isinstance(block, dict):
        return block
    problems.append(f"{name} = {block!r}: must be an object")
    return {}


def _read_theta(
    values: Mapping[str, Any], blocks: Mapping[str, Mapping[str, Any]], problems: list[str]
) -> float:
    given = []
    for source in (values, *blocks.values()):
        if source.get("rope_theta") is not None:
            lookups = Lookups(source)
            given.append(lookups.number("rope_theta"))
            problems += lookups.problems
    if len(set(given)) > 1:
        problems.append(f"rope_theta is given as {' and as '.join(map(str, given))}")
    return given[0] if given else DEFAULT_THETA


def _read_scaling(block: Mapping[str, Any], prefix: str, problems: list[str]) -> RopeScaling | None:
    """One `rope_scaling` or `rope_parameters` object; `prefix` names it in messages."""
    given = (block.get(name) for name in ("rope_type", "type"))
    types = {str(kind) for kind in given if kind is not None}
    if not types:
        types = {"default"} if set(block) <= {"rope_theta", "partial_rotary_factor"} else set()
    if len(types) != 1 or not types <= set(SUPPORTED_TYPES):
        found = ", ".join(sorted(map(str, types))) or "none"
        problems.append(
            f"{prefix}rope_type {found} is not supported (only {', '.join(SUPPORTED_TYPES)})"
        )
        return None
    is_llama3 = types == {"llama3"}
    _refuse_other_keys(block, prefix, _LLAMA3_KEYS if is_llama3 else (), problems)
    return _read_llama3(block, prefix, problems) if is_llama3 else None


def _refuse_other_keys(
    block: Mapping[str, Any], prefix: str, allowed: tuple[str, ...], problems: list[str]
) -> None:
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *allowed}
    others = sorted(name for name in block.keys() - known if block[name] is not None)
    if others:
        problems.append(", ".join(prefix + name for name in others) + " not known to EdgeLoRA")
    if block.get("partial_rotary_factor") not in (None, 1.0):
        problems.append(f"{prefix}partial_rotary_factor is not supported (only 1.0)")


def _read_llama3(block: Mapping[str, Any], prefix: str, problems: list[str]) -> RopeScaling:
    lookups = Lookups(block)
    scaling = RopeScaling(
        factor=lookups.number("factor"),
        low_freq_factor=lookups.number("low_freq_factor"),
        high_freq_factor=lookups.number("high_freq_factor"),
        original_max_position_embeddings=lookups.integer("original_max_position_embeddings"),
    )
    problems += [prefix + problem for problem in lookups.problems]
    if not lookups.problems and scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.append(f"{prefix}high_freq_factor must be greater than low_freq_factor")
    return scaling
