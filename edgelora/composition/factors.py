"""The methods' arithmetic. weightᵢ·scalingᵢ = cᵢ for the adapters i of a target:

linear   A = Σ sign(cᵢ)·√|cᵢ|·Aᵢ,  B = Σ √|cᵢ|·Bᵢ          each factor for itself: no weighted sum
cat      A = c₁·A₁ above c₂·A₂ …,  B = B₁ beside B₂ …       exactly Σ cᵢ·Bᵢ·Aᵢ
svd      B·A = the `rank` largest singular values of Σ cᵢ·Bᵢ·Aᵢ; A's rows are orthonormal

The others take values out of Aᵢ and Bᵢ (or, …_svd, of scalingᵢ·Bᵢ·Aᵢ) first: `pruned`.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgelora.composition.recipe import Recipe, Target, Values
from edgelora.errors import EdgeLoraError

Factors = tuple[Values, Values]  # lora_a [rank, in_features], lora_b [out_features, rank]


def compose_factors(recipe: Recipe) -> Iterator[tuple[str, Factors]]:
    """Target by target, in the model's order; scaling is 1 for each.

    Raises EdgeLoraError for results that float32 cannot hold, and where torch or peft is missing.
    """
    results = _pruned(recipe) if recipe.options.prunes else _plain(recipe)
    for target in recipe.targets:
        with np.errstate(over="ignore", invalid="ignore"):
            yield target.name, _finite(next(results), target)


def _plain(recipe: Recipe) -> Iterator[Factors]:
    method = {"linear": _linear, "cat": _cat, "svd": _svd}[recipe.options.method]
    return (method(target, recipe.rank) for target in recipe.targets)


def _pruned(recipe: Recipe) -> Iterator[Factors]:
    from edgelora.composition.pruned import Pruning

    pruning = Pruning(recipe)
    for target in recipe.targets:
        if recipe.options.truncates:
            yield _truncated(pruning.delta(target), target, recipe.rank)
        else:
            yield pruning.factors(target)


def root_weights(target: Target) -> tuple[list[float], list[float]]:
    """What PEFT multiplies the factors A and B by; A takes the sign."""
    weights = [term.weight * term.scaling for term in target.terms]
    roots = [math.sqrt(abs(weight)) for weight in weights]
    return [root if c >= 0 else -root for root, c in zip(roots, weights, strict=True)], roots


def _linear(target: Target, rank: int) -> Factors:
    weights_a, weights_b = root_weights(target)
    return (
        _weighted([term.lora_a for term in target.terms], weights_a),
        _weighted([term.lora_b for term in target.terms], weights_b),
    )


def _weighted(arrays: list[Values], weights: list[float]) -> Values:
    total = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        total += array * np.float32(weight)
    return total


def _cat(target: Target, rank: int) -> Factors:
    """Filled up with zeros to one rank for all targets, as PEFT does."""
    pieces = [t.lora_a * np.float32(t.weight) * np.float32(t.scaling) for t in target.terms]
    return _padded((np.vstack(pieces), np.hstack([t.lora_b for t in target.terms])), rank)


def _padded(factors: Factors, rank: int) -> Factors:
    lora_a, lora_b = factors
    missing = rank - len(lora_a)
    return np.pad(lora_a, ((0, missing), (0, 0))), np.pad(lora_b, ((0, 0), (0, missing)))


def _svd(target: Target, rank: int) -> Factors:
    """Of the thin factors: B·A = Qb·(Rb·Raᵀ)·Qaᵀ needs singular values of a small matrix only."""
    lora_a = np.vstack([t.lora_a.astype(np.float64) for t in target.terms])
    lora_b = np.hstack([(t.weight * t.scaling) * t.lora_b.astype(np.float64) for t in target.terms])
    if len(lora_a) >= min(target.size):
        return _truncated(lora_b @ lora_a, target, rank)
    q_a, r_a = np.linalg.qr(lora_a.T)
    q_b, r_b = np.linalg.qr(lora_b)
    left, values, right = _singular(r_b @ r_a.T, target)
    kept = slice(0, rank)
    thin = (right @ q_a.T)[kept], (q_b @ (left * values))[:, kept]
    return _padded((_single(thin[0]), _single(thin[1])), rank)


def _truncated(delta: NDArray[np.floating], target: Target, rank: int) -> Factors:
    left, values, right = _singular(delta, target)
    return _single(right[:rank]), _single((left * values)[:, :rank])


def _singular(
    matrix: NDArray[np.floating], target: Target
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
    """In float64: float32 would mix the last vector kept with the first that is cut."""
    if not np.isfinite(matrix).all():
        raise _overflow(target)
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)


def _single(values: NDArray[np.floating]) -> Values:
    return np.ascontiguousarray(values, dtype=np.float32)


def _finite(factors: Factors, target: Target) -> Factors:
    if not all(np.isfinite(values).all() for values in factors):
        raise _overflow(target)
    return factors


def _overflow(target: Target) -> EdgeLoraError:
    paths = ", ".join(str(term.source.path) for term in target.terms)
    return EdgeLoraError(
        f"{paths}: the sum of {target.name} does not fit float32: choose smaller weights"
    )
