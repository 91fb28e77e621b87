"""Why each decision of a plan is as it is: one line for every field."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgelora.config import ModelConfig
from edgelora.device import DeviceProfile, predict_decode_tokens_per_second
from edgelora.layout import EMBEDDING, targets
from edgelora.plan.decisions import (
    CARRIED_BLOCK,
    OUTER,
    Plan,
    is_carried,
    is_merged,
    kind_of,
    moves_offsets,
    outer_matrices,
    shares_head,
)
from edgelora.plan.inventory import Inventory
from edgelora.plan.memory import plan_sizes
from edgelora.plan.options import DEFAULT_CONTEXT, ExportOptions


@dataclass(frozen=True)
class Facts:
    """What a plan was made from."""

    config: ModelConfig
    plan: Plan
    options: ExportOptions
    base: Inventory
    profile: DeviceProfile | None
    notes: Mapping[str, str]  # decision → how the device changed it
    no_nf4: str | None  # why nf4 was impossible

    @property
    def linears(self) -> list[str]:
        return [target for target in targets(self.config) if target not in OUTER]

    @property
    def outer(self) -> list[str]:
        """Embedding, and lm_head where it has a matrix of its own."""
        return outer_matrices(self.config, self.plan, self.base)


def all_reasons(facts: Facts) -> dict[str, str]:
    """Field of Plan → why."""
    plan = facts.plan
    return {
        "mode": _mode(plan, facts),
        "format": _format(plan, facts),
        "block_size": _block_size(plan, facts),
        "zero_points": _zero_points(facts.options),
        "embedding_format": _embedding_format(plan, facts),
        "head_format": _head_format(plan, facts),
        "quality": _quality(plan, facts),
        "calibration": _calibration(plan),
        "carry": _carry(plan, facts, facts.linears, "carry"),
        "carry_embedding": _carry(plan, facts, facts.outer, "carry_embedding"),
        "flavor": _FLAVORS[plan.flavor],
        "context_length": _context_length(plan, facts),
        "device": _device(plan, facts),
        "int8": _int8(plan, facts),
        "merge_base": _merge_base(plan, facts),
    }


_FLAVORS = {
    "edgelora": "our own operators: adapters chosen row by row, nf4, base codes used in place",
    "ort": "asked for: ONNX Runtime's own operators, one adapter at a time",
}


def _merge_base(plan: Plan, facts: Facts) -> str:
    if plan.merge_base is None:
        return "nothing is merged"
    if coded := {"nf4", "fp4"} & {*facts.base.stored.values()}:
        return f"the base is in {' and '.join(sorted(coded))}: what a QLoRA adapter saw in training"
    if plan.merge_base == "nf4":
        return "asked for: the base as NF4 rounds it, which a QLoRA adapter saw in training"
    return "the base as it is given"


def _mode(plan: Plan, facts: Facts) -> str:
    if plan.mode == "merge":
        return (
            f"asked for: W0 + scaling·B·A in float32, then quantized once{_of_groups(plan, facts)}"
        )
    if facts.base.adapters:
        return "adapters stay apart: the base is shared and they can be switched"
    if plan.flavor == "ort":
        return "no adapter is given; this flavor takes adapters at export only"
    return "no adapter is given; they can be added later with `edgelora add-adapter`"


def _of_groups(plan: Plan, facts: Facts) -> str:
    """What becomes of QA-LoRA's deltas."""
    groups = facts.base.groups
    moved = [target for target in groups if moves_offsets(plan, facts.base, target)]
    if len(moved) == len(groups):
        return f"; of {len(moved)} linears no code, only float32 offsets (QA-LoRA)" if moved else ""
    sizes = ", ".join(map(str, sorted({*groups.values()})))
    return (
        f"; only offsets of {len(moved)} of QA-LoRA's {len(groups)} linears: the others are not "
        f"int4 in blocks that divide its groups of {sizes}"
    )


