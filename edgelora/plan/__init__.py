"""The decisions of one export, made once, each with its reason."""

from edgelora.plan.decisions import OUTER, Plan, int8_block, shares_head
from edgelora.plan.inventory import Inventory
from edgelora.plan.making import make_plan
from edgelora.plan.memory import plan_sizes
from edgelora.plan.options import (
    BLOCK_SIZES,
    CALIBRATION_WINDOWS,
    EMBEDDING_FORMATS,
    FLAVORS,
    FORMATS,
    MERGE_BASES,
    MODES,
    QUALITIES,
    ExportOptions,
)

__all__ = [
    "BLOCK_SIZES",
    "CALIBRATION_WINDOWS",
    "EMBEDDING_FORMATS",
    "FLAVORS",
    "FORMATS",
    "MERGE_BASES",
    "MODES",
    "OUTER",
    "QUALITIES",
    "ExportOptions",
    "Inventory",
    "Plan",
    "int8_block",
    "make_plan",
    "plan_sizes",
    "shares_head",
]
