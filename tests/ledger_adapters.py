"""Adapters made by PEFT that use, between them, all that the ledger knows, on one tiny base."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import tiny
from edgelora.adapter import Adapter
from edgelora.adapter_file import write_adapter
from edgelora.binding import bound, merged, merged_bias
from edgelora.checkpoint import Checkpoint
from edgelora.layout import expected_tensors
from edgelora.plan import ExportOptions
from edgelora.repeated_base import layers_of
from edgelora.request import prepare
from prompts import make_prompt
from test_adalora import make_pruned
from test_adapter import WEIGHTS
from test_float_oracle import make_adapter
from test_qalora import make_qalora

IDS = [5, 300]
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "exclude_modules": ["o_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers"],
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"up_proj": 5},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["k_proj", "down_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["k_proj", "down_proj"], "lora_bias": True},
    "bias_all": {"target_modules": ["k_proj", "o_proj"], "bias": "all"},
    "bias_lora_only": {"target_modules": ["k_proj", "o_proj"], "bias": "lora_only"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "weights": {"target_modules": ["v_proj"], "target_parameters": ["o_proj.weight"]},
    "activated": {"target_modules": ["v_proj"], "alora_invocation_tokens": IDS},
    "repeated": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 1]]},
    "ia3": {
        "target_modules": ["v_proj", "up_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "adalora": {"target_modules": ["q_proj"], "init_r": 3, "total_step": 10},
}
MERGED: dict[str, dict[str, Any]] = {
    "saved": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens", "norm", "k_proj"],
    },
    "tokens": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": IDS, "lm_head": [7]},
    },
    "embedding": {
        "target_modules": ["q_proj", "embed_tokens"],
        "rank_pattern": {"embed_tokens": 3},
    },
    "ia3_inputs": {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]},
    "merged_dora": {"target_modules": ["k_proj", "lm_head"], "use_dora": True},
    "merged_biases": {"target_modules": ["k_proj"], "bias": "all", "lora_bias": True},
}
PROMPTS = ("prefix", "cartridge", "prompt", "p_tuning")
MAKERS: dict[str, Callable[[Path, Path], object]] = {
    **{kind: partial(make_adapter, **each) for kind, each in (LORA | MERGED).items()},
    **{kind: partial(make_prompt, kind=kind) for kind in PROMPTS},
    "pruned": make_pruned,
    "qalora": partial(make_qalora, group=16, names=("q_proj", "o_proj")),
}
KINDS = tuple(MAKERS)


def make_base(path: Path) -> Path:
    """q_proj, k_proj and v_proj have biases."""
    return tiny.tiny_qwen2(path)


def make(kind: str, base: Path, folder: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):  # of PEFT, on what it is asked for
        MAKERS[kind](base, folder)
    return folder


def with_tensors(folder: Path, copy: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A copy of the folder with these."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    save_file(tensors, copy / WEIGHTS)
    return copy


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_file(folder / WEIGHTS))


def mode_of(kind: str) -> str:
    return "merge" if kind in MERGED else "side"


def outcome(kind: str, base: Path, folder: Path) -> str:
    """A digest of all that an export would write of the adapter. Raises EdgeLoraError."""
    options = ExportOptions(mode=mode_of(kind), format="float", report=False)
    request = prepare(base, {"a": folder}, options)
    (adapter,) = request.adapters.values()
    write = _merged_bytes if kind in MERGED else _side_bytes
    layers = () if kind in MERGED else layers_of(request.checkpoint)
    digest = hashlib.sha256(json.dumps(layers).encode())
    for data in write(adapter, request.checkpoint):
        digest.update(data)
    return digest.hexdigest()


def _side_bytes(adapter: Adapter, checkpoint: Checkpoint) -> Iterator[bytes]:
    base = "sha256:" + "0" * 64
    found = bound(adapter, checkpoint)
    yield write_adapter(found, name="a", base_fingerprint=base, dtype="float32")


def _merged_bytes(adapter: Adapter, checkpoint: Checkpoint) -> Iterator[bytes]:
    """Every tensor of the base, with the adapter in it."""
    for name in expected_tensors(checkpoint.config):
        target, _, part = name.rpartition(".")
        values, branch = checkpoint.read(name), adapter.branches.get(target)
        if branch is not None and part == "weight":
            values = merged(target, values, branch)
        if branch is not None and part == "bias":
            values = merged_bias(target, values, branch)
        yield values.tobytes()
