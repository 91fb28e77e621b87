"""GGUF: values as the gguf package dequantizes them, codes that give them exactly, refusals."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgelora.checkpoint import open_checkpoint
from edgelora.checkpoint.gguf_config import llama3_factors
from edgelora.config import RopeScaling
from edgelora.errors import EdgeLoraError
from edgelora.quantize.matrix import Int4Matrix, Int8Matrix
from tiny import float_values, tiny_gguf, tiny_llama, tiny_llama3_rope, tiny_qwen2, tiny_qwen3

MAKERS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)


def refusal(path: Path) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def rounded(values: np.ndarray, kind: str) -> np.ndarray:
    """What is left of float32 values after quantization to a ggml type, rows in their order."""
    if values.ndim == 1 or kind == "F32":
        return values
    number = gguf.GGMLQuantizationType[kind]
    dequantized: np.ndarray = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
    return dequantized


def from_codes(matrix: Int4Matrix | Int8Matrix) -> np.ndarray:
    """The formulas of ARCHITECTURE.md, in float32."""

    def spread(per_block: np.ndarray) -> np.ndarray:
        return np.repeat(per_block.astype(np.float32), matrix.block_size, axis=1)

    codes = matrix.codes.astype(np.float32)
    if isinstance(matrix, Int8Matrix):
        return spread(matrix.scales) * codes
    if matrix.offsets is None:
        return spread(matrix.scales) * (codes - np.float32(8))
    return spread(matrix.scales) * codes + spread(matrix.offsets)


@pytest.mark.parametrize("architecture", MAKERS)
@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("F32", None),
        ("F16", None),
        ("BF16", None),
        ("Q4_0", "int4"),
        ("Q4_1", "int4"),
        ("Q8_0", "int8"),
        ("Q5_0", None),
        ("Q5_1", None),
    ],
)
def test_values_and_codes_are_the_files(
    architecture: str, kind: str, stored: str | None, tmp_path: Path
) -> None:
    source = MAKERS[architecture](tmp_path / "source")
    path = tiny_gguf(tmp_path / "x.gguf", kind, architecture=architecture, source=source)
    checkpoint, expected = open_checkpoint(path), float_values(source)
    assert checkpoint.config == open_checkpoint(source).config
    assert list(checkpoint.names()) == sorted(expected)
    for name, values in expected.items():
        wanted = rounded(values, kind)
        assert np.array_equal(checkpoint.read(name), wanted), name
        assert checkpoint.shape(name) == wanted.shape
        assert checkpoint.stored_as(name) == (stored if wanted.ndim == 2 else None)
        matrix = checkpoint.read_quantized(name)
        if checkpoint.stored_as(name) is None:
            assert matrix is None
        else:
            assert matrix is not None and not hasattr(matrix, "absmax_table")
            assert np.array_equal(from_codes(matrix), wanted), name


def test_codes_have_our_dtypes(tmp_path: Path) -> None:
    types = {"token_embd.weight": "Q8_0", "": "Q4_1"}
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "x.gguf", types))
    linear = checkpoint.read_quantized("model.layers.0.mlp.down_proj.weight")
    assert isinstance(linear, Int4Matrix) and linear.offsets is not None
    assert linear.codes.dtype == np.uint8 and linear.codes.max() <= 15
    assert linear.scales.dtype == linear.offsets.dtype == np.float16
    assert linear.scales.shape == linear.offsets.shape == (64, 3) and linear.block_size == 32
    embedding = checkpoint.read_quantized("model.embed_tokens.weight")
    assert isinstance(embedding, Int8Matrix) and embedding.codes.dtype == np.int8


def test_nibbles_are_in_ggufs_order() -> None:
    from edgelora.checkpoint.gguf import _int4

    block = struct.pack("<e", 0.5) + bytes(i | (15 - i) << 4 for i in range(16))
    codes = _int4(np.frombuffer(block, np.uint8).reshape(1, -1), has_offsets=False).codes
    assert codes.tolist() == [[*range(16), *range(15, -1, -1)]]


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS"])
def test_other_types_are_read_through_the_gguf_package(kind: str, tmp_path: Path) -> None:
    """Rows of 256; the bytes are random, since the package quantizes to few types."""
    source = tiny_llama(tmp_path / "s", hidden_size=256, intermediate_size=256, head_dim=64)
    path = tiny_gguf(tmp_path / "x.gguf", "Q8_0", source=source)
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, (256, 256 // block * size)).astype(np.uint8)
    replaced = rewrite(path, {"blk.0.attn_output.weight": (raw, number)})
    checkpoint = open_checkpoint(replaced)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert np.array_equal(checkpoint.read(name), gguf.quants.dequantize(raw, number))
    assert checkpoint.read_quantized(name) is None


def rewrite(
    path: Path,
    tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """A copy of a GGUF with other tensors, without some fields or tensors."""
    reader, copy = gguf.GGUFReader(path), path.with_name("copy.gguf")
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (*without, "general.architecture"):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        data, kind = (tensors or {}).get(tensor.name, (tensor.data, tensor.tensor_type))
        if tensor.name not in without:
            writer.add_tensor(tensor.name, np.array(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def test_biases_of_llama_are_found_and_put_in_order(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", attention_bias=True, mlp_bias=True)
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "x.gguf", "Q8_0", source=source))
    assert checkpoint.config == open_checkpoint(source).config
    expected = float_values(source)
    for name in (n for n in expected if n.endswith(".bias")):
        assert np.array_equal(checkpoint.read(name), expected[name]), name


def test_llama3_factors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    plain = {"head_dim": 64, "rope_theta": 500000.0, "max_position_embeddings": 131072}
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    unscaled, _ = ROPE_INIT_FUNCTIONS["default"](LlamaConfig(**plain), "cpu")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**plain, rope_scaling=scaling), "cpu")
    ours = llama3_factors(500000.0, 64, RopeScaling(32.0, 1.0, 4.0, 8192))
    assert np.allclose((unscaled / scaled).numpy(), ours, rtol=1e-5, atol=0)


def with_rope_factors(tmp_path: Path, factors: np.ndarray) -> Path:
    source = tiny_llama3_rope(tmp_path / "source")
    return tiny_gguf(
        tmp_path / "x.gguf", source=source, extra={"rope_freqs.weight": factors.astype(np.float32)}
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_of_llama3_become_its_parameters(factor: float, tmp_path: Path) -> None:
    wanted = RopeScaling(factor, 1.0, 4.0, 8192)
    path = with_rope_factors(tmp_path, llama3_factors(500000.0, 16, wanted))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope_scaling == wanted and checkpoint.config.tie_word_embeddings
    assert "rope_freqs.weight" not in checkpoint.names()


def test_other_rope_factors_are_refused_and_ones_pass(tmp_path: Path) -> None:
    assert open_checkpoint(with_rope_factors(tmp_path, np.ones(8))).config.rope_scaling is None
    wrong = llama3_factors(500000.0, 16, LLAMA3) * np.linspace(1, 1.01, 8)
    assert "rope_freqs.weight is not Llama 3's" in refusal(with_rope_factors(tmp_path, wrong))
    assert "rope_freqs.weight must be F32 [8]" in refusal(with_rope_factors(tmp_path, np.ones(4)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn' is not supported"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type = 'linear'"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping = 30.0"),
        ({"llama.new.b": 1, "llama.new.a": 1}, "llama.new.a, llama.new.b: not known to EdgeLoRA"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count must be the head's 16"),
        ({"split.count": 2}, "one part of a split model; join it"),
    ],
)
def test_what_changes_the_arithmetic_is_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(tiny_gguf(tmp_path / "x.gguf", fields=fields))


def test_what_is_switched_off_passes(tmp_path: Path) -> None:
    fields = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "split.count": 1}
    path = tiny_gguf(tmp_path / "x.gguf", fields=fields)
    assert open_checkpoint(path).config == open_checkpoint(tmp_path / "x-source").config


def test_a_window_makes_llama_a_mistral(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", fields={"llama.attention.sliding_window": 8})
    found = open_checkpoint(path).config
    assert (found.architecture, found.sliding_window) == ("mistral", 8)
    path = tiny_gguf(
        tmp_path / "y.gguf",
        architecture="qwen2",
        fields={"qwen2.attention.sliding_window": 8},
    )
    assert "attention.sliding_window is not supported for this" in refusal(path)


def test_every_end_token_is_read(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", fields={"tokenizer.ggml.eot_token_id": 7})
    assert open_checkpoint(path).config.eos_token_ids == (1, 7)


def test_other_architectures_are_refused_with_the_list(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    message = refusal(path)
    assert "architecture gemma2 is not supported" in message
    assert "Qwen3ForCausalLM (in GGUF: llama, qwen2, qwen3)" in message


def test_missing_keys_and_tensors_are_named(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    message = refusal(rewrite(path, without=("llama.block_count", "llama.embedding_length")))
    assert "llama.block_count is missing" in message
    assert "llama.embedding_length is missing" in message
    message = refusal(rewrite(path, without=("blk.0.ffn_up.weight", "output_norm.weight")))
    assert "missing tensors: model.layers.0.mlp.up_proj.weight, model.norm.weight" in message


def test_unknown_tensors_are_all_named(tmp_path: Path) -> None:
    extra = {"blk.0.zebra.weight": np.ones(4, np.float32), "alpha": np.ones(4, np.float32)}
    message = refusal(tiny_gguf(tmp_path / "x.gguf", extra=extra))
    assert "tensors not known to EdgeLoRA: alpha, blk.0.zebra.weight" in message


def test_types_that_cannot_be_read_are_refused_by_name(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    raw = np.ones(64, np.int32)
    kind = gguf.GGMLQuantizationType.I32
    message = refusal(rewrite(path, {"output_norm.weight": (raw, kind)}))
    assert "types that EdgeLoRA cannot read: output_norm.weight (I32)" in message


def edited(path: Path, change: Callable[[bytearray], object]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", "Q4_0")
    data = path.read_bytes()
    last = data.rstrip(b"\0")
    for size in [*range(0, 400, 7), *range(400, len(last) - 1, 4001), len(last) - 1]:
        path.write_bytes(data[:size])
        refusal(path)
    assert "truncated" in refusal(path) and "download it again" in refusal(path)


def put(offset: int, form: str, *values: int) -> Callable[[bytearray], object]:
    return lambda data: struct.pack_into(form, data, offset, *values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(0, "<I", 0), "not a GGUF file"),
        (put(4, "<I", 1), "GGUF version 1 is not supported"),
        (put(4, ">I", 3), "GGUF big-endian is not supported"),
        (put(8, "<Q", 2**63), "truncated|unknown type|twice|dimensions|corrupt"),
        (put(16, "<Q", 2**63), "truncated|unknown type|twice|corrupt"),
        (put(24, "<Q", 2**62), "truncated"),
    ],
)
def test_broken_header_is_refused(
    change: Callable[[bytearray], object], words: str, tmp_path: Path
) -> None:
    path = edited(tiny_gguf(tmp_path / "x.gguf"), change)
    with pytest.raises(EdgeLoraError, match=words):
        open_checkpoint(path)


def at_tensor(name: str, after: int, form: str, value: int) -> Callable[[bytearray], object]:
    """Overwrites a number that lies `after` bytes behind a tensor's name in the header."""

    def change(data: bytearray) -> None:
        key = struct.pack("<Q", len(name)) + name.encode()
        struct.pack_into(form, data, data.index(key) + len(key) + after, value)

    return change


