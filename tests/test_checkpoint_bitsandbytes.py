"""bitsandbytes 4-bit folders: `read` is bitsandbytes' own dequantization, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as reference
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import oracle
from edgelora.checkpoint import open_checkpoint
from edgelora.checkpoint.bitsandbytes import BitsAndBytesCheckpoint
from edgelora.errors import EdgeLoraError
from edgelora.inventory import take_inventory
from edgelora.quantize import dequantize
from edgelora.quantize.matrix import Nf4Matrix, PlainNf4Matrix
from tiny import tiny_bitsandbytes

WEIGHTS = "model.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
# K = 72: blocks of 64 cross the rows; 97 · 72 weights: the last block is not full
ODD = {"hidden_size": 72, "intermediate_size": 97}
SHAPES: list[dict[str, int]] = [{}, ODD]


def dequantized(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """What bitsandbytes makes of a weight; the stored float where it is not quantized."""
    beside = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    values = tensors[name]
    if beside:
        state = reference.QuantState.from_dict(beside, torch.device("cpu"))
        values = oracle.dequantize_4bit(values, state)
    return values.float().numpy()


def from_codes(matrix: Nf4Matrix | PlainNf4Matrix) -> np.ndarray:
    """The formula of ARCHITECTURE.md, in float32, with bitsandbytes' own codebook."""
    codebook = reference.get_4bit_type(matrix.codebook, device="cpu").numpy()
    if isinstance(matrix, PlainNf4Matrix):
        absmax = matrix.absmax
    else:
        groups = np.repeat(matrix.nested_absmax, 256)[: matrix.absmax_codes.size]
        absmax = matrix.absmax_table[matrix.absmax_codes] * groups + matrix.absmax_offset
    values = codebook[matrix.codes.reshape(-1)]
    return (values * np.repeat(absmax, 64)[: values.size]).reshape(matrix.codes.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=["whole blocks", "blocks across rows"])
@pytest.mark.parametrize("double_quant", ["nested", ""])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_equal_bitsandbytes(
    dtype: str, quant_type: str, double_quant: str, shape: dict[str, int], tmp_path: Path
) -> None:
    path = tiny_bitsandbytes(
        tmp_path / "base",
        dtype=dtype,
        quant_type=quant_type,
        double_quant=bool(double_quant),
        **shape,
    )
    checkpoint, tensors = open_checkpoint(path), load_file(path / WEIGHTS)
    for name in checkpoint.names():
        values, wanted = checkpoint.read(name), dequantized(tensors, name)
        assert values.dtype == np.float32 and values.shape == checkpoint.shape(name)
        assert np.array_equal(values, wanted), name
        # FP4 has a -0, which some of bitsandbytes' own ways make 0
        if quant_type == "nf4":
            assert np.array_equal(values.view(np.uint32), wanted.view(np.uint32)), name
        is_linear = "_proj." in name
        assert checkpoint.stored_as(name) == (quant_type if is_linear else None)
        matrix = checkpoint.read_quantized(name)
        assert (matrix is not None) == is_linear
        if matrix is not None:
            assert isinstance(matrix, Nf4Matrix if double_quant else PlainNf4Matrix)
            exact = torch.from_numpy(from_codes(matrix))
            assert np.array_equal(exact.to(getattr(torch, dtype)).float().numpy(), wanted), name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_with_their_rounding_are_what_bitsandbytes_dequantizes(
    dtype: str, kind: str, tmp_path: Path
) -> None:
    base = tiny_bitsandbytes(tmp_path / "base", dtype=dtype, quant_type=kind)
    checkpoint = open_checkpoint(base)
    assert isinstance(checkpoint, BitsAndBytesCheckpoint)
    matrix = checkpoint.read_quantized(NAME)
    assert matrix is not None and matrix.rounded_to == dtype
    assert np.array_equal(dequantize(matrix), checkpoint.read(NAME))
    assert np.array_equal(from_codes(matrix), checkpoint.read(NAME)) == (dtype == "float32")
    assert checkpoint.obstacle(NAME) is None


