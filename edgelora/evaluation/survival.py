"""What 4-bit rounding leaves of a delta that was merged into a weight."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.quantize import FloatMatrix, Matrix, dequantize

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Survival:
    """Of one target. changed: share of its codes that the delta moved (1 in format float);
    correlation: of the delta as it is in the rounded weight with the delta as wanted, −1…1.
    """

    changed: float
    correlation: float


def survival(base: Matrix, merged: Matrix, delta: Float32) -> Survival:
    """base, merged: the weight rounded without and with the delta [out_features, in_features]."""
    found = dequantize(merged) - dequantize(base)
    return Survival(_changed(base, merged), _correlation(found, delta))


def _changed(base: Matrix, merged: Matrix) -> float:
    if isinstance(base, FloatMatrix) or isinstance(merged, FloatMatrix):
        return 1.0
    return float(np.mean(base.codes != merged.codes))


def _correlation(found: Float32, wanted: Float32) -> float:
    """Cosine; 1 for a wanted delta of zeros that was kept so."""
    lengths = _dot(found, found) * _dot(wanted, wanted)
    if lengths == 0:
        return 1.0 if not found.any() and not wanted.any() else 0.0
    return _dot(found, wanted) / float(np.sqrt(lengths))


def _dot(a: Float32, b: Float32) -> float:
    """Row by row in float32, the rows in float64; no BLAS, whose last bits follow its threads."""
    return float(np.multiply(a, b).sum(axis=1).sum(dtype=np.float64))
