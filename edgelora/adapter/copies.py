"""Copies of the base's embedding and lm_head: PEFT saves those of an adapter whose target_modules
name one of them, and those of a grown vocabulary (save_embedding_layers="auto").
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from edgelora.adapter.ledger import LedgerEntry, harmless, refused
from edgelora.adapter.tensors import StoredTensor

# `base_layer` in what the adapter changes
NAME = re.compile(
    r"base_model\.model\.(?P<module>model\.embed_tokens|lm_head)(\.base_layer)?\.weight"
)
TO_COMPARE = "a copy of base weights: to be compared with the base's, which it must equal"
GROWN = (
    "a grown vocabulary: train embed_tokens and lm_head as modules_to_save, or merge it with PEFT "
    "(model.merge_and_unload().save_pretrained(FOLDER)) and export that folder as the base"
)
Copies = dict[str, StoredTensor]  # by the file's name


def module_of(name: str) -> str:
    """Whose weight a copy is."""
    match = NAME.fullmatch(name)
    assert match is not None
    return match["module"]


def without_copies(tensors: Iterable[str]) -> list[str]:
    """The other names."""
    return [name for name in tensors if not NAME.fullmatch(name)]


def read_copies(
    tensors: Mapping[str, StoredTensor], size: tuple[int, int] | None
) -> tuple[Copies, list[LedgerEntry]]:
    """All of them, and their ledger; size: the embedding's (vocab_size, hidden_size), if known."""
    copies = {name: tensors[name] for name in sorted(tensors) if NAME.fullmatch(name)}
    found = {name: _obstacle(tensor) or misfit(tensor, size) for name, tensor in copies.items()}
    ledger = [
        refused(name, why) if why else harmless(name, TO_COMPARE) for name, why in found.items()
    ]
    return copies, ledger


def misfit(tensor: StoredTensor, size: tuple[int, int] | None) -> str | None:
    """Why it is no copy of a matrix of that size."""
    shape = tensor.shape
    if size is None or shape == size:
        return None
    if len(shape) == len(size) and shape[0] > size[0] and shape[1] == size[1]:
        return f"a copy of base weights with {shape[0]} rows, the base has {size[0]}: {GROWN}"
    return (
        f"a copy of base weights of shape {list(shape)}, the base has {list(size)}: use the base "
        "it was trained on"
    )


def _obstacle(tensor: StoredTensor) -> str | None:
    if not tensor.is_float:
        return (
            f"a copy of base weights in dtype {tensor.dtype}, which is not compared: save with "
            "save_embedding_layers=False"
        )
    return None if np.isfinite(tensor.values()).all() else "holds NaN or infinity"
