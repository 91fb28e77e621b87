"""Prompt-learning adapters as PEFT saves them, and PEFT's own logits with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import (
    CartridgeConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import PreTrainedModel

import oracle
from test_float_oracle import with_adapter

POSITIONS = 5
MAKERS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "prefix": (PrefixTuningConfig, {}),
    "projected": (PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 16}),
    "cartridge": (CartridgeConfig, {"num_frozen_tokens": 2}),
    "prompt": (PromptTuningConfig, {}),
    "p_tuning": (PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "p_tuning_lstm": (
        PromptEncoderConfig,
        {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
}
KEYS = ("prefix", "projected", "cartridge")  # saved as such, not as embeddings


def make_prompt(base: Path, folder: Path, kind: str, **settings: Any) -> Path:
    """A PEFT folder with random parameters, other ones for other folders."""
    maker, own = MAKERS[kind]
    config = maker(task_type="CAUSAL_LM", **{"num_virtual_tokens": POSITIONS, **own, **settings})
    adapted = get_peft_model(oracle.float_model(base), config)
    torch.manual_seed(sum(folder.name.encode()))
    for name, values in adapted.named_parameters():
        if "prompt_encoder" in name:
            small = 0.3 if "transform" in name or "head" in name else 1.0
            values.data = (small * torch.randn_like(values)).half().float()
    adapted.save_pretrained(folder)
    return folder


def peft_logits(model: PreTrainedModel, folder: Path, ids: list[int]) -> NDArray[np.float32]:
    """Of the text alone: PEFT returns those of soft embeddings too."""
    return oracle.logits(with_adapter(model, folder).eval(), ids)[-len(ids) :]


def peft_greedy(model: PreTrainedModel, folder: Path, ids: list[int], count: int) -> list[int]:
    """All computed anew for each token: PEFT's forward begins a kv_cache every time."""
    adapted, found = with_adapter(model, folder).eval(), list(ids)
    for _ in range(count):
        found.append(int(oracle.logits(adapted, found)[-1].argmax()))
    return found[len(ids) :]
