"""A GGUF file as a Checkpoint.

Carried code for code, block 32, block = d [m] qs:
  Q4_0  float16 d, 16 bytes qs             w = d·(code − 8)
  Q4_1  float16 d, float16 m, 16 bytes qs  w = d·code + m
  Q8_0  float16 d, 32 int8 qs              w = d·code
Byte i of a 4-bit block holds element i in its low nibble and element 16 + i in its high one.
All other types are dequantized by the `gguf` package.

llama.cpp rotates neighbouring pairs of q and k, Hugging Face halves of a head: its converter
interleaves the rows of each head of llama (not of qwen), and we undo that, for codes as for values.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edgelora.checkpoint.float_values import TO_FLOAT32
from edgelora.checkpoint.gguf_config import ROPE_FACTORS, huggingface_name, read_gguf_config
from edgelora.checkpoint.gguf_file import GgufFile, read_gguf
from edgelora.checkpoint.layout import check_layout
from edgelora.checkpoint.protocol import StoredAs
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.layout import expected_tensors
from edgelora.quantize import Int4Matrix, Int8Matrix, dequantize

BLOCK_SIZE = 32
_CARRIED: dict[GGMLQuantizationType, StoredAs] = {
    GGMLQuantizationType.Q4_0: "int4",
    GGMLQuantizationType.Q4_1: "int4",
    GGMLQuantizationType.Q8_0: "int8",
}
# what llama.cpp's users append: "model.Q4_K_M.gguf", "model-f16.gguf"
_TYPE_SUFFIX = re.compile(r"[.-](I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)
_PERMUTED = (".self_attn.q_proj.", ".self_attn.k_proj.")


class GgufCheckpoint:
    """One GGUF file. See `Checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, _TYPE_SUFFIX.sub("", path.stem)
        self._gguf = read_gguf(path)
        _refuse_split(self._gguf)
        self.config = read_gguf_config(self._gguf)
        self._stored = _stored_names(self._gguf)
        check_layout({n: self.shape(n) for n in self._stored}, self.config, path)
        _check_types(self._gguf)
        self._names = sorted(expected_tensors(self.config))

    def names(self) -> Sequence[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._gguf.tensors[self._stored[name]].shape

    def read(self, name: str) -> NDArray[np.float32]:
        matrix = self.read_quantized(name)
        if matrix is not None:  # in smaller steps than the gguf package's
            return dequantize(matrix)
        return _to_float32(self._rows(name), self._type(name)).reshape(self.shape(name))

    def stored_as(self, name: str) -> StoredAs | None:
        return _CARRIED.get(self._type(name)) if len(self.shape(name)) == 2 else None

    def read_quantized(self, name: str) -> Int4Matrix | Int8Matrix | None:
        match self.stored_as(name):
            case "int8":
                return _int8(self._rows(name))
            case "int4":
                has_offsets = self._type(name) is GGMLQuantizationType.Q4_1
                return _int4(self._rows(name), has_offsets=has_offsets)
        return None

    def _type(self, name: str) -> GGMLQuantizationType:
        return self._gguf.tensors[self._stored[name]].type

    def _rows(self, name: str) -> NDArray[np.uint8]:
        """uint8 [rows, bytes of a row], rows in Hugging Face's order; a vector has one row."""
        raw = self._gguf.raw(self._stored[name])
        heads = _permuted_heads(name, self.config, self._gguf)
        if heads is None:
            return raw
        order = huggingface_order(self.shape(name)[0], heads)
        if len(self.shape(name)) == 1:  # a bias: its "rows" are its elements
            return raw.reshape(len(order), -1)[order].reshape(1, -1)
        return raw[order]


def huggingface_order(rows: int, heads: int) -> NDArray[np.intp]:
    """Row i of Hugging Face's matrix is row order[i] of GGUF's: (2j, 2j + 1) → (j, half + j)."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _permuted_heads(name: str, config: ModelConfig, gguf: GgufFile) -> int | None:
    """The number of heads whose rows are interleaved, None where rows are in order."""
    if gguf.fields["general.architecture"] != "llama" or not any(p in name for p in _PERMUTED):
        return None
    return config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads


def _stored_names(gguf: GgufFile) -> dict[str, str]:
    """Hugging Face's name → GGUF's. Raises EdgeLoraError that names every tensor that has none."""
    names = {name: huggingface_name(name) for name in gguf.tensors if name != ROPE_FACTORS}
    unknown = sorted(name for name, theirs in names.items() if theirs is None)
    if unknown:
        raise EdgeLoraError(
            f"{gguf.file.path}: tensors not known to EdgeLoRA: {', '.join(unknown)}"
        )
    return {theirs: name for name, theirs in names.items() if theirs is not None}


def _refuse_split(gguf: GgufFile) -> None:
    if gguf.fields.get("split.count", 1) not in (0, 1):
        raise EdgeLoraError(
            f"{gguf.file.path}: one part of a split model; join it with `llama-gguf-split --merge`"
        )


def _check_types(gguf: GgufFile) -> None:
    """Every type must be a float or one that `gguf` dequantizes: tried on an empty array."""
    refused = sorted(
        f"{name} ({tensor.type.name})"
        for name, tensor in gguf.tensors.items()
        if tensor.type.name not in TO_FLOAT32 and not _dequantizes(tensor.type)
    )
    if refused:
        raise EdgeLoraError(
            f"{gguf.file.path}: types that EdgeLoRA cannot read: {', '.join(refused)}"
        )


def _dequantizes(kind: GGMLQuantizationType) -> bool:
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _to_float32(rows: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """float32 [rows, in_features]."""
    if kind.name in TO_FLOAT32:
        return TO_FLOAT32[kind.name](rows)
    values: NDArray[np.float32] = quants.dequantize(rows, kind)
    return values


def _split_blocks(rows: NDArray[np.uint8], bytes_of_block: int) -> NDArray[np.uint8]:
    """uint8 [rows, blocks, bytes_of_block]."""
    return rows.reshape(rows.shape[0], -1, bytes_of_block)


def _float16(blocks: NDArray[np.uint8], offset: int) -> NDArray[np.float16]:
    """The float16 at byte `offset` of each block, [rows, blocks]."""
    return np.ascontiguousarray(blocks[..., offset : offset + 2]).view("<f2")[..., 0]


def _int4(rows: NDArray[np.uint8], *, has_offsets: bool) -> Int4Matrix:
    header = 4 if has_offsets else 2  # bytes of d, or of d and m
    blocks = _split_blocks(rows, header + BLOCK_SIZE // 2)
    packed = blocks[..., header:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    return Int4Matrix(
        codes=codes.reshape(rows.shape[0], -1),
        scales=_float16(blocks, 0),
        block_size=BLOCK_SIZE,
        offsets=_float16(blocks, 2) if has_offsets else None,
    )


def _int8(rows: NDArray[np.uint8]) -> Int8Matrix:
    blocks = _split_blocks(rows, 2 + BLOCK_SIZE)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return Int8Matrix(codes.reshape(rows.shape[0], -1), _float16(blocks, 0), BLOCK_SIZE)
