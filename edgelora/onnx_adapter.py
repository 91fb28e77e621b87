"""Adapters for the `ort` flavor, in ONNX Runtime's own `.onnx_adapter` format (flatbuffers, id
TORT).

Parameters `<target>.lora_a` float32 [in_features, rank] and `<target>.lora_b` float32 [rank,
out_features] with the scaling in lora_b, as the graph's inputs are named.
"""

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgelora.adapter import Adapter

FORMAT_VERSION = 1


def factors(adapter: Adapter) -> dict[str, NDArray[np.float32]]:
    """The graph's inputs by name."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for target, branch in adapter.branches.items():
        a = np.asarray(branch.lora_a, np.float32).T
        b = np.asarray(branch.lora_b, np.float32).T * np.float32(branch.scaling)
        arrays[f"{target}.lora_a"] = np.ascontiguousarray(a)
        arrays[f"{target}.lora_b"] = np.ascontiguousarray(b)
    return arrays


def write_onnx_adapter(adapter: Adapter, path: Path) -> None:
    """Writes the file; equal adapters give equal bytes."""
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
        for name, array in sorted(factors(adapter).items())
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(FORMAT_VERSION)
    file.set_model_version(FORMAT_VERSION)
    file.set_parameters(values)
    file.export_adapter(str(path))
