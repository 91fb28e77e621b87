"""The decisions of one export, made once, each with its reason."""

from edgelora.plan.decisions import EMBEDDING_BLOCK, Plan
from edgelora.plan.inventory import Inventory
from edgelora.plan.making import make_plan
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
    "EMBEDDING_BLOCK",
    "EMBEDDING_FORMATS",
    "FLAVORS",
    "FORMATS",
    "MODES",
    "ExportOptions",
    "Inventory",
    "Plan",
    "make_plan",
]
