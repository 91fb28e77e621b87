"""Hugging Face folders: values as transformers reads them; every damage refused in one line."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from tiny import (
    edit_config,
    float_values,
    load_float,
    tiny_llama,
    tiny_llama3_rope,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

MAKERS = [tiny_llama, tiny_llama3_rope, tiny_mistral, tiny_qwen2, tiny_qwen3]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refusal(path: Path) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def check_equals_transformers(path: Path) -> None:
    checkpoint, expected = open_checkpoint(path), float_values(path)
    assert list(checkpoint.names()) == sorted(expected)
    for name, values in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32 and checkpoint.shape(name) == values.shape
        assert np.array_equal(found.view(np.uint32), values.view(np.uint32)), name
        assert checkpoint.read_quantized(name) is None and checkpoint.stored_as(name) is None


@pytest.mark.parametrize("make", MAKERS)
def test_values_equal_those_of_transformers(make: Callable[[Path], Path], tmp_path: Path) -> None:
    check_equals_transformers(make(tmp_path / "base"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_floats_are_read_exactly(dtype: str, tmp_path: Path) -> None:
    check_equals_transformers(tiny_llama(tmp_path / "base", dtype=dtype))


def test_biases_everywhere_are_read(tmp_path: Path) -> None:
    check_equals_transformers(tiny_llama(tmp_path / "b", attention_bias=True, mlp_bias=True))


def test_bfloat16_special_values_are_read_exactly(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base", dtype="bfloat16")
    tensors = {n: v.to(torch.bfloat16) for n, v in load_float(path).state_dict().items()}
    special = torch.tensor([0.0, -0.0, 1e-40, 3e38, -3e38, float("inf")], dtype=torch.bfloat16)
    tensors["model.norm.weight"][: len(special)] = special
    save_torch(tensors, path / WEIGHTS, metadata={"format": "pt"})
    found = open_checkpoint(path).read("model.norm.weight")[: len(special)]
    assert np.array_equal(found.view(np.uint32), special.float().numpy().view(np.uint32))


def shard(path: Path, size: str = "60KB") -> Path:
    load_float(path).save_pretrained(path, max_shard_size=size)
    (path / WEIGHTS).unlink(missing_ok=True)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def test_sharded_folder_is_read(tmp_path: Path) -> None:
    check_equals_transformers(shard(tiny_llama(tmp_path / "base")))


@pytest.mark.parametrize(
    "outside", ["../other.safetensors", "/etc/passwd", "C:\\x.safetensors", "a\\..\\..\\b", ""]
)
def test_shard_outside_the_folder_is_refused(outside: str, tmp_path: Path) -> None:
    path = shard(tiny_llama(tmp_path / "base"))
    edit_index(path, lambda weight_map: {**weight_map, "model.norm.weight": outside})
    assert f"the shard {outside!r} lies outside the folder" in refusal(path)


def edit_index(path: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    path = shard(tiny_llama(tmp_path / "base"))
    original = json.loads((path / INDEX).read_text())["weight_map"]
    edit_index(path, lambda m: {**m, "model.norm.weight": "no.safetensors"})
    assert "names the shard no.safetensors, which is missing" in refusal(path)
    edit_index(path, lambda m: {**original, "stranger": original["model.norm.weight"]})
    assert "not in the shards it names: stranger" in refusal(path)
    edit_index(path, lambda m: {n: s for n, s in original.items() if n != "model.norm.weight"})
    assert "tensors that it does not name: model.norm.weight in model-" in refusal(path)
    edit_index(path, lambda m: [])
    assert "has no weight_map" in refusal(path)


def test_missing_extra_and_misshapen_tensors_are_named_at_once(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    tensors = load_file(path / WEIGHTS)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.stranger"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = np.zeros((3, 64), np.float32)
    save_file(tensors, path / WEIGHTS)
    message = refusal(path)
    assert "missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "tensors that this architecture does not have: model.stranger" in message
    assert "lm_head.weight is [3, 64] instead of [384, 64]" in message


def test_stored_rotary_frequencies_are_no_extra(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path / WEIGHTS), name: np.ones(8, np.float32)}, path / WEIGHTS)
    assert name not in open_checkpoint(path).names()


def test_tied_head_must_equal_the_embedding_where_it_is_stored(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(path / WEIGHTS)
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, path / WEIGHTS)
    assert "lm_head.weight" not in open_checkpoint(path).names()
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, path / WEIGHTS)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(path)


def test_untied_head_must_be_there(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    edit_config(path, tie_word_embeddings=False)
    assert "missing tensors: lm_head.weight" in refusal(path)


def test_integers_where_floats_belong_are_refused(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"] = np.ones(64, np.int32)
    save_file(tensors, path / WEIGHTS)
    assert "not float tensors: model.norm.weight (I32)" in refusal(path)


def test_absurd_number_of_layers_is_refused_at_once(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    edit_config(path, num_hidden_layers=10**15)
    assert "cannot be 1000000000000000 layers" in refusal(path)


def with_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> str:
    """The refusal of a weight file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    (path / WEIGHTS).write_bytes(size + text + data)
    return refusal(path)


def entry(begin: int, end: int, **changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **changes}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "base")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object, not a list"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "given twice: a"),
        (b"[" * 100000, "not valid JSON"),
        ({"a": 1}, "the header's entry for a is malformed"),
        ({"a": entry(0, 4, shape="1")}, "the header's entry for a is malformed"),
        ({"a": entry(0, 4, shape=[-1])}, "the header's entry for a is malformed"),
        ({"a": entry(0, 4, shape=[True])}, "the header's entry for a is malformed"),
        ({"a": entry(0, 4, dtype=["F32"])}, "the header's entry for a is malformed"),
        ({"a": entry(0, 4, dtype="F3")}, "a has the unknown dtype F3"),
        ({"a": entry(0, 4, shape=[2**70])}, "a has 4 bytes, not F32"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "overlaps another tensor"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, "leaves a gap"),
        ({"a": entry(0, 2**60)}, "truncated"),
        ({"a": entry(0, 4)}, "longer than its header says: "),
    ],
)
def test_broken_header_is_refused(base: Path, header: object, words: str) -> None:
    assert words in with_header(base, header, data=b"\0" * 12)


def test_header_longer_than_the_file_or_the_format_allows_is_refused(base: Path) -> None:
    assert "truncated" in with_header(base, {}, length=10_000)
    assert "not a safetensors file" in with_header(base, {}, length=2**63)
    (base / WEIGHTS).write_bytes(b"123")
    assert "truncated: 8 bytes are needed and the file has 3" in refusal(base)


def test_truncated_and_lengthened_files_are_refused(base: Path) -> None:
    data = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(data[:-1])
    assert "truncated: " in refusal(base) and "download it again" in refusal(base)
    (base / WEIGHTS).write_bytes(data + b"\0")
    assert "longer than its header says" in refusal(base)


def test_file_cut_after_opening_is_refused_when_read(base: Path) -> None:
    checkpoint = open_checkpoint(base)
    data = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(data[:2000])
    with pytest.raises(EdgeLoraError, match="truncated"):
        for name in checkpoint.names():
            checkpoint.read(name)
