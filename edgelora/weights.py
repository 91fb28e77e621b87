"""One weight's way: read from the checkpoint, merged, quantized, packed, appended to the weight file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Branch
from edgelora.bundle import WeightFile
from edgelora.checkpoint import Checkpoint
from edgelora.checkpoint.fingerprint import FingerprintBuilder
from edgelora.errors import EdgeLoraError
from edgelora.graph import (
    COS,
    EMBEDDING,
    SIN,
    Linear,
    Projection,
    StoredMatrix,
    head,
    projections,
    rotary_tables,
)
from edgelora.merge import merge
from edgelora.plan import Plan
from edgelora.quantize import (
    FloatMatrix,
    Matrix,
    concatenate,
    pack,
    quantize_int4,
    quantize_int8,
    quantize_nf4,
    same_kind,
)

EMBEDDING_BLOCK = 32
Progress = Callable[[int], None]  # called with the number of weights just written


@dataclass
class WeightWriter:
    """Streams a base's tensors, one projection at a time, into a bundle's weight file."""

    checkpoint: Checkpoint
    plan: Plan
    branches: Mapping[str, Branch]  # to be merged, by target
    file: WeightFile
    fingerprint: FingerprintBuilder
    progress: Progress
    matrices: dict[str, StoredMatrix] = field(default_factory=dict)

    def write(self) -> None:
        """Everything the graph names: embedding, linears, biases, norms, rotary tables."""
        config = self.checkpoint.config
        self._write_embedding()
        for projection in projections(config):
            if projection.name != "lm_head":
                self._write_projection(projection)
        self._write_head(head(config))
        for name in self.checkpoint.names():
            if len(self.checkpoint.shape(name)) == 1 and name.endswith("norm.weight"):
                self._store_vector(name)
        cos, sin = rotary_tables(config, self.plan.context_length)
        self.file.add(COS, cos)
        self.file.add(SIN, sin)

    def _store_vector(self, name: str) -> None:
        values = self._read(name)
        self.file.add(name, values)
        self.progress(values.size)

    def _read(self, name: str) -> NDArray[np.float32]:
        """The source values; hashed on the way."""
        values = self.checkpoint.read(name)
        if not np.isfinite(values).all():
            raise EdgeLoraError(f"{self.checkpoint.path}: {name} holds NaN or Inf: not usable")
        self.fingerprint.add(name, values)
        return values

    def _write_embedding(self) -> None:
        name = f"{EMBEDDING}.weight"
        matrix = self._quantize(name, self._read(name), self.plan.embedding_format)
        self._store(EMBEDDING, [matrix])

    def _write_head(self, projection: Projection) -> None:
        (linear,) = projection.linears
        tied = self.checkpoint.config.tie_word_embeddings
        if tied and linear.target not in self.branches:
            self.matrices[projection.name] = self.matrices[EMBEDDING]
            return
        values = self.checkpoint.read(f"{EMBEDDING}.weight") if tied else self._read(linear.weight)
        matrix = self._quantize(
            linear.weight, self._merged(linear, values), self.plan.embedding_format
        )
        self._store(projection.name, [matrix])

    def _write_projection(self, projection: Projection) -> None:
        """In one packed matrix where the parts allow it, else each linear for itself."""
        parts = [self._linear_matrix(linear) for linear in projection.linears]
        biases = [self._bias(linear) for linear in projection.linears]
        if len(parts) > 1 and projection.packable and same_kind(parts):
            self._store(projection.name, parts, biases)
            return
        for linear, part, bias in zip(projection.linears, parts, biases, strict=True):
            self._store(linear.target, [part], [bias])

    def _linear_matrix(self, linear: Linear) -> Matrix:
        values = self._merged(linear, self._read(linear.weight))
        return self._quantize(linear.weight, values, self.plan.format)

    def _merged(self, linear: Linear, values: NDArray[np.float32]) -> NDArray[np.float32]:
        branch = self.branches.get(linear.target)
        if branch is None:
            return values
        return merge(values, branch.lora_a, branch.lora_b, branch.scaling)

    def _bias(self, linear: Linear) -> NDArray[np.float32]:
        """float32 [out_features], or [0] for none."""
        return self._read(f"{linear.target}.bias") if linear.bias else np.zeros(0, np.float32)

    def _quantize(self, name: str, values: NDArray[np.float32], wanted: str) -> Matrix:
        target = name.removesuffix(".weight")
        carried = self.plan.carries(self.checkpoint.stored_as(name), wanted)
        if carried and target not in self.branches:
            matrix = self.checkpoint.read_quantized(name)
            assert matrix is not None
            return matrix
        try:
            return self._round(values, wanted)
        except ValueError as error:
            raise EdgeLoraError(f"{self.checkpoint.path}: {name}: {error}") from error

    def _round(self, values: NDArray[np.float32], wanted: str) -> Matrix:
        match wanted:
            case "float":
                return FloatMatrix(values)
            case "int8":
                return quantize_int8(values, EMBEDDING_BLOCK)
            case "nf4":
                return quantize_nf4(values)
        return quantize_int4(values, self.plan.block_size, zero_points=self.plan.zero_points)

    def _store(
        self, name: str, parts: Sequence[Matrix], biases: Sequence[NDArray[np.float32]] = ()
    ) -> None:
        packed = pack(concatenate(parts))
        arrays = dict(packed.arrays)
        bias = np.concatenate(list(biases)) if biases else np.zeros(0, np.float32)
        if bias.size:
            arrays["bias"] = bias
        inputs = {role: self.file.add(f"{name}.{role}", array) for role, array in arrays.items()}
        self.matrices[name] = StoredMatrix(
            packed.format, packed.block_size, packed.in_features, packed.out_features, inputs
        )
        self.progress(packed.in_features * packed.out_features)
