"""Attention over an int8 kv_cache in torch, as ARCHITECTURE.md says: for transformers' models.

Keys and queries are rounded in blocks of 32 features, a key's scales to float16; a value has one
scale for its position, which is multiplied into the softmax, and that is rounded in blocks of 32
positions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "int8_kv_cache"
BLOCK = 32
Rounding = Callable[[torch.Tensor], torch.Tensor]


def blocks_of(x: torch.Tensor) -> torch.Tensor:
    """[…, n] → […, blocks, 32], padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    return padded.unflatten(-1, (-1, BLOCK))


def codes_of(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales > 0, torch.round(x / scales), 0.0)


def codes_and_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers, and the scale of the last dimension."""
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    return codes_of(blocks, scales), scales


def round_int8(x: torch.Tensor) -> torch.Tensor:
    """x → scale·round(x / scale), scale = largest magnitude of 32 neighbours / 127."""
    codes, scales = codes_and_scales(blocks_of(x))
    return (codes * scales).flatten(-2)[..., : x.shape[-1]]


def round_keys(key: torch.Tensor) -> torch.Tensor:
    codes, scales = codes_and_scales(blocks_of(key))
    return (codes * scales.half().float()).flatten(-2)[..., : key.shape[-1]]


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [batch, heads, n, D] → [batch, n, heads, D]."""
    groups = module.num_key_value_groups
    key = round_keys(key).repeat_interleave(groups, 1)
    codes, scales = (t.repeat_interleave(groups, 1) for t in codes_and_scales(value))
    scores = round_int8(query * scaling) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[2]]
    # Relative to the row's largest, which no block's rounding sees.
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed = round_int8(weights * scales.transpose(2, 3)) @ codes
    return (mixed / weights.sum(-1, keepdim=True)).transpose(1, 2).contiguous(), None


@contextmanager
def int8_kv_cache(model: Any) -> Iterator[None]:
    """The model's attention is `attention` meanwhile."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