def test_obstacle_to_carrying_is_named(tmp_path: Path) -> None:
    path = tiny_bitsandbytes(tmp_path / "base", double_quant=False)
    why = "blocks of 128"

    def change(tensors: dict[str, torch.Tensor]) -> None:  # one weight in blocks of 128
        tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"][::2].contiguous()

    edit(path, change)
    edit_state(path, blocksize=128)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, BitsAndBytesCheckpoint)
    assert checkpoint.obstacle(NAME) == why
    assert checkpoint.stored_as(NAME) is None and checkpoint.read_quantized(NAME) is None
    assert checkpoint.obstacle("model.norm.weight") is None
    assert take_inventory(checkpoint, {}).foreign == {why: 1}


def test_biases_of_qwen2_stay_floats(tmp_path: Path) -> None:
    path = tiny_bitsandbytes(tmp_path / "base", architecture="qwen2")
    checkpoint, tensors = open_checkpoint(path), load_file(path / WEIGHTS)
    name = "model.layers.1.self_attn.k_proj.bias"
    assert np.array_equal(checkpoint.read(name), tensors[name].numpy())


def test_other_storage_dtype_is_the_same_bytes(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: the codes may be stored as pairs in a float dtype."""
    path = tiny_bitsandbytes(tmp_path / "base")
    before = open_checkpoint(path).read(NAME)
    edit(path, lambda t: t | {NAME: t[NAME].reshape(-1).view(torch.bfloat16)[:, None]})
    assert np.array_equal(open_checkpoint(path).read(NAME), before)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    save_file(change(tensors) or tensors, path / WEIGHTS)


def edit_state(path: Path, **changes: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        values = json.loads(bytes(tensors[STATE].tolist())) | changes
        kept = {k: v for k, v in values.items() if v is not ...}
        tensors[STATE] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)

    edit(path, change)


def refusal(path: Path) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_bitsandbytes(tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_type": "fp4"}, "malformed (quant_type fp4)"),
        ({"dtype": "int8"}, "malformed (dtype int8)"),
        ({"dtype": ["float32"]}, "malformed (dtype ['float32'])"),
        ({"shape": [96]}, "malformed"),
        ({"shape": [0, 64]}, "malformed (shape [0, 64])"),
        ({"shape": [2**62, 2**62]}, "instead of"),
        ({"shape": [95, 64]}, "instead of"),
        ({"shape": [64, 96]}, "is [64, 96] instead of [96, 64]"),
        ({"blocksize": 48}, "malformed (blocksize 48)"),
        ({"blocksize": 128}, "has 96 bytes of U8 instead of 48"),
        ({"nested_blocksize": 0}, "malformed (nested_blocksize 0)"),
        ({"nested_offset": "x"}, "malformed"),
        ({"nested_offset": ...}, "malformed ('nested_offset')"),
    ],
)
def test_broken_state_is_refused(base: Path, changes: dict[str, Any], words: str) -> None:
    edit_state(base, **changes)
    message = refusal(base)
    assert words in message and NAME in message


@pytest.mark.parametrize(
    "suffix", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"]
)
def test_missing_companion_is_refused(base: Path, suffix: str) -> None:
    edit(base, lambda tensors: tensors.pop(NAME + suffix) is None or tensors)
    assert f"{NAME}{suffix} is missing" in refusal(base)


def test_missing_state_leaves_foreign_tensors(base: Path) -> None:
    edit(base, lambda tensors: tensors.pop(STATE) is None or tensors)
    message = refusal(base)
    assert f"{NAME}.absmax" in message and "does not have" in message


def test_foreign_codebook_and_bad_json_are_refused(base: Path) -> None:
    edit(base, lambda tensors: tensors[f"{NAME}.quant_map"].neg_() is None or tensors)
    assert "quant_map is not bitsandbytes' nf4 codebook" in refusal(base)
    edit(base, lambda tensors: tensors | {STATE: torch.full((9,), 91, dtype=torch.uint8)})
    assert "not valid JSON" in refusal(base)
