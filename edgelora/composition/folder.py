"""A composed adapter as PEFT writes one: adapter_config.json and adapter_model.safetensors."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora.adapter import CONFIG, WEIGHTS
from edgelora.adapter.tensors import safetensors_bytes
from edgelora.composition.factors import Factors
from edgelora.composition.parts import Part, base_of
from edgelora.whole_folder import FolderKind

PEFT_FOLDER = FolderKind("PEFT folder", CONFIG, frozenset((CONFIG, WEIGHTS, "README.md")))


def write_folder(
    folder: Path, parts: tuple[Part, ...], rank: int, factors: Mapping[str, Factors]
) -> None:
    """Fills an empty folder. The same factors always give the same bytes."""
    tensors = {
        f"base_model.model.{target}.lora_{letter}.weight": values
        for target, pair in factors.items()
        for letter, values in zip("AB", pair, strict=True)
    }
    config = _config(parts, rank, {target: len(lora_a) for target, (lora_a, _) in factors.items()})
    (folder / WEIGHTS).write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _config(parts: tuple[Part, ...], rank: int, ranks: Mapping[str, int]) -> dict[str, Any]:
    """alpha = rank everywhere, so that scaling is 1; every target by its whole path."""
    other = {re.escape(target): each for target, each in sorted(ranks.items()) if each != rank}
    revisions = {part.config.get("revision") for part in parts}
    return {
        "alpha_pattern": other,
        "base_model_name_or_path": base_of(parts)[0],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": other,
        "revision": revisions.pop() if len(revisions) == 1 else None,
        "target_modules": sorted(ranks),
        "task_type": parts[0].config.get("task_type"),
        "use_dora": False,
        "use_rslora": False,
    }
