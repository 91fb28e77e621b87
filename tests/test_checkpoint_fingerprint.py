"""The fingerprint: its exact definition, and that every format of one base has the same."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgelora.checkpoint import (
    FingerprintBuilder,
    merged_fingerprint,
    open_checkpoint,
    read_tokenizer,
)
from tiny import float_values, load_float, tiny_gguf, tiny_llama, tiny_qwen2, tiny_qwen3


class Words:
    """A vocabulary and nothing else."""

    def vocabulary(self) -> Mapping[str, int]:
        return {'é"': 1, "a": 0, "\n": 10}


def of(path: Path) -> str:
    checkpoint, builder = open_checkpoint(path), FingerprintBuilder()
    for name in checkpoint.names():
        builder.add(name, checkpoint.read(name))
    return builder.finish(read_tokenizer(path))


def test_definition() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    builder = FingerprintBuilder()
    builder.add("b", values)
    builder.add("a", values[0])
    tokens = hashlib.sha256('0 "a"\n1 "é\\""\n10 "\\n"\n'.encode()).hexdigest()
    lines = [
        "edgelora-base 1",
        f"a 3 {hashlib.sha256(values[0].tobytes()).hexdigest()}",
        f"b 2x3 {hashlib.sha256(values.tobytes()).hexdigest()}",
        f"tokenizer {tokens}",
    ]
    text = "".join(f"{line}\n" for line in lines)
    assert builder.finish(Words()) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_order_of_the_tensors_does_not_matter_but_a_name_counts_once() -> None:
    values = np.ones((4, 4), np.float32)
    one, other = FingerprintBuilder(), FingerprintBuilder()
    for name in "ab":
        one.add(name, values)
    for name in "ba":
        other.add(name, np.asfortranarray(values))
    assert one.finish(Words()) == other.finish(Words())
    with pytest.raises(ValueError, match="a was added already"):
        one.add("a", values)


def test_values_of_transformers_give_the_same(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    builder = FingerprintBuilder()
    for name, values in float_values(path).items():
        builder.add(name, values)
    assert builder.finish(read_tokenizer(path)) == of(path)


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_qwen3])
def test_gguf_and_its_dequantized_folder_have_the_same(
    make: type, kind: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "folder")
    architecture = make.__name__.removeprefix("tiny_")
    file = tiny_gguf(tmp_path / "x.gguf", kind, architecture=architecture, source=folder)
    quantized = open_checkpoint(file)
    save_file({n: quantized.read(n) for n in quantized.names()}, folder / "model.safetensors")
    assert of(folder) == of(file)


def test_sharding_and_a_wider_dtype_do_not_change_it(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base", dtype="bfloat16")
    before = of(path)
    load_float(path).save_pretrained(path, max_shard_size="60KB")
    (path / "model.safetensors").unlink()
    assert of(path) == before


def test_one_changed_value_or_token_changes_it(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    seen = {of(path)}
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][5] += 1e-6
    save_file(tensors, path / "model.safetensors")
    seen.add(of(path))
    description = json.loads((path / "tokenizer.json").read_text())
    description["added_tokens"][1]["content"] = "<|other|>"
    (path / "tokenizer.json").write_text(json.dumps(description))
    seen.add(of(path))
    assert len(seen) == 3


def test_merging_changes_it_by_the_adapter() -> None:
    assert merged_fingerprint("sha256:a", "sha256:b") != merged_fingerprint("sha256:a", "sha256:c")
