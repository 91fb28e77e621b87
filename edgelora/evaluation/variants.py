"""The ways in which a base and its adapters can be shipped, and a linear's weight in each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, Branch, Prefix, SoftPrompt
from edgelora.binding import as_nf4, merged, merged_bias, merged_codes
from edgelora.calibration import Beside, Past, Weight
from edgelora.checkpoint import Checkpoint
from edgelora.evaluation.survival import Survival, survival
from edgelora.layout import EMBEDDING, Linear, weight_name
from edgelora.merge import scaled
from edgelora.plan import Plan
from edgelora.quantize import Int4Matrix, Matrix, dequantize
from edgelora.rounding import Rounding

Float32 = NDArray[np.float32]
Kind = Literal["float", "side", "merged", "merged_nf4"]
NO_BRANCHES: Mapping[str, Branch] = {}


@dataclass(frozen=True)
class Variant:
    """adapter: None for the base alone, of which there are only the kinds float and side.

    float: nothing rounded, what the others are compared with. side: the rounded base, the adapter
    beside it. merged: the adapter in the float base, then rounded. merged_nf4: the same with the
    base as NF4 makes it, which is what a QLoRA adapter saw in training.
    """

    adapter: str | None
    kind: Kind


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the base, the plan, and the adapters as trained and as the file has them
    (magnitudes bound to the base, values in the file's dtype).
    """

    checkpoint: Checkpoint
    plan: Plan
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    bound: Mapping[str, Adapter] = field(default_factory=dict)

    def branch(self, adapter: str | None, target: str, *, bound: bool = False) -> Branch | None:
        if adapter is None:
            return None
        return (self.bound if bound else self.adapters)[adapter].branches.get(target)

    def prefix(self, variant: Variant) -> Prefix | None:
        """What the text stands behind."""
        if variant.adapter is None:
            return None
        source = self.adapters if variant.kind == "float" else self.bound
        found = source[variant.adapter].prefix
        assert not isinstance(found, SoftPrompt), "bound where the base was read"
        return found

    def past(self, variant: Variant) -> Callable[[int], Past | None]:
        """The same as a Stream takes it."""
        prefix = self.prefix(variant)
        return lambda layer: None if prefix is None else prefix.layer(layer)

    @property
    def positions_before(self) -> int:
        """Of the longest prefix."""
        found = (each.prefix for each in self.bound.values())
        return max((prefix.positions for prefix in found if prefix), default=0)

    @property
    def base_is_coded(self) -> bool:
        """Then the base is what a QLoRA adapter saw, and merged_nf4 would be merged."""
        names = self.checkpoint.names()
        return any(self.checkpoint.stored_as(name) in ("nf4", "fp4") for name in names)

    def variants(self) -> list[Variant]:
        """Grouped by adapter, each group led by what it is compared with. Activated LoRA is never
        merged; it is measured as if invoked before the text.
        """
        found = [Variant(None, "float"), Variant(None, "side")]
        for name, adapter in self.adapters.items():
            found += [Variant(name, kind) for kind in ("float", "side")]
            if adapter.prefix is None and not adapter.invocation:
                found += [Variant(name, kind) for kind in self._merged_kinds]
        return found

    @property
    def _merged_kinds(self) -> tuple[Kind, ...]:
        return ("merged",) if self.base_is_coded else ("merged", "merged_nf4")

    def exported(self) -> frozenset[Variant]:
        """Those that a bundle of this plan holds."""
        if self.plan.mode == "merge":
            kind: Kind = "merged_nf4" if self.plan.merge_base == "nf4" else "merged"
            return frozenset(Variant(name, kind) for name in self.adapters)
        return frozenset(Variant(name, "side") for name in (None, *self.adapters))


