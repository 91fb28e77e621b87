"""How a weight becomes codes: the base's own, or rounded, with or without calibration text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Branch
from edgelora.calibration import Arithmetic, Drift, Stream
from edgelora.checkpoint import Checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.plan import OUTER, Plan, int8_block
from edgelora.quantize import (
    Curvature,
    FloatMatrix,
    Matrix,
    Product,
    compensate_int4,
    dequantize,
    factorize,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
)

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a projection say of its weights. drift: of embedding and head none."""

    curvature: Curvature
    drift: Drift | None
    product: Product

    def corrected(self, values: Float32, whole: Float32 | None = None) -> Float32:
        """The weight that brings its outputs nearest to the float model's, given inputs and a
        residual that have drifted: W + ΔᵀX·H⁻¹ (as GPTAQ, Li et al., arXiv:2504.02692, whose
        derivation has no residual). whole: the weight with an adapter, where that is added later.
        """
        if self.drift is None:
            return values
        weight = values if whole is None else whole
        missing = self.drift.cross.outputs(weight, self.product)
        solved = self.curvature.solve(missing, self.product)
        explained = (missing * solved).sum(0)
        total = np.square(self.drift.sample.outputs(weight, self.product)).mean(0)
        return values + (solved * true_share(explained, total, len(solved), self.drift.tokens)).T


def true_share(explained: Float32, total: Float32, features: int, tokens: int) -> Float32:
    """How much of a least-squares solution to keep, 0…1, so that it misses least on other tokens.

    explained, total: of each output, the mean square of what it explains and of all that there is.
    Noise adds variance · features / tokens to what it explains of these tokens, and costs
    variance · features / (tokens − features) on others.
    """
    free = tokens - features
    if free <= 0:
        return np.zeros_like(explained)
    variance = np.maximum(total - explained, 0) * (tokens / free)
    signal = np.maximum(explained - variance * (features / tokens), 0)
    whole = signal + variance * (features / free)
    share = np.divide(signal, whole, out=np.zeros_like(whole), where=whole > 0)
    return np.asarray(share, np.float32)


@dataclass
class Rounding:
    """Follows the plan. With calibration text it has to see the projections in their order:
    `begin`, then for each `inputs_of`, `matrix` and `pass_on`.
    """

    checkpoint: Checkpoint
    plan: Plan
    changed: Collection[str]  # targets whose codes an adapter is merged into
    windows: NDArray[np.int64] | None = None  # calibration text: token ids [windows, positions]
    stream: Stream | None = None  # through the weights as stored
    exact: Stream | None = None  # through the values that they are rounded of

    def begin(self, values: Float32, embedding: Matrix | None = None) -> None:
        """The text's rows of the embedding, as it was and as it is stored, are the first inputs;
        None: as it was, for it is rounded only with the head.
        """
        if self.windows is None:
            return
        config, positions = self.checkpoint.config, self.windows.shape[1]
        arithmetic, read = Arithmetic(config, positions), self.checkpoint.read
        self.exact = Stream(config, arithmetic, self.windows, values, read)
        stored = values if embedding is None else dequantize(embedding)
        self.stream = Stream(config, arithmetic, self.windows, stored, read)

    def inputs_of(self, name: str, targets: Sequence[str]) -> Inputs | None:
        """What the inputs of the projection `name` say of its weights; None if nobody asks.

        targets: the module paths whose weights it multiplies with.
        """
        if self.stream is None or self.exact is None:
            return None
        inner = not set(OUTER).intersection(targets)
        if all(self._carries(x) if inner else not self.compensates(x) for x in targets):
            return None
        product = self.stream.arithmetic.product
        try:
            curvature = factorize(self.stream.hessian(), self.plan.block_size, product)
        except ValueError as error:
            where = f"{self.checkpoint.path}: {name}: its inputs on the calibration text"
            raise EdgeLoraError(f"{where}: {error}") from error
        return Inputs(curvature, self.stream.drift(self.exact) if inner else None, product)

    def compensates(self, target: str) -> bool:
        """Whether errors make up for each other in this matrix."""
        wanted = self.plan.wanted(target)
        return self.windows is not None and wanted == "int4" and not self._carries(target)

    def matrix(
        self,
        target: str,
        values: Float32,
        inputs: Inputs | None = None,
        whole: Float32 | None = None,
    ) -> Matrix:
        """`values` in the format of `target`; whole: with the adapter, where they are without.

        Raises EdgeLoraError.
        """
        name = f"{target}.weight"
        if self._carries(target):
            matrix = self.checkpoint.read_quantized(name)
            assert matrix is not None
            return matrix
        wanted = values if inputs is None else inputs.corrected(values, whole)
        return self.anew(target, wanted, inputs)

    def anew(self, target: str, values: Float32, inputs: Inputs | None = None) -> Matrix:
        """As they are, whatever the base holds. Raises EdgeLoraError."""
        try:
            return self._round(values, target, inputs)
        except ValueError as error:
            raise EdgeLoraError(f"{self.checkpoint.path}: {target}.weight: {error}") from error

    def keeps_codes(self, target: str, branch: Branch) -> bool:
        """Whether merging moves offsets only."""
        return self.plan.keeps_codes(self._stored_as(target), target, branch.group)

    def pass_on(
        self, values: Sequence[Float32], matrices: Sequence[Matrix], biases: Sequence[Float32]
    ) -> None:
        """The text goes through a projection as it will be stored, and as it was."""
        if self.stream is not None and self.exact is not None:
            self.stream.advance([dequantize(matrix) for matrix in matrices], biases)
            self.exact.advance(values, biases)

    def _carries(self, target: str) -> bool:
        return target not in self.changed and self.plan.carries(self._stored_as(target), target)

    def _stored_as(self, target: str) -> str | None:
        name = f"{target}.weight"  # of a tied lm_head not there
        return self.checkpoint.stored_as(name) if name in self.checkpoint.names() else None

    def _round(self, values: Float32, target: str, inputs: Inputs | None) -> Matrix:
        match self.plan.wanted(target):
            case "float":
                return FloatMatrix(values)
            case "int8":
                return quantize_int8(values, int8_block(target))
            case "nf4":
                return quantize_nf4(values)
        zero_points = self.plan.zero_points
        if inputs is None:
            return quantize_int4(values, self.plan.block_size, zero_points=zero_points)
        return compensate_int4(values, inputs.curvature, inputs.product, zero_points=zero_points)
