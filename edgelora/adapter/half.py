"""A branch's factors as float16, checked for overflow and lost precision."""

import math

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter.branches import Branch
from edgelora.errors import EdgeLoraError

MAX_RELATIVE_ERROR = 1e-3  # of a factor's norm; rounding values in float16's range makes 2e-4


def half_factors(branch: Branch, target: str) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """lora_a [rank, K] and lora_b [N, rank]. `target` names the branch in errors.

    A factor that does not fit as it is gives a power of two to the other one, which is exact and
    leaves lora_b·lora_a as it was. Raises EdgeLoraError if one of them does not fit even so.
    """
    lora_a, lora_b = branch.lora_a.astype(np.float32), branch.lora_b.astype(np.float32)
    if not _fits(lora_a) or not _fits(lora_b):
        exponent = _balancing_exponent(lora_a, lora_b)
        lora_a, lora_b = np.ldexp(lora_a, exponent), np.ldexp(lora_b, -exponent)
    return _checked(lora_a, f"{target}.lora_a"), _checked(lora_b, f"{target}.lora_b")


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16)


def _fits(values: NDArray[np.float32]) -> bool:
    half = _half(values)
    return bool(np.isfinite(half).all()) and _relative_error(values, half) <= MAX_RELATIVE_ERROR


def _relative_error(values: NDArray[np.float32], half: NDArray[np.float16]) -> float:
    """|half − values| / |values|, Frobenius norms in float64; 0 for all zeros."""
    exact = values.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(half.astype(np.float64) - exact)) / norm if norm else 0.0


def _balancing_exponent(lora_a: NDArray[np.float32], lora_b: NDArray[np.float32]) -> int:
    """e such that A·2ᵉ and B·2⁻ᵉ have about the same largest value."""
    largest_a, largest_b = float(np.abs(lora_a).max()), float(np.abs(lora_b).max())
    if not largest_a or not largest_b:
        return 0
    return round((math.log2(largest_b) - math.log2(largest_a)) / 2)


def _checked(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    half = _half(values)
    if not np.isfinite(half).all():
        largest = float(values.flat[int(np.abs(values).argmax())])
        raise EdgeLoraError(f"{name}: {largest:g} does not fit float16; export with --format float")
    error = _relative_error(values, half)
    if error > MAX_RELATIVE_ERROR:
        raise EdgeLoraError(
            f"{name}: values are too small for float16 (relative error {error:.1e}); scale "
            "the factors up and alpha down, or export with --format float"
        )
    return half
