"""Options, base and device → Plan."""

from collections import Counter
from dataclasses import replace

from edgelora.config import ModelConfig
from edgelora.device import DeviceProfile
from edgelora.errors import EdgeLoraError
from edgelora.layout import EMBEDDING, targets
from edgelora.plan.decisions import OUTER, Plan, kind_of
from edgelora.plan.fitting import CONTEXT_STEP, Fitted, Fitting
from edgelora.plan.inventory import Inventory
from edgelora.plan.options import BLOCK_SIZES, DEFAULT_CONTEXT, ExportOptions
from edgelora.plan.reasons import Facts, all_reasons

_NF4_STEP = 32  # in_features of an nf4 linear are a multiple of it


def make_plan(
    config: ModelConfig,
    options: ExportOptions,
    base: Inventory | None = None,
    *,
    profile: DeviceProfile | None = None,
) -> Plan:
    """Raises EdgeLoraError when the model does not fit the device, the context is longer than the
    base's, or nf4 cannot hold its linears.
    """
    base = base or Inventory()
    draft = _draft(config, options, base)
    fitted, room = Fitted(draft), None
    if profile is not None:
        fitting = Fitting(config, options, base, profile)
        fitted = fitting.fit(draft)
        room = fitting.room(fitted.plan)
    plan = replace(fitted.plan, context_length=_context_length(config, options, room))
    plan = _as_written(config, plan, base)
    facts = Facts(config, options, base, profile, fitted.notes, _no_nf4(config, options))
    return replace(plan, reasons=all_reasons(plan, facts))


def _draft(config: ModelConfig, options: ExportOptions, base: Inventory) -> Plan:
    """What is best where memory does not count."""
    chosen = _format(config, options, base)
    is_float = chosen == "float"
    anew = options.block_size not in (None, 32) or options.zero_points
    return Plan(
        mode=options.mode,
        format=chosen,
        block_size={"nf4": 64, "float": 0}.get(chosen, options.block_size or BLOCK_SIZES[0]),
        zero_points=options.zero_points,
        embedding_format="float" if is_float else options.embedding_format or "int8",
        carry=_carry(options.format, anew=anew or is_float),
        carry_embedding=_carry(options.embedding_format, anew=anew or is_float),
        flavor=options.flavor,
        context_length=options.context_length or config.max_position_embeddings,
        device=options.device,
    )


def _carry(asked: str | None, *, anew: bool) -> str:
    if anew:
        return "none"
    return "same" if asked else "any"


def _format(config: ModelConfig, options: ExportOptions, base: Inventory) -> str:
    obstacle = _no_nf4(config, options)
    if options.format == "nf4" and obstacle:
        raise EdgeLoraError(f"format nf4: {obstacle}")
    if options.format is not None:
        return options.format
    held = {kind for target, kind in base.stored.items() if target not in OUTER}
    return "nf4" if "nf4" in held and not obstacle else "int4"


def _no_nf4(config: ModelConfig, options: ExportOptions) -> str | None:
    """Why nf4 is impossible for this model with these options; None where it is possible."""
    if options.flavor == "ort":
        return "ONNX Runtime's own operators (--flavor ort) have no nf4"
    if options.zero_points:
        return "zero points were asked for"
    if options.block_size not in (None, 64):
        return f"blocks of {options.block_size} were asked for"
    for target, (_, in_features) in targets(config).items():
        if in_features % _NF4_STEP and target not in OUTER:
            return f"{target} has {in_features} input features, no multiple of {_NF4_STEP}"
    return None


def _context_length(config: ModelConfig, options: ExportOptions, room: int | None) -> int:
    """`room`: positions that fit the device."""
    limit, asked = config.max_position_embeddings, options.context_length
    if asked is not None and asked > limit:
        raise EdgeLoraError(f"context length {asked}: the base was made for at most {limit}")
    wanted = asked or min(limit, DEFAULT_CONTEXT)
    if room is None or room >= wanted:
        return wanted
    return max(room // CONTEXT_STEP * CONTEXT_STEP, min(CONTEXT_STEP, limit))


def _as_written(config: ModelConfig, plan: Plan, base: Inventory) -> Plan:
    """Where all linears are carried in one format that is not the planned one, the plan says so;
    likewise for embedding and lm_head.
    """
    outer = [EMBEDDING, *([] if config.tie_word_embeddings else ["lm_head"])]
    if plan.mode == "merge" and "lm_head" in base.changed:
        outer.append("lm_head")
    inner = [target for target in targets(config) if target not in OUTER]
    formats = Counter(kind_of(plan, base, target).format for target in inner)
    outer_formats = {kind_of(plan, base, target).format for target in outer}
    return replace(
        plan,
        format=next(iter(formats)) if len(formats) == 1 else plan.format,
        embedding_format=outer_formats.pop() if len(outer_formats) == 1 else plan.embedding_format,
    )