def _format(plan: Plan, facts: Facts) -> str:
    base, held = facts.base, Counter(facts.base.stored[t] for t in _held(facts, facts.linears))
    if facts.options.format is not None:
        return "asked for"
    coded = {kind: held[kind] for kind in ("nf4", "fp4") if held[kind]}
    names = ", ".join(f"{count} {kind.upper()}" for kind, count in coded.items())
    if plan.format in ("nf4", "fp4"):
        rest = len(facts.linears) - sum(coded.values())
        others = f"; the other {rest} are rounded to NF4" if rest else ""
        return f"linears of the base are in codes of ours already: {names}{others}"
    if coded:
        return f"4 bits; matrices of the base are dequantized ({names}): {facts.no_nf4}"
    if all(is_carried(plan, base, target) for target in facts.linears):
        return f"all linears of the base are {plan.format} already"
    kernels = ""
    if facts.profile is not None:
        kernels = f"; on {facts.profile.isa} too, its kernels look up no table as nf4's do"
    return f"the default: 4 bits{kernels}{_foreign(base)}"


def _foreign(base: Inventory) -> str:
    if not base.foreign:
        return ""
    listed = ", ".join(f"{count} in {why}" for why, count in sorted(base.foreign.items()))
    why = "our nf4 and fp4 cannot hold them"
    return f"; the base's 4-bit matrices are dequantized, since {why}: {listed}"


def _block_size(plan: Plan, facts: Facts) -> str:
    kinds = {kind_of(plan, facts.base, target) for target in facts.linears}
    if plan.format == "float":
        return "float has no blocks"
    if plan.format in ("nf4", "fp4"):
        return "bitsandbytes' NF4 and FP4 have blocks of 64"
    if "block_size" in facts.notes:
        return facts.notes["block_size"]
    if facts.options.block_size is not None:
        return "asked for"
    carried = all(is_carried(plan, facts.base, target) for target in facts.linears)
    if carried and {kind.block_size for kind in kinds} == {CARRIED_BLOCK}:
        return "the blocks of the base's own codes"
    return "the default: the smallest blocks lose least"


def _zero_points(options: ExportOptions) -> str:
    if options.zero_points:
        return "asked for"
    return "not asked for: what is rounded to int4 is symmetric around zero"


def _embedding_format(plan: Plan, facts: Facts) -> str:
    if plan.embedding_format == "float":
        return "as the linears"
    if facts.options.embedding_format is not None:
        return "asked for"
    if plan.quality != "fast" and "embedding_format" not in facts.notes:
        return _beside_compensated_head(plan, facts)
    kept = {t: facts.base.stored[t] for t in facts.outer if is_carried(plan, facts.base, t)}
    if len(kept) == len(facts.outer) and "embedding_format" not in facts.notes:
        return "as the base holds it"
    why = facts.notes.get(
        "embedding_format",
        "plainly rounded int4 saves 14 of 90 MB on SmolLM2 and raises its mean KL from 0.29 to "
        "0.38 (tests/benchmarks/results/quality.csv)",
    )
    exceptions = [f"{t} keeps its {kind}" for t, kind in kept.items()]
    return "; ".join([why, *exceptions])


def _beside_compensated_head(plan: Plan, facts: Facts) -> str:
    if is_carried(plan, facts.base, EMBEDDING):
        return "as the base holds it"
    if shares_head(facts.config, plan, facts.base):
        return (
            "lm_head's matrix: one of its own in int8 adds 30 MB to 76 and lowers the mean KL of "
            "SmolLM2 by 0.01"
        )
    return "a lookup's error cannot be compensated, and only one row a token is read"


def _head_format(plan: Plan, facts: Facts) -> str:
    if plan.head_format == "float":
        return "as the linears"
    if facts.options.head_format is not None:
        return "asked for"
    if "embedding_format" in facts.notes:
        return "as the embedding"
    if is_carried(plan, facts.base, "lm_head"):
        return "as the base holds it"
    if plan.quality == "fast" or facts.options.embedding_format is not None:
        return "as the embedding"
    if is_carried(plan, facts.base, EMBEDDING) and shares_head(facts.config, plan, facts.base):
        return "as the embedding, whose codes are the base's own"
    return (
        "all of it is read for each token, and compensated int4 loses little: int8 lowers the mean "
        "KL of SmolLM2 by 0.015 and reads 14 MB more (tests/benchmarks/results/quality.csv)"
    )


