"""The decisions of one export, made once, each with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgelora.config import ModelConfig
from edgelora.device import DeviceProfile, max_context, predict_decode_tokens_per_second
from edgelora.errors import EdgeLoraError
from edgelora.plan.memory import OVERHEAD_BYTES, kv_bytes_per_position, weight_bytes
from edgelora.plan.options import (
    BLOCK_SIZES,
    EMBEDDING_FORMATS,
    FLAVORS,
    FORMATS,
    MODES,
    ExportOptions,
)

__all__ = [
    "BLOCK_SIZES",
    "EMBEDDING_FORMATS",
    "FLAVORS",
    "FORMATS",
    "MODES",
    "ExportOptions",
    "Plan",
    "make_plan",
]

DEFAULT_CONTEXT = 8192  # positions; longer contexts are asked for
USEFUL_CONTEXT = 2048  # a device gets larger blocks before it gets less than this
CONTEXT_STEP = 256


@dataclass(frozen=True)
class Plan:
    """The frozen decisions of one export. `reasons`: decision → why."""

    mode: str
    format: str  # of the linears
    block_size: int
    zero_points: bool
    embedding_format: str  # "int8", "int4" or "float", for the embedding and lm_head
    carry: str  # which codes of the base file are kept as they are: "none", "same" format, "any"
    flavor: str
    context_length: int
    device: str | None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def carries(self, stored: str | None, wanted: str) -> bool:
        """Whether a matrix that the base holds as `stored` ("int4", "int8", "nf4", None) is kept
        code for code.
        """
        if stored is None or wanted == "float":
            return False
        if stored == wanted:
            return stored != "int4" or self.carry != "none"
        if self.flavor == "ort" and wanted == "int8":
            return False  # GatherBlockQuantized has no offsets
        return self.carry == "any" and {stored, wanted} <= {"int4", "int8"}


def make_plan(
    config: ModelConfig,
    options: ExportOptions,
    *,
    stored: Mapping[str, int],
    profile: DeviceProfile | None = None,
) -> Plan:
    """`stored`: how many matrices the base holds in each format that can be carried ("int4",
    "int8", "nf4").

    Raises EdgeLoraError when the model does not fit the device or the context is longer than the
    base's.
    """
    reasons: dict[str, str] = {}
    chosen = _format(options, stored, reasons)
    carry = _carry(options, stored, reasons)
    block_size = _block_size(config, options, chosen, profile, reasons)
    context_length = _context_length(config, options, (chosen, block_size), profile, reasons)
    if profile is not None:
        reasons["device"] = _prediction(config, (chosen, block_size), profile)
    return Plan(
        mode=_mode(options, reasons),
        format=chosen,
        block_size=block_size,
        zero_points=options.zero_points,
        embedding_format=_embedding_format(options, chosen, reasons),
        carry=carry,
        flavor=options.flavor,
        context_length=context_length,
        device=options.device,
        reasons=reasons,
    )


def _mode(options: ExportOptions, reasons: dict[str, str]) -> str:
    reasons["mode"] = {
        "side": "adapters stay apart: the base is shared and they can be switched",
        "merge": "asked for: W0 + scaling·B·A in float32, then quantized once",
    }[options.mode]
    return options.mode


def _format(options: ExportOptions, stored: Mapping[str, int], reasons: dict[str, str]) -> str:
    if options.format is not None:
        reasons["format"] = "asked for"
        return options.format
    if stored.get("nf4") and not options.zero_points and options.block_size in (None, 64):
        reasons["format"] = f"{stored['nf4']} matrices of the base are NF4 already"
        return "nf4"
    reasons["format"] = "the default: 4 bits, fastest kernels"
    return "int4"


def _carry(options: ExportOptions, stored: Mapping[str, int], reasons: dict[str, str]) -> str:
    held = ", ".join(f"{count} in {kind}" for kind, count in sorted(stored.items()) if count)
    if options.block_size not in (None, 32) or options.zero_points or options.format == "float":
        if held:
            reasons["carry"] = f"the base's 4-bit codes ({held}) are dequantized, as asked for"
        return "none"
    if held:
        reasons["carry"] = f"the base's own codes are kept, nothing is rounded anew ({held})"
    return "same" if options.format else "any"


def _block_size(
    config: ModelConfig,
    options: ExportOptions,
    chosen: str,
    profile: DeviceProfile | None,
    reasons: dict[str, str],
) -> int:
    if chosen == "nf4":
        reasons["block_size"] = "bitsandbytes' NF4 has blocks of 64"
        return 64
    if options.block_size is not None:
        reasons["block_size"] = "asked for"
        return options.block_size
    if profile is not None and chosen == "int4":
        return _block_size_for(config, profile, reasons)
    reasons["block_size"] = "the default: the smallest blocks lose least"
    return BLOCK_SIZES[0]


def _block_size_for(config: ModelConfig, profile: DeviceProfile, reasons: dict[str, str]) -> int:
    """The smallest blocks that leave room for a useful context."""
    useful = min(USEFUL_CONTEXT, config.max_position_embeddings)
    for size in BLOCK_SIZES:
        if _room(config, ("int4", size), profile) >= useful:
            reasons["block_size"] = f"the smallest that leaves {useful} positions on {profile.id}"
            return size
    reasons["block_size"] = f"{profile.id} is short of memory: the largest blocks"
    return BLOCK_SIZES[-1]


def _room(config: ModelConfig, weights: tuple[str, int], profile: DeviceProfile) -> int:
    """Positions of kv_cache that fit beside the weights of (format, block size)."""
    held = weight_bytes(config, *weights)
    return max_context(profile, held, kv_bytes_per_position(config), OVERHEAD_BYTES)


def _embedding_format(options: ExportOptions, chosen: str, reasons: dict[str, str]) -> str:
    if chosen == "float":
        reasons["embedding_format"] = "as the linears"
        return "float"
    if options.embedding_format is not None:
        reasons["embedding_format"] = "asked for"
        return options.embedding_format
    reasons["embedding_format"] = (
        "8 bits cost next to nothing; plainly rounded int4 adds a mean KL of 0.125 on SmolLM2"
    )
    return "int8"


def _context_length(
    config: ModelConfig,
    options: ExportOptions,
    weights: tuple[str, int],
    profile: DeviceProfile | None,
    reasons: dict[str, str],
) -> int:
    limit = config.max_position_embeddings
    asked = options.context_length
    if asked is not None and asked > limit:
        raise EdgeLoraError(f"context length {asked}: the base was made for at most {limit}")
    wanted = asked or min(limit, DEFAULT_CONTEXT)
    default = f"the base's {limit}, by default at most {DEFAULT_CONTEXT}"
    reasons["context_length"] = "asked for" if asked else default
    if profile is None:
        return wanted
    room = _room(config, weights, profile)
    if room < (asked or min(CONTEXT_STEP, limit)):
        raise EdgeLoraError(
            f"device {profile.id}: room for {room} positions beside the weights "
            f"({weight_bytes(config, *weights) / 1e6:.0f} MB): choose a smaller base or context"
        )
    if asked is None and room < wanted:
        reasons["context_length"] = f"what fits the memory of {profile.id}"
        return room // CONTEXT_STEP * CONTEXT_STEP
    return wanted


def _prediction(config: ModelConfig, weights: tuple[str, int], profile: DeviceProfile) -> str:
    held = weight_bytes(config, *weights)
    rate = predict_decode_tokens_per_second(profile, held)
    return (
        f"{held / 1e6:.0f} MB of weights of {profile.usable_memory_bytes / 1e6:.0f} MB usable; "
        f"memory bandwidth allows at most {rate:.0f} tokens/s"
    )
