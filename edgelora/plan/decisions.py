"""The frozen decisions of one export, and what follows from them for one matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgelora.config import ModelConfig
from edgelora.layout import EMBEDDING, layer_of, projections
from edgelora.plan.inventory import Inventory

EMBEDDING_BLOCK = 32  # of an embedding and lm_head in int8
INT8_BLOCK = 128  # of a linear in int8
# int8 in quality best, what 4 bits hurt most: in which parts of the layers, first to last.
SENSITIVE: Mapping[str, tuple[tuple[float, float], ...]] = {
    "v_proj": ((0, 1),),
    "down_proj": ((0, 0.3), (0.55, 1)),
    "up_proj": ((0, 0.125), (0.93, 1)),
    "gate_proj": ((0, 0.0625),),
}
CARRIED_BLOCK = 32  # of GGUF's codes
# Codes of one kind are kept where the other is wanted, unless that was asked for.
_ALIKE = ({"int4", "int8"}, {"nf4", "fp4"})
OUTER = (EMBEDDING, "lm_head")  # matrices in the embedding format, not in that of the linears


@dataclass(frozen=True)
class Plan:
    """The frozen decisions of one export. `reasons`: every other field → why.

    carry, carry_embedding: which codes of the base are kept as they are, for the linears and for
    the embedding and lm_head: "none" of int4, those of the "same" format, or "any".
    """

    mode: str
    format: str  # of the linears that are not carried; "fp4": all are carried so
    block_size: int  # of int4 that is not carried; 64 for nf4 and fp4, 0 for float
    zero_points: bool
    embedding_format: str  # "int8", "int4" or "float"
    head_format: str  # likewise; a tied lm_head of the embedding's format is the same matrix
    # "fast": each weight is rounded for itself; "balanced": errors are compensated; "best": they
    # are, on twice the text, and some linears are int8
    quality: str
    calibration: str | None  # what text the rounding was fitted to
    carry: str
    carry_embedding: str
    flavor: str
    context_length: int
    device: str | None
    int8: tuple[str, ...] = ()  # linears that have 8 bits where they are not carried
    merge_base: str | None = None  # "float", "nf4": rounded so before; None in mode side
    reasons: Mapping[str, str] = field(default_factory=dict)

    def wanted(self, target: str) -> str:
        """The format of `target` where it is not carried."""
        outer = {EMBEDDING: self.embedding_format, "lm_head": self.head_format}
        if target in self.int8:
            return "int8"
        return outer.get(target, "nf4" if self.format == "fp4" else self.format)

    def could_share_head(self, config: ModelConfig) -> bool:
        """Whether lm_head is the embedding's matrix unless an adapter is merged into it."""
        return config.tie_word_embeddings and self.head_format == self.embedding_format

    def carries(self, stored: str | None, target: str) -> bool:
        """Whether `target`, which the base holds as `stored`, is kept code for code."""
        outer, wanted = target in OUTER, self.wanted(target)
        carry = self.carry_embedding if outer else self.carry
        if stored is None or wanted == "float" or (self.merge_base == "nf4" and not outer):
            return False
        if stored == wanted:
            return stored != "int4" or carry != "none"
        if self.flavor == "ort" and outer:
            return False  # GatherBlockQuantized has no offsets
        return carry == "any" and any({stored, wanted} <= kinds for kinds in _ALIKE)

    def keeps_codes(self, stored: str | None, target: str, group: int) -> bool:
        """Whether merging a delta that is one number for each `group` of inputs (QA-LoRA) changes
        no code of `target`, which the base holds as `stored`: the offsets of its blocks take it up.
        """
        carried = self.carries(stored, target)
        block_size = CARRIED_BLOCK if carried else self.block_size
        return (stored if carried else self.wanted(target)) == "int4" and group % block_size == 0


def sensitive(config: ModelConfig) -> tuple[str, ...]:
    """The SENSITIVE linears of a decoder."""
    layers = config.num_hidden_layers
    return tuple(
        linear.target
        for projection in projections(config)
        for linear in projection.linears
        if any(
            first <= layer_of(linear.target) / layers < end
            for first, end in SENSITIVE.get(linear.target.rpartition(".")[2], ())
        )
    )


def int8_block(target: str) -> int:
    """Block size where the plan wants int8."""
    return EMBEDDING_BLOCK if target in OUTER else INT8_BLOCK


@dataclass(frozen=True)
class Kind:
    """How a matrix is written."""

    format: str
    block_size: int
    # of int4 "zero_points", "offsets", "moved": offsets in float32; of nf4, fp4 "plain": absmax so
    extra: str = ""


def is_carried(plan: Plan, base: Inventory, target: str) -> bool:
    """Whether the bundle holds the base's own codes of this matrix."""
    return not is_merged(plan, base, target) and plan.carries(base.stored.get(target), target)


def is_merged(plan: Plan, base: Inventory, target: str) -> bool:
    """Whether an adapter changes its codes."""
    changed = plan.mode == "merge" and target in base.changed
    return changed and not moves_offsets(plan, base, target)


def moves_offsets(plan: Plan, base: Inventory, target: str) -> bool:
    """Whether an adapter changes its offsets and no code."""
    if plan.mode != "merge" or target not in base.groups:
        return False
    return plan.keeps_codes(base.stored.get(target), target, base.groups[target])


def shares_head(config: ModelConfig, plan: Plan, base: Inventory) -> bool:
    """Whether lm_head is the embedding's matrix."""
    merged = plan.mode == "merge" and "lm_head" in base.changed
    return plan.could_share_head(config) and not merged


def outer_matrices(config: ModelConfig, plan: Plan, base: Inventory) -> list[str]:
    """The embedding, and lm_head where it has a matrix of its own."""
    return [EMBEDDING] if shares_head(config, plan, base) else list(OUTER)


def kind_of(plan: Plan, base: Inventory, target: str) -> Kind:
    """How the bundle holds this matrix."""
    kind = _kind_of_codes(plan, base, target)
    return replace(kind, extra="moved") if moves_offsets(plan, base, target) else kind


def _kind_of_codes(plan: Plan, base: Inventory, target: str) -> Kind:
    if is_carried(plan, base, target):
        stored = base.stored[target]
        if stored in ("nf4", "fp4"):
            return Kind(stored, 64, "plain" if target in base.plain else "")
        return Kind(stored, CARRIED_BLOCK, "offsets" if target in base.offsets else "")
    match plan.wanted(target):
        case "float":
            return Kind("float", 0)
        case "nf4":
            return Kind("nf4", 64)
        case "int8":
            return Kind("int8", int8_block(target))
    return Kind("int4", plan.block_size, "zero_points" if plan.zero_points else "")
