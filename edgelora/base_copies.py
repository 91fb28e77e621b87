"""Copies of the base's weights in an adapter's folder: compared with the base, then left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, copied_module, misfit
from edgelora.adapter.ledger import LedgerEntry, harmless, refusals, refused
from edgelora.adapter.tensors import StoredTensor
from edgelora.checkpoint import Checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.layout import weight_name
from edgelora.quantize import round_to

ROUNDINGS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names

DIFFERS = (
    "a copy of base weights that differs from the base's{}: if it was trained, train it as "
    "modules_to_save; if not, use the base it was trained on, or save with "
    "save_embedding_layers=False"
)


def compared(adapter: Adapter, path: Path, checkpoint: Checkpoint) -> Adapter:
    """The adapter without its copies, each of which equals the base's weight.

    Equal are values of the base as it was read, and those rounded to the copy's dtype; of a
    quantized base the dequantized ones. Raises EdgeLoraError: one line that names all others.
    """
    found = {
        name: _compare(name, copy, checkpoint) for name, copy in sorted(adapter.copies.items())
    }
    if problems := refusals(found.values()):
        raise EdgeLoraError(f"{path}: {problems}")
    ledger = tuple(found.get(entry.item, entry) for entry in adapter.ledger)
    return replace(adapter, copies={}, ledger=ledger)


def _compare(name: str, copy: StoredTensor, checkpoint: Checkpoint) -> LedgerEntry:
    ours = weight_name(checkpoint.config, copied_module(name))
    rows, columns = checkpoint.shape(ours)
    if why := misfit(copy, (rows, columns)):
        return refused(name, why)
    if np.array_equal(copy.values(), _rounded(checkpoint.read(ours), copy.dtype)):
        return harmless(name, "equals the base's")
    is_dequantized = checkpoint.path.suffix == ".gguf" or checkpoint.stored_as(ours)
    return refused(name, DIFFERS.format(", dequantized" if is_dequantized else ""))


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """To the nearest of safetensors' F32, F16 or BF16, ties to even."""
    with np.errstate(over="ignore", under="ignore"):
        return round_to(values.copy(), ROUNDINGS[dtype])
