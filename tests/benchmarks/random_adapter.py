"""A PEFT folder with random factors on all linears of a Llama checkpoint: for speed, never for
quality. The factors are small, so that the answers stay finite.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_random_adapter(checkpoint: Path, rank: int, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors of this rank."""
    config = json.loads((checkpoint / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(_factors(config, rank)), folder / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(LINEARS),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=2))


def _factors(config: dict[str, int], rank: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    generator = np.random.default_rng(rank)
    for layer in range(config["num_hidden_layers"]):
        for linear, (out_features, in_features) in _shapes(config).items():
            block = "self_attn" if linear in LINEARS[:4] else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{linear}"
            for factor, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                values = generator.standard_normal(shape, np.float32) * np.float32(0.01)
                yield f"{name}.lora_{factor}.weight", values


def _shapes(config: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each linear of a layer."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query = head_dim * config["num_attention_heads"]
    key = head_dim * config["num_key_value_heads"]
    sizes = (
        (query, hidden), (key, hidden), (key, hidden), (hidden, query),
        (wide, hidden), (wide, hidden), (hidden, wide),
    )  # fmt: skip
    return dict(zip(LINEARS, sizes, strict=True))
