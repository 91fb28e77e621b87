"""The tokenizer files of a base, from its folder or rebuilt from a GGUF's fields."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgelora.errors import EdgeLoraError
from edgelora.file_bytes import read_all, read_json
from edgelora.gguf_tokenizer import build_tokenizer, special_token

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_NAMES_IN_CONFIG = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a bundle holds of a tokenizer."""

    tokenizer_json: bytes  # Hugging Face tokenizers' format
    tokenizer_config: Mapping[str, Any]  # bos, eos and the like; no chat template
    chat_template: str | None  # Jinja source
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def vocabulary(self) -> Mapping[str, int]:
        """Token → id, added tokens included."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def encode(self, text: str) -> list[int]:
        """Token ids, none added at the ends."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def write(self, folder: Path) -> None:
        """tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja."""
        (folder / TOKENIZER_FILE).write_bytes(self.tokenizer_json)
        config = json.dumps(self.tokenizer_config, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / CONFIG_FILE).write_bytes(f"{config}\n".encode())
        if self.chat_template is not None:
            (folder / TEMPLATE_FILE).write_bytes(self.chat_template.encode())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer_json.decode())


def from_folder(folder: Path) -> TokenizerFiles:
    """From a Hugging Face folder. Raises EdgeLoraError if there is no tokenizer.json."""
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise EdgeLoraError(f"{folder}: no {TOKENIZER_FILE}; {_how_to_create(folder)}")
    data = read_all(file)
    tokenizer = _parse(data, file)
    config_file = folder / CONFIG_FILE
    config = read_json(config_file) if config_file.is_file() else {}
    bos = _id_in_config(config, "bos_token", tokenizer)
    eos = _id_in_config(config, "eos_token", tokenizer)
    return TokenizerFiles(
        tokenizer_json=data,
        tokenizer_config={k: v for k, v in config.items() if k != "chat_template"},
        chat_template=_read_template(folder, config),
        bos_token_id=bos,
        eos_token_ids=() if eos is None else (eos,),
    )


def _how_to_create(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        how = "its sentencepiece model must be converted"
    else:
        how = "create it"
    return (
        f"{how}: AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder) "
        "in transformers writes it"
    )


def _parse(data: bytes, file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises bare Exceptions
        raise EdgeLoraError(f"{file}: not a tokenizer ({error}); download it again") from None


def _id_in_config(config: Mapping[str, Any], name: str, tokenizer: Tokenizer) -> int | None:
    """The id of a token that the config names, as a string or as an added-token object."""
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """From the first of chat_template.jinja, chat_template.json, tokenizer_config.json."""
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return _read_text(file)
    source_file = folder / _TEMPLATE_JSON
    if source_file.is_file():
        return _default_template(read_json(source_file).get("chat_template"), source_file)
    return _default_template(config.get("chat_template"), folder / CONFIG_FILE)


def _read_text(file: Path) -> str:
    try:
        return read_all(file).decode()
    except UnicodeDecodeError as error:
        raise EdgeLoraError(f"{file}: not UTF-8 ({error}); download it again") from None


def _default_template(template: Any, source: Path) -> str | None:
    """A template, or the one named "default" of several."""
    if template is None or isinstance(template, str):
        return template
    try:
        named = {entry["name"]: entry["template"] for entry in template}
        return str(named["default"])
    except (KeyError, TypeError):
        raise EdgeLoraError(
            f'{source}: chat_template is neither a string nor a list with one named "default"'
        ) from None


def from_gguf(fields: Mapping[str, Any], source: Path) -> TokenizerFiles:
    """From the fields of the GGUF file `source`. Raises EdgeLoraError for unsupported kinds."""
    tokenizer = build_tokenizer(fields, source)
    special = {name: special_token(fields, name) for name in _NAMES_IN_CONFIG}
    config = {
        _NAMES_IN_CONFIG[name]: found[1] for name, found in special.items() if found is not None
    }
    stops = [special_token(fields, name) for name in ("eos", "eot", "eom")]
    return TokenizerFiles(
        tokenizer_json=tokenizer.to_str().encode(),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **config},
        chat_template=fields.get("tokenizer.chat_template"),
        bos_token_id=special["bos"][0] if special["bos"] else None,
        eos_token_ids=tuple(dict.fromkeys(stop[0] for stop in stops if stop)),
    )
