"""A one-layer bundle of stock operators with the documented edge, for tests of the runtime alone.

Nothing of the exporter's graph is used. The handle in `adapter_ids` is added to the hidden state:
logits tell which adapter computed a position. After token NAN_TOKEN every logit is NaN.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgelora.manifest import file_entries, manifest_bytes

VOCAB_SIZE = 61
HIDDEN_SIZE = 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CONTEXT_LENGTH = 1100  # more than two chunks of prefill
EOS = 3
NAN_TOKEN = 60
FINGERPRINT = "sha256:" + "ab" * 32
TARGET = "model.layers.0.self_attn.q_proj"
ADAPTERS = ("one", "two")


def write_toy_bundle(folder: Path) -> Path:
    """The whole bundle; the same bytes every time."""
    folder.mkdir()
    onnx.save(
        _model(), folder / "model.onnx", save_as_external_data=True, location="model.onnx.data"
    )
    for name in ADAPTERS:
        path = folder / "adapters" / name / "adapter.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(adapter_bytes(name))
    write_manifest(folder)
    return folder


def write_manifest(folder: Path, **changes: Any) -> None:
    """manifest.json with a true digest; `changes` replace its top-level values."""
    fields = {
        "flavor": "edgelora",
        "model": model_fields(),
        "base": {"name": "toy", "fingerprint": FINGERPRINT},
        "targets": [{"name": TARGET, "in_features": HIDDEN_SIZE, "out_features": HIDDEN_SIZE}],
        "plan": {},
        "adapters": {
            name: {"path": f"adapters/{name}/adapter.safetensors", "rank": 1} for name in ADAPTERS
        },
        "merged": [],
        "tools": {},
        "files": file_entries(folder),
    }
    (folder / "manifest.json").write_bytes(manifest_bytes(fields | changes))


def model_fields(**changes: Any) -> dict[str, Any]:
    """The manifest's `model`."""
    return {
        "architecture": "toy",
        "num_hidden_layers": 1,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "context_length": CONTEXT_LENGTH,
        "bos_token_id": None,
        "eos_token_ids": [EOS],
    } | changes


def adapter_bytes(name: str, *, fingerprint: str = FINGERPRINT) -> bytes:
    """adapter.safetensors of rank 1, float32, all zeros."""
    a, b = 4 * HIDDEN_SIZE, 4 * HIDDEN_SIZE
    header = {
        "__metadata__": {
            "format": "edgelora-adapter",
            "format_version": "1",
            "name": name,
            "base_fingerprint": fingerprint,
            "scaling": json.dumps({TARGET: 1.0}),
        },
        f"{TARGET}.lora_a": {"dtype": "F32", "shape": [1, HIDDEN_SIZE], "data_offsets": [0, a]},
        f"{TARGET}.lora_b": {
            "dtype": "F32",
            "shape": [HIDDEN_SIZE // 16, 1, 16],
            "data_offsets": [a, a + b],
        },
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(a + b)


def _model() -> onnx.ModelProto:
    cache = ["batch", KV_HEADS, "past_sequence", HEAD_DIM]
    present = ["batch", KV_HEADS, "total_sequence", HEAD_DIM]
    graph = helper.make_graph(
        _nodes(),
        "toy",
        [
            _value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            _value("attention_mask", TensorProto.INT64, ["batch", "total_sequence"]),
            _value("adapter_ids", TensorProto.INT64, ["batch"]),
            _value("logits_to_keep", TensorProto.INT64, ["rows"]),
            _value("past_key_values.0.key", TensorProto.FLOAT, cache),
            _value("past_key_values.0.value", TensorProto.FLOAT, cache),
        ],
        [
            _value("logits", TensorProto.FLOAT, ["batch", "rows", VOCAB_SIZE]),
            _value("present.0.key", TensorProto.FLOAT, present),
            _value("present.0.value", TensorProto.FLOAT, present),
        ],
        [numpy_helper.from_array(array, name) for name, array in _weights().items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _nodes() -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Gather", ["embedding", "input_ids"], ["embedded"]),
        node("Cast", ["adapter_ids"], ["handle"], to=TensorProto.FLOAT),
        node("Mul", ["handle", "handle_direction"], ["shift"]),
        node("Add", ["embedded", "shift"], ["hidden"]),
        *[node("MatMul", ["hidden", f"w_{name}"], [name]) for name in ("q", "k", "v")],
        node("ReduceSum", ["attention_mask", "axis_1"], ["length"], keepdims=0),
        node("Sub", ["length", "one"], ["last"]),
        node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["mask_shape"]),
        node("Gather", ["mask_shape", "one"], ["total"]),
        node("Cast", ["total"], ["total_sequence_length"], to=TensorProto.INT32),
        node(
            "GroupQueryAttention",
            [
                *("q", "k", "v", "past_key_values.0.key", "past_key_values.0.value"),
                *("seqlens_k", "total_sequence_length", "cos", "sin"),
            ],
            ["attended", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        ),
        node("MatMul", ["attended", "w_o"], ["projected"]),
        node("Add", ["hidden", "projected"], ["out"]),
        node("Gather", ["out", "logits_to_keep"], ["kept"], axis=1),
        node("MatMul", ["kept", "w_head"], ["logits"]),
    ]


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (random.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    kv = KV_HEADS * HEAD_DIM
    angles = np.outer(np.arange(CONTEXT_LENGTH), 1e4 ** -(2 * np.arange(HEAD_DIM // 2) / HEAD_DIM))
    embedding = 5 * matrix(VOCAB_SIZE, HIDDEN_SIZE)
    embedding[NAN_TOKEN] = np.nan
    head = 2 * matrix(HIDDEN_SIZE, VOCAB_SIZE)
    head[:, NAN_TOKEN] = 0  # never the greedy choice
    return {
        "embedding": embedding,
        "handle_direction": matrix(HIDDEN_SIZE, 1)[:, 0],
        "w_q": 2 * matrix(HIDDEN_SIZE, HIDDEN_SIZE),
        "w_k": 2 * matrix(HIDDEN_SIZE, kv),
        "w_v": 2 * matrix(HIDDEN_SIZE, kv),
        "w_o": 2 * matrix(HIDDEN_SIZE, HIDDEN_SIZE),
        "w_head": head,
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "one": np.array(1, np.int64),
        "axis_1": np.array([1], np.int64),
    }


def _value(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
