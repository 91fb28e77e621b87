"""Which reader opens what, and what is refused before any reader looks at it."""

import json
from pathlib import Path

import pytest

from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from tiny import edit_config, tiny_gguf, tiny_llama


def refusal(path: Path) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    (path / "model.safetensors").rename(path / name)
    for refused in (refusal(path), refusal(path / name)):
        assert f"{name}: pickled weights are not read, since unpickling can run code" in refused
        assert "save_pretrained(folder) writes safetensors" in refused


def test_missing_things_are_named(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    assert "neither config.json nor a .gguf file" in refusal(tmp_path)
    (tmp_path / "note.txt").write_text("x")
    assert "not a base" in refusal(tmp_path / "note.txt")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "an adapter, not a base" in refusal(tmp_path)
    path = tiny_llama(tmp_path / "base")
    (path / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(path)
    (path / "x.gguf").write_bytes(b"")
    assert "name the .gguf file itself" in refusal(path)


def test_folder_with_one_gguf_is_opened_and_with_two_refused(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "folder.gguf")
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / "one.gguf")
    checkpoint = open_checkpoint(tmp_path / "folder")
    assert (checkpoint.name, checkpoint.path.name) == ("one", "one.gguf")
    (tmp_path / "folder" / "two.gguf").write_bytes(b"")
    assert "2 GGUF files (one.gguf, two.gguf); name one of them" in refusal(tmp_path / "folder")


def test_broken_config_json_is_refused(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    (path / "config.json").write_text('{"architectures": ')
    assert "config.json: not valid JSON" in refusal(path)


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9]}))
    assert open_checkpoint(path).config.eos_token_ids == (1, 9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantization gptq is not supported"),
        ({"quant_method": "awq"}, "quantization awq is not supported"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit is not"),
        ("fp8", "quantization fp8 is not supported"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    settings: object, words: str, tmp_path: Path
) -> None:
    path = tiny_llama(tmp_path / "base")
    edit_config(path, quantization_config=settings)
    assert words in refusal(path)


@pytest.mark.parametrize(
    ("kept", "name"),
    [
        ("owner/model-1.5B", "owner/model-1.5B"),
        ("/home/someone/secret", "base"),
        ("./here/model", "base"),
        ("C:\\models\\x", "base"),
        (None, "base"),
    ],
)
def test_name_is_the_hubs_and_never_a_path(kept: object, name: str, tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "base")
    edit_config(path, _name_or_path=kept)
    assert open_checkpoint(path).name == name
