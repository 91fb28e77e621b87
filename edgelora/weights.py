"""One weight's way: read, merged, quantized, packed, appended to the weight file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Branch
from edgelora.binding import as_nf4, merged, merged_bias, merged_codes
from edgelora.bundle import WeightFile
from edgelora.changed_base import source_of
from edgelora.checkpoint import Checkpoint
from edgelora.checkpoint.fingerprint import FingerprintBuilder
from edgelora.errors import EdgeLoraError
from edgelora.graph import COS, SIN, StoredMatrix, rotary_tables
from edgelora.layout import EMBEDDING, Linear, Projection, head, norms, projections, weight_name
from edgelora.plan import Plan
from edgelora.quantize import (
    Int4Matrix,
    Matrix,
    NBitsLinear,
    PackedLinear,
    concatenate,
    pack,
    same_kind,
    to_nbits,
    to_rows,
)
from edgelora.rounding import Inputs, Rounding

Progress = Callable[[int], None]  # called with the number of weights just written


@dataclass
class WeightWriter:
    """Streams a base's tensors, one projection at a time, into a bundle's weight file."""

    checkpoint: Checkpoint
    plan: Plan
    branches: Mapping[str, Branch]  # to be merged, by target
    rounding: Rounding
    file: WeightFile
    fingerprint: FingerprintBuilder
    progress: Progress
    matrices: dict[str, StoredMatrix] = field(default_factory=dict)
    embedding: Matrix | None = None
    unpacked: dict[str, NDArray[Any]] = field(default_factory=dict)  # written last, by name

    def write(self) -> None:
        """Everything the graph names: embedding, linears, biases, norms, rotary tables."""
        config = self.checkpoint.config
        self._write_embedding()
        for projection in projections(config):
            if projection.name != "lm_head":
                self._write_projection(projection)
        self._write_head(head(config))
        for norm in norms(config):
            self._store_vector(f"{norm}.weight")
        cos, sin = rotary_tables(config, self.plan.context_length)
        self.file.add(COS, cos)
        self.file.add(SIN, sin)
        for name, array in self.unpacked.items():
            self.file.add(name, array)

    def _store_vector(self, name: str) -> None:
        values = self._read(name)
        self.file.add(name, values)
        self.progress(values.size)

    def _read(self, name: str) -> NDArray[np.float32]:
        """The values; those of the source are hashed on the way."""
        values = self.checkpoint.read(name)
        if not np.isfinite(values).all():
            raise EdgeLoraError(f"{self.checkpoint.path}: {name} holds NaN or Inf: not usable")
        source = source_of(self.checkpoint)
        if source is self.checkpoint:
            self.fingerprint.add(name, values)
        elif name in source.names():
            self.fingerprint.add(name, source.read(name))
        return values

    def _write_embedding(self) -> None:
        """Kept until the head is written, which may be tied to it.

        Where the head's inputs have a say in it, it is rounded and stored with the head, and the
        calibration text starts from its values.
        """
        values = self._read(f"{EMBEDDING}.weight")
        if self._shares_head and self.rounding.compensates(EMBEDDING):
            self.rounding.begin(values)
            return
        self.embedding = self.rounding.matrix(EMBEDDING, values)
        self.rounding.begin(values, self.embedding)
        self._store_embedding(self.embedding)

    def _store_embedding(self, matrix: Matrix) -> None:
        self._store(EMBEDDING, pack(matrix) if self._own else to_rows(matrix))

    @property
    def _shares_head(self) -> bool:
        shared = self.plan.could_share_head(self.checkpoint.config)
        return shared and "lm_head" not in self.branches

    def _write_head(self, projection: Projection) -> None:
        if self._shares_head:
            self._write_shared_head(projection)
            return
        (linear,) = projection.linears
        tied = self.checkpoint.config.tie_word_embeddings
        name = weight_name(self.checkpoint.config, linear.target)
        values = self.checkpoint.read(name) if tied else self._read(name)
        inputs = self.rounding.inputs_of(projection.name, [linear.target])
        _, matrix = self._rounded(linear, values, inputs)
        self._store(projection.name, self._laid_out([matrix]), self._bias(linear))

    def _write_shared_head(self, projection: Projection) -> None:
        if self.embedding is None:
            inputs = self.rounding.inputs_of(projection.name, [EMBEDDING])
            values = self.checkpoint.read(f"{EMBEDDING}.weight")
            self.embedding = self.rounding.matrix(EMBEDDING, values, inputs)
            self._store_embedding(self.embedding)
        if self._own:
            self.matrices[projection.name] = self.matrices[EMBEDDING]
        else:
            self._store(projection.name, to_nbits(self.embedding))

    def _write_projection(self, projection: Projection) -> None:
        """In one packed matrix where the parts allow it, else each linear for itself."""
        linears = projection.linears
        inputs = self.rounding.inputs_of(projection.name, [x.target for x in linears])
        pairs = [self._rounded(x, self._read(x.weight), inputs) for x in linears]
        values, parts = [value for value, _ in pairs], [part for _, part in pairs]
        biases = [self._bias(linear) for linear in linears]
        self.rounding.pass_on(values, parts, biases)
        if len(parts) > 1 and self._own and projection.packable and same_kind(parts):
            self._store(projection.name, self._laid_out(parts), _joined(biases, linears))
            return
        for linear, part, bias in zip(linears, parts, biases, strict=True):
            self._store(linear.target, self._laid_out([part]), bias)

    def _rounded(
        self, linear: Linear, values: NDArray[np.float32], inputs: Inputs | None
    ) -> tuple[NDArray[np.float32], Matrix]:
        """The merged weight and what it becomes: rounded after merging; or before, and the branch
        merged into the offsets.
        """
        target, branch = linear.target, self.branches.get(linear.target)
        if self.plan.merge_base == "nf4":
            values = as_nf4(target, values)
        wanted = values if branch is None else merged(target, values, branch)
        if branch is None or target in self.rounding.changed or not branch.changes_weight:
            return wanted, self.rounding.matrix(target, wanted, inputs)
        matrix = self.rounding.matrix(target, values, inputs, whole=wanted)
        assert isinstance(matrix, Int4Matrix)
        return wanted, merged_codes(target, matrix, branch)

    def _bias(self, linear: Linear) -> NDArray[np.float32]:
        """float32 [out_features], or [0] for none."""
        values = self._read(f"{linear.target}.bias") if linear.bias else np.zeros(0, np.float32)
        branch = self.branches.get(linear.target)
        return values if branch is None else merged_bias(linear.target, values, branch)

    @property
    def _own(self) -> bool:
        return self.plan.flavor == "edgelora"

    def _laid_out(self, parts: Sequence[Matrix]) -> PackedLinear | NBitsLinear:
        """In panels for our operators, or as ONNX Runtime's own want them."""
        if self._own:
            return pack(concatenate(parts))
        (part,) = parts
        return to_nbits(part)

    def _store(
        self, name: str, packed: PackedLinear | NBitsLinear, bias: NDArray[np.float32] | None = None
    ) -> None:
        arrays = dict(packed.arrays)
        if bias is not None and bias.size:
            arrays["bias"] = bias
        self.matrices[name] = StoredMatrix(
            packed.kind,
            packed.block_size,
            packed.in_features,
            packed.out_features,
            {
                role: self._add(f"{name}.{role}", array, last=role in packed.unpacked)
                for role, array in arrays.items()
            },
        )
        self.progress(packed.in_features * packed.out_features)

    def _add(self, name: str, array: NDArray[Any], *, last: bool) -> str:
        """What the runtime needs only to unpack it lies together, in pages that it gives back."""
        if not last:
            return self.file.add(name, array)
        self.unpacked[name] = array
        return name


def _joined(
    biases: Sequence[NDArray[np.float32]], linears: Sequence[Linear]
) -> NDArray[np.float32]:
    """One bias for all, zero where one has none; [0] if none has one."""
    if not any(bias.size for bias in biases):
        return biases[0]
    rows = [linear.out_features for linear in linears]
    pairs = zip(biases, rows, strict=True)
    return np.concatenate([bias if bias.size else np.zeros(n, np.float32) for bias, n in pairs])
