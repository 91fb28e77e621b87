"""Options, base and device → Plan."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from edgelora.config import ModelConfig
from edgelora.device import DeviceProfile
from edgelora.errors import EdgeLoraError
from edgelora.layout import EMBEDDING, targets
from edgelora.plan.decisions import (
    OUTER,
    Plan,
    is_carried,
    kind_of,
    outer_matrices,
    sensitive,
    shares_head,
)
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
    calibration: str | None = None,
    measured: Mapping[str, str] | None = None,
) -> Plan:
    """`calibration` says which text was read, `measured` why a measurement chose the mode and the
    merge base (field of Plan → reason); mode auto is side until then.

    Raises EdgeLoraError when the model does not fit the device, the context is longer than the
    base's, nf4 cannot hold its linears, or nothing is there for the quality to work on.
    """
    base = base or Inventory()
    draft = replace(_draft(config, options, base), calibration=calibration)
    fitted, room = Fitted(draft), None
    if profile is not None:
        fitting = Fitting(config, options, base, profile)
        fitted = fitting.fit(draft)
        room = fitting.room(fitted.plan)
    plan = replace(fitted.plan, context_length=_context_length(config, options, room))
    plan = _as_written(config, plan, base)
    _check_quality(config, plan, base)
    facts = Facts(config, plan, options, base, profile, fitted.notes, _no_nf4(config, options))
    return replace(plan, reasons=all_reasons(facts) | dict(measured or {}))


def _draft(config: ModelConfig, options: ExportOptions, base: Inventory) -> Plan:
    """What is best where memory does not count."""
    chosen = _format(config, options, base)
    is_float = chosen == "float"
    anew = options.block_size not in (None, 32) or options.zero_points
    embedding, head = _outer_formats(config, options, base)
    return Plan(
        mode="merge" if options.mode == "merge" else "side",
        format=chosen,
        block_size={"nf4": 64, "float": 0}.get(chosen, options.block_size or BLOCK_SIZES[0]),
        zero_points=options.zero_points,
        embedding_format="float" if is_float else embedding,
        head_format="float" if is_float else head,
        quality=options.quality,
        calibration=None,
        carry=_carry(options.format, anew=anew or is_float),
        carry_embedding=_carry(
            options.embedding_format or options.head_format, anew=anew or is_float
        ),
        flavor=options.flavor,
        context_length=options.context_length or config.max_position_embeddings,
        device=options.device,
        int8=sensitive(config) if options.quality == "best" else (),
        merge_base=_merge_base(options, base),
    )


def _merge_base(options: ExportOptions, base: Inventory) -> str | None:
    """None where nothing is merged; a base in nf4 or fp4 is what the adapter saw as it is."""
    if options.mode != "merge":
        return None
    coded = {"nf4", "fp4"} & {*base.stored.values()}
    return "nf4" if options.merge_base == "nf4" and not coded else "float"


def _outer_formats(config: ModelConfig, options: ExportOptions, base: Inventory) -> tuple[str, str]:
    """Of embedding and lm_head. Compensated int4 is good enough for lm_head, which every decoded
    token streams; a lookup has no error that could be compensated, but where it is tied the head's
    matrix serves it too.
    """
    asked = options.embedding_format
    head = options.head_format or asked
    if options.quality == "fast":
        head = head or "int8"
        return asked or "int8", head
    head = head or "int4"
    merged = options.mode == "merge" and "lm_head" in base.changed
    shared = config.tie_word_embeddings and not merged and options.flavor == "edgelora"
    return asked or (head if shared else "int8"), head


def _check_quality(config: ModelConfig, plan: Plan, base: Inventory) -> None:
    """Raises EdgeLoraError where no matrix would be rounded any better."""
    if plan.quality == "fast":
        return
    inner = [target for target in targets(config) if target not in OUTER]
    head = EMBEDDING if shares_head(config, plan, base) else "lm_head"
    for target in [*inner, head]:
        if plan.wanted(target) == "int4" and not is_carried(plan, base, target):
            return
    raise EdgeLoraError(
        f"quality {plan.quality}: nothing would be rounded to int4, the base's own codes are kept: "
        "leave --quality away or ask for --format int4"
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
    return "nf4" if held & {"nf4", "fp4"} and not obstacle else "int4"


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
    outer = {t: kind_of(plan, base, t).format for t in outer_matrices(config, plan, base)}
    inner = [target for target in targets(config) if target not in OUTER]
    formats = Counter(kind_of(plan, base, target).format for target in inner)
    return replace(
        plan,
        format=next(iter(formats)) if len(formats) == 1 else plan.format,
        embedding_format=outer[EMBEDDING],
        head_format=outer.get("lm_head", outer[EMBEDDING]),
    )