class LinearWeights:
    """One linear's weight [out_features, in_features] in every variant, rounded plainly; of side
    branches beside it.

    What several variants need is kept, of the adapters' only the last one's: ask for the variants
    of an adapter one after another.
    """

    def __init__(self, subject: Subject, linear: Linear) -> None:
        self.subject, self.linear = subject, linear
        self._merged: dict[str, Float32] = {}
        self._rounded_variants: dict[Variant, Matrix] = {}

    def weight(self, variant: Variant, stored: Float32 | None = None) -> Weight:
        """`stored`: what a bundle holds in place of a plainly rounded weight.

        Raises EdgeLoraError.
        """
        match variant.kind:
            case "float":
                return self._float(variant.adapter)
            case "side":
                base = dequantize(self._rounded) if stored is None else stored
                return self._beside(base, variant.adapter)
        return dequantize(self._rounded_merged(variant)) if stored is None else stored

    def bias(self, variant: Variant) -> Float32:
        """float32 [out_features], or [0] for none."""
        target, bias = self.linear.target, self._bias
        branch = self._branch(variant.adapter, bound=variant.kind == "side")
        return bias if branch is None else merged_bias(target, bias, branch)

    def survival(self, variant: Variant) -> Survival | None:
        """Of the adapter's delta; None where it has none or nothing is merged."""
        branch = self._branch(variant.adapter)
        if branch is None or not branch.changes_weight:
            return None
        if variant.kind not in ("merged", "merged_nf4"):
            return None
        delta = self._float(variant.adapter) - self._source
        base = self._unmerged(variant, branch)
        return survival(base, self._rounded_merged(variant), delta)

    def _unmerged(self, variant: Variant, branch: Branch) -> Matrix:
        """What merging changed: codes that are kept, or that were rounded anew without it."""
        if variant.kind == "merged_nf4":
            return self._rounded_nf4
        if self._rounding.keeps_codes(self.linear.target, branch):
            return self._rounding.matrix(self.linear.target, self._source)
        return self._rounded_anew

    def _branch(self, adapter: str | None, *, bound: bool = False) -> Branch | None:
        return self.subject.branch(adapter, self.linear.target, bound=bound)

    @cached_property
    def _source(self) -> Float32:
        checkpoint = self.subject.checkpoint
        return checkpoint.read(weight_name(checkpoint.config, self.linear.target))

    @cached_property
    def _bias(self) -> Float32:
        if not self.linear.bias:
            return np.zeros(0, np.float32)
        return self.subject.checkpoint.read(f"{self.linear.target}.bias")

    def _float(self, adapter: str | None) -> Float32:
        branch = self._branch(adapter)
        if adapter is None or branch is None:
            return self._source
        if adapter not in self._merged:
            self._merged = {adapter: merged(self.linear.target, self._source, branch)}
        return self._merged[adapter]

    def _beside(self, base: Float32, adapter: str | None) -> Weight:
        branch = self._branch(adapter, bound=True)
        if branch is None:
            return base
        if branch.input_factor is not None:
            base = scaled(base, None, branch.input_factor)
        lora_a, lora_b = (each.astype(np.float32) for each in (branch.lora_a, branch.lora_b))
        return Beside(base, branch.row_factor, lora_a, lora_b * np.float32(branch.scaling))

    @cached_property
    def _rounding(self) -> Rounding:
        return Rounding(self.subject.checkpoint, self.subject.plan, NO_BRANCHES)

    @cached_property
    def _rounded(self) -> Matrix:
        """The base's own codes where the plan keeps them."""
        return self._rounding.matrix(self._stored_as, self._source)

    @cached_property
    def _rounded_anew(self) -> Matrix:
        return self._rounding.anew(self.linear.target, self._source)

    @cached_property
    def _nf4(self) -> Float32:
        return as_nf4(self.linear.target, self._source)

    @cached_property
    def _rounded_nf4(self) -> Matrix:
        return self._rounding.anew(self.linear.target, self._nf4)

    def _rounded_merged(self, variant: Variant) -> Matrix:
        """The last one is kept: both weight and survival need it."""
        if variant not in self._rounded_variants:
            self._rounded_variants = {variant: self._round_merged(variant)}
        return self._rounded_variants[variant]

    def _round_merged(self, variant: Variant) -> Matrix:
        branch = self._branch(variant.adapter)
        if branch is None:
            return self._rounded if variant.kind == "merged" else self._rounded_nf4
        if branch.group > 1 and (matrix := self._kept(variant, branch)):
            return merged_codes(self.linear.target, matrix, branch)
        values = self._float(variant.adapter)
        if variant.kind == "merged_nf4":
            values = merged(self.linear.target, self._nf4, branch)
        return self._rounding.anew(self.linear.target, values)

    def _kept(self, variant: Variant, branch: Branch) -> Int4Matrix | None:
        """Codes whose offsets take up a QA-LoRA delta."""
        matrix = self._unmerged(variant, branch)
        if not isinstance(matrix, Int4Matrix) or branch.group % matrix.block_size:
            return None
        nf4 = variant.kind == "merged_nf4"
        return matrix if nf4 or self._rounding.keeps_codes(self.linear.target, branch) else None

    @property
    def _stored_as(self) -> str:
        """A tied lm_head of the embedding's format is the embedding's matrix."""
        shared = self.subject.plan.could_share_head(self.subject.checkpoint.config)
        return EMBEDDING if self.linear.target == "lm_head" and shared else self.linear.target
