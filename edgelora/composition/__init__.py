"""Adapters, weighted → one adapter in a PEFT folder: what PEFT 0.21.2's add_weighted_adapter makes.

Source of every rule: `LoraModel.add_weighted_adapter` and what it calls, peft/tuners/lora/model.py.
"""

from edgelora.composition.factors import compose_factors
from edgelora.composition.folder import PEFT_FOLDER, write_folder
from edgelora.composition.options import MAJORITY_SIGNS, METHODS, ComposeOptions
from edgelora.composition.parts import Part, read_parts
from edgelora.composition.recipe import Recipe, make_recipe

__all__ = [
    "MAJORITY_SIGNS",
    "METHODS",
    "PEFT_FOLDER",
    "ComposeOptions",
    "Part",
    "Recipe",
    "compose_factors",
    "make_recipe",
    "read_parts",
    "write_folder",
]