@pytest.mark.parametrize(
    ("after", "form", "value", "words"),
    [
        (0, "<I", 0, "has 0 dimensions"),
        (0, "<I", 9, "has 9 dimensions"),
        (4, "<Q", 63, "wrong shapes|overlaps"),
        (4, "<Q", 2**62, "truncated"),
        (4, "<Q", 0, "does not fit its type"),
        (12, "<I", 999, "has the unknown type 999"),
        (16, "<Q", 0, "overlaps another tensor"),
        (16, "<Q", 2**63, "truncated"),
    ],
)
def test_broken_tensor_entry_is_refused(
    after: int, form: str, value: int, words: str, tmp_path: Path
) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    edited(path, at_tensor("output_norm.weight", after, form, value))
    with pytest.raises(EdgeLoraError, match=words):
        open_checkpoint(path)


def test_names_given_twice_are_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf")
    one, other = b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"
    edited(path, lambda data: data.__setitem__(slice(None), data.replace(other, one)))
    assert "blk.0.ffn_up.weight is there twice" in refusal(path)


def test_odd_alignment_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "x.gguf", fields={"general.alignment": 24})
    assert "general.alignment = 24: must be a power of two" in refusal(path)


@pytest.mark.parametrize(
    ("file", "name"),
    [("Model-135M.Q4_1.gguf", "Model-135M"), ("m-f16.gguf", "m"), ("plain.gguf", "plain")],
)
def test_name_is_the_model_s_without_the_type(file: str, name: str, tmp_path: Path) -> None:
    assert open_checkpoint(tiny_gguf(tmp_path / file)).name == name
