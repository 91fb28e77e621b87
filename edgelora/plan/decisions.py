"""The frozen decisions of one export, and what follows from them for one matrix."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgelora.layout import EMBEDDING
from edgelora.plan.inventory import Inventory

EMBEDDING_BLOCK = 32  # of an embedding and lm_head in int8
CARRIED_BLOCK = 32  # of GGUF's codes
OUTER = (EMBEDDING, "lm_head")  # matrices in the embedding format, not in that of the linears


@dataclass(frozen=True)
class Plan:
    """The frozen decisions of one export. `reasons`: every other field → why.

    carry, carry_embedding: which codes of the base are kept as they are, for the linears and for
    the embedding and lm_head: "none" of int4, those of the "same" format, or "any".
    """

    mode: str
    format: str  # of the linears that are not carried
    block_size: int  # of int4 that is not carried; 64 for nf4, 0 for float
    zero_points: bool
    embedding_format: str  # "int8", "int4" or "float", for the embedding and lm_head
    carry: str
    carry_embedding: str
    flavor: str
    context_length: int
    device: str | None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def carries(self, stored: str | None, target: str) -> bool:
        """Whether `target`, which the base holds as `stored`, is kept code for code."""
        outer = target in OUTER
        wanted = self.embedding_format if outer else self.format
        carry = self.carry_embedding if outer else self.carry
        if stored is None or wanted == "float":
            return False
        if stored == wanted:
            return stored != "int4" or carry != "none"
        if self.flavor == "ort" and outer:
            return False  # GatherBlockQuantized has no offsets
        return carry == "any" and {stored, wanted} <= {"int4", "int8"}


@dataclass(frozen=True)
class Kind:
    """How a matrix is written."""

    format: str
    block_size: int
    extra: str = ""  # "zero_points" or "offsets" of int4


def is_carried(plan: Plan, base: Inventory, target: str) -> bool:
    """Whether the bundle holds the base's own codes of this matrix."""
    merged = plan.mode == "merge" and target in base.changed
    return not merged and plan.carries(base.stored.get(target), target)


def kind_of(plan: Plan, base: Inventory, target: str) -> Kind:
    """How the bundle holds this matrix."""
    if is_carried(plan, base, target):
        stored = base.stored[target]
        if stored == "nf4":
            return Kind("nf4", 64)
        return Kind(stored, CARRIED_BLOCK, "offsets" if target in base.offsets else "")
    wanted = plan.embedding_format if target in OUTER else plan.format
    match wanted:
        case "float":
            return Kind("float", 0)
        case "nf4":
            return Kind("nf4", 64)
        case "int8":
            return Kind("int8", EMBEDDING_BLOCK)
    return Kind("int4", plan.block_size, "zero_points" if plan.zero_points else "")