def _quality(plan: Plan, facts: Facts) -> str:
    sizes = plan_sizes(facts.config, plan, facts.base)
    held = f"{sizes.weights / 1e6:.1f} MB of weights, {sizes.streamed / 1e6:.1f} MB read a token"
    if plan.quality == "fast":
        return f"the default: each weight is rounded for itself, no text is read; {held}"
    rounded = [
        target
        for target in [*facts.linears, *facts.outer]
        if kind_of(plan, facts.base, target).format == "int4"
        and not is_carried(plan, facts.base, target)
    ]
    alone = EMBEDDING in rounded and not shares_head(facts.config, plan, facts.base)
    count = len(rounded) - alone
    left = ", the embedding is rounded plainly" if alone else ""
    what = f"in {count} matrices the errors of weights make up for each other{left}"
    return f"asked for: {what}; {held}"


def _int8(plan: Plan, facts: Facts) -> str:
    if not plan.int8:
        return "only quality best has linears in 8 bits among those in 4"
    anew = [target for target in plan.int8 if not is_carried(plan, facts.base, target)]
    kinds = Counter(target.rpartition(".")[2] for target in anew)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"what 4 bits hurt most: {counts}" if counts else "the base's own codes are kept"


def _calibration(plan: Plan) -> str:
    if plan.calibration is None:
        return "quality fast needs none"
    return "the inputs of each linear on this text say which errors matter"


def _carry(plan: Plan, facts: Facts, names: Iterable[str], decision: str) -> str:
    """What becomes of the codes of these matrices."""
    base, held = facts.base, _held(facts, names)
    kept = [t for t in held if is_carried(plan, base, t)]
    merged = [t for t in held if is_merged(plan, base, t)]
    lost = [t for t in held if t not in kept and t not in merged]
    parts = []
    if kept:
        parts.append(f"the base's own codes are kept, not rounded anew ({_counts(base, kept)})")
    if lost:
        why = _why_lost(plan, facts, decision)
        parts.append(f"the base's codes ({_counts(base, lost)}) are dequantized: {why}")
    if merged:
        some = f"{len(merged)} that the adapter changes ({_counts(base, merged)})"
        parts.append(f"{some} are dequantized, merged and rounded anew")
    return "; ".join(parts) or "the base has no codes here that could be kept"


def _why_lost(plan: Plan, facts: Facts, decision: str) -> str:
    options = facts.options
    if decision in facts.notes:
        return facts.notes[decision]
    if plan.format == "float":
        return "float was asked for"
    if options.zero_points:
        return "zero points were asked for"
    if options.block_size not in (None, CARRIED_BLOCK):
        return f"blocks of {options.block_size} were asked for"
    outer = decision == "carry_embedding"
    asked = options.embedding_format if outer else options.format
    if asked:
        return f"{asked} was asked for"
    if outer and plan.flavor == "ort":
        return "ONNX Runtime's embedding is int8"
    if outer:
        return f"{plan.embedding_format} cannot hold them"
    return facts.no_nf4 or f"{plan.format} cannot hold them"


def _held(facts: Facts, names: Iterable[str]) -> list[str]:
    return [target for target in names if target in facts.base.stored]


def _counts(base: Inventory, names: Iterable[str]) -> str:
    counts = Counter(base.stored[target] for target in names)
    return ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items()))


def _context_length(plan: Plan, facts: Facts) -> str:
    limit = facts.config.max_position_embeddings
    if facts.options.context_length is not None:
        return "asked for"
    if facts.profile is not None and plan.context_length < min(limit, DEFAULT_CONTEXT):
        return f"what fits the memory of {facts.profile.id}"
    if plan.context_length == limit:
        return "the base's"
    return f"the base's {limit}, by default at most {DEFAULT_CONTEXT}"


def _device(plan: Plan, facts: Facts) -> str:
    if facts.profile is None:
        return "none is given: no decision is shaped for one"
    sizes = plan_sizes(facts.config, plan, facts.base)
    rate = predict_decode_tokens_per_second(facts.profile, sizes.streamed + sizes.largest_adapter)
    adapters = f" and {sizes.adapters / 1e6:.1f} MB of adapters" if sizes.adapters else ""
    active = " with the largest adapter active" if sizes.adapters else ""
    return (
        f"{sizes.weights / 1e6:.0f} MB of weights{adapters} of "
        f"{facts.profile.usable_memory_bytes / 1e6:.0f} MB usable; memory bandwidth allows at "
        f"most {rate:.0f} tokens/s{active}"
    )
