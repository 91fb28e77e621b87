"""Which reader a path needs, decided by what is there."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora.checkpoint.bitsandbytes import BitsAndBytesCheckpoint
from edgelora.checkpoint.gguf import GgufCheckpoint
from edgelora.checkpoint.gguf_file import read_gguf
from edgelora.checkpoint.protocol import Checkpoint
from edgelora.checkpoint.safetensors import INDEX, SINGLE, SafetensorsCheckpoint
from edgelora.config import read_config
from edgelora.errors import EdgeLoraError
from edgelora.file_bytes import read_json
from edgelora.tokenizer import TOKENIZER_FILE, TokenizerFiles, from_folder, from_gguf

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The base at `path`: a Hugging Face folder (float or bitsandbytes 4-bit) or a GGUF file.

    Raises EdgeLoraError for anything else, for a model that is not supported and for damaged files.
    """
    path = Path(path)
    gguf = find_gguf(path)
    return GgufCheckpoint(gguf) if gguf else _open_folder(path)


def read_tokenizer(path: Path | str) -> TokenizerFiles:
    """The tokenizer of the base at `path`; a tokenizer.json beside a GGUF goes before its fields.

    Raises EdgeLoraError, with what to do, where there is none that EdgeLoRA understands.
    """
    path = Path(path)
    gguf = find_gguf(path)
    if gguf is None:
        return from_folder(path)
    if (gguf.parent / TOKENIZER_FILE).is_file():
        return from_folder(gguf.parent)
    return from_gguf(read_gguf(gguf).fields, gguf)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` means; None for a folder with config.json; else EdgeLoraError."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        _refuse_pickles([path])
        raise EdgeLoraError(
            f"{path}: not a base: give the folder with config.json, or a .gguf file"
        )
    if not path.is_dir():
        raise EdgeLoraError(f"{path}: no such file or folder")
    if (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise EdgeLoraError(f"{path}: {len(files)} GGUF files ({names}); name one of them")
    if (path / "adapter_config.json").is_file():
        raise EdgeLoraError(f"{path}: an adapter, not a base; give the base it was trained on")
    if not files:
        raise EdgeLoraError(f"{path}: neither config.json nor a .gguf file in this folder")
    return files[0]


def _open_folder(path: Path) -> Checkpoint:
    config_path = path / "config.json"
    values = read_json(config_path)
    generation_path = path / "generation_config.json"
    generation = read_json(generation_path) if generation_path.is_file() else {}
    config = read_config(values, config_path, generation)
    if not (path / SINGLE).exists() and not (path / INDEX).exists():
        _refuse_pickles(sorted(path.iterdir()))
        hint = "; name the .gguf file itself" if any(path.glob("*.gguf")) else ""
        raise EdgeLoraError(f"{path}: neither {SINGLE} nor {INDEX} in this folder{hint}")
    name = _name(values, path)
    if _is_bitsandbytes(values, config_path):
        return BitsAndBytesCheckpoint(path, name, config)
    return SafetensorsCheckpoint(path, name, config)


def _name(values: Mapping[str, Any], path: Path) -> str:
    """The hub's name where the config has kept it; never a path of the machine it came from."""
    kept = values.get("_name_or_path")
    is_hub_name = isinstance(kept, str) and _HUB_NAME.fullmatch(kept)
    return str(kept) if is_hub_name else path.resolve().name


def _is_bitsandbytes(values: Mapping[str, Any], source: Path) -> bool:
    """Raises EdgeLoraError for any other quantization."""
    settings = values.get("quantization_config")
    if settings is None:
        return False
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method == "bitsandbytes" and settings.get("load_in_4bit") is True:
        return True
    kind = "bitsandbytes 8-bit" if method == "bitsandbytes" else method
    raise EdgeLoraError(
        f"{source}: quantization {kind} is not supported; EdgeLoRA reads float weights, "
        "bitsandbytes 4-bit and GGUF"
    )


def _refuse_pickles(paths: list[Path]) -> None:
    found = [path for path in paths if path.suffix in _PICKLES]
    if found:
        raise EdgeLoraError(
            f"{found[0]}: pickled weights are not read, since unpickling can run code; load the "
            "model with transformers on a machine you trust, and save_pretrained(folder) writes "
            "safetensors"
        )
