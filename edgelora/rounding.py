"""How a weight becomes codes: the base's own, or rounded, with or without calibration text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Branch
from edgelora.calibration import Arithmetic, Stream
from edgelora.checkpoint import Checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.plan import Plan, int8_block
from edgelora.quantize import (
    Curvature,
    FloatMatrix,
    Matrix,
    compensate_int4,
    dequantize,
    factorize,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)

Float32 = NDArray[np.float32]


@dataclass
class Rounding:
    """Follows the plan. With calibration text it has to see the projections in their order:
    `begin`, then for each `inputs_of`, `matrix` and `pass_on`.
    """

    checkpoint: Checkpoint
    plan: Plan
    changed: Collection[str]  # targets whose codes an adapter is merged into
    windows: NDArray[np.int64] | None = None  # calibration text: token ids [windows, positions]
    stream: Stream | None = None

    def begin(self, embedding: Matrix) -> None:
        """The text's rows of the embedding are the first inputs."""
        if self.windows is None:
            return
        config, positions = self.checkpoint.config, self.windows.shape[1]
        arithmetic = Arithmetic(config, positions)
        table = dequantize(embedding)
        self.stream = Stream(config, arithmetic, self.windows, table, self.checkpoint.read)

    def inputs_of(self, name: str, targets: Sequence[str]) -> Curvature | None:
        """What the inputs of the projection `name` say of its weights; None if nobody asks.

        targets: the module paths whose weights it multiplies with.
        """
        if self.stream is None or not any(self.compensates(target) for target in targets):
            return None
        block_size, product = self.plan.block_size, self.stream.arithmetic.product
        try:
            return factorize(self.stream.hessian(), block_size, product)
        except ValueError as error:
            where = f"{self.checkpoint.path}: {name}: its inputs on the calibration text"
            raise EdgeLoraError(f"{where}: {error}") from error

    def compensates(self, target: str) -> bool:
        """Whether the calibration text has a say in this matrix."""
        wanted = self.plan.wanted(target)
        return self.windows is not None and wanted == "int4" and not self._carries(target)

    def matrix(self, target: str, values: Float32, curvature: Curvature | None = None) -> Matrix:
        """`values` (adapters merged) in the format of `target`. Raises EdgeLoraError."""
        name = f"{target}.weight"
        if self._carries(target):
            matrix = self.checkpoint.read_quantized(name)
            assert matrix is not None
            return matrix
        return self.anew(target, values, curvature)

    def anew(self, target: str, values: Float32, curvature: Curvature | None = None) -> Matrix:
        """As `matrix`, whatever the base holds. Raises EdgeLoraError."""
        try:
            return self._round(values, target, curvature)
        except ValueError as error:
            raise EdgeLoraError(f"{self.checkpoint.path}: {target}.weight: {error}") from error

    def keeps_codes(self, target: str, branch: Branch) -> bool:
        """Whether merging moves offsets only."""
        return self.plan.keeps_codes(self._stored_as(target), target, branch.group)

    def pass_on(self, matrices: Sequence[Matrix], biases: Sequence[Float32]) -> None:
        """The text goes through a projection as it will be stored."""
        if self.stream is not None:
            self.stream.advance([dequantize(matrix) for matrix in matrices], biases)

    def _carries(self, target: str) -> bool:
        return target not in self.changed and self.plan.carries(self._stored_as(target), target)

    def _stored_as(self, target: str) -> str | None:
        name = f"{target}.weight"  # of a tied lm_head not there
        return self.checkpoint.stored_as(name) if name in self.checkpoint.names() else None

    def _round(self, values: Float32, target: str, curvature: Curvature | None) -> Matrix:
        match self.plan.wanted(target):
            case "float":
                return FloatMatrix(values)
            case "int8":
                return quantize_int8(values, int8_block(target))
            case "nf4":
                return quantize_nf4(values)
        zero_points = self.plan.zero_points
        if curvature is None or self.stream is None:
            return quantize_int4(values, self.plan.block_size, zero_points=zero_points)
        product = self.stream.arithmetic.product
        return compensate_int4(values, curvature, product, zero_points=zero_points)
