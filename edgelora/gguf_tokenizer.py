"""The tokenizer that a GGUF file's fields describe, rebuilt in Hugging Face's format.

Only byte-level BPE (tokenizer.ggml.model "gpt2"). How a text is split before the merges is a name
in GGUF (tokenizer.ggml.pre); the splits are those of the models' own tokenizer.json.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from edgelora.errors import EdgeLoraError

_CONTROL, _USER_DEFINED, _UNUSED = (
    3,
    4,
    5,
)  # tokenizer.ggml.token_type; the rest is ordinary vocabulary
_HINT = "put the model's own tokenizer.json (and tokenizer_config.json) beside the GGUF file"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*first: Any, use_regex: bool) -> Any:
    """The splits in `first`, then bytes; use_regex adds GPT-2's own split."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*first, last]) if first else last


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


# tokenizer.ggml.pre → pre-tokenizer
_SPLITS: Mapping[str, Callable[[], Any]] = {
    "default": lambda: _byte_level(use_regex=True),
    "gpt-2": lambda: _byte_level(use_regex=True),
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: _byte_level(_split(_WORDS % "{1,3}"), use_regex=False),
    "qwen2": lambda: _byte_level(_split(_WORDS % ""), use_regex=False),
}
_WHOLE_WORDS_FIRST = (
    "llama-bpe",
)  # a word that is a token is taken whole, whatever the merges say
_COMPOSED = ("qwen2",)  # the model's own tokenizer normalizes to NFC
_ADDS_BOS = ("llama-bpe",)  # where tokenizer.ggml.add_bos_token is absent


def build_tokenizer(fields: Mapping[str, Any], source: Path) -> Tokenizer:
    """Raises EdgeLoraError for a kind that is not supported, by name, and for broken fields."""
    pre = _check_supported(fields, source)
    tokens, types = _read_tokens(fields, source)
    vocabulary = {t: i for i, t in enumerate(tokens) if types[i] != _UNUSED}
    unknown = _token(fields, "unknown", tokens)
    try:
        model = models.BPE(
            vocab=vocabulary,
            merges=_read_merges(fields, source),
            unk_token=unknown,
            fuse_unk=unknown is not None,
            ignore_merges=pre in _WHOLE_WORDS_FIRST,
        )
    except Exception as error:  # tokenizers raises bare Exceptions
        raise EdgeLoraError(f"{source}: tokenizer.ggml.merges: {error}; {_HINT}") from None
    tokenizer = Tokenizer(model)
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _SPLITS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(fields, pre, tokens)
    _add_tokens(tokenizer, tokens, types)
    return tokenizer


def special_token(fields: Mapping[str, Any], name: str) -> tuple[int, str] | None:
    """(id, token) of "bos", "eos", "unknown" or "padding", None where the file names none."""
    number = fields.get(f"tokenizer.ggml.{name}_token_id")
    tokens = fields["tokenizer.ggml.tokens"]
    if type(number) is not int or not 0 <= number < len(tokens):
        return None
    return number, tokens[number]


def _token(fields: Mapping[str, Any], name: str, tokens: list[str]) -> str | None:
    found = special_token(fields, name)
    return found[1] if found else None


def _check_supported(fields: Mapping[str, Any], source: Path) -> str:
    """tokenizer.ggml.pre, which says how a text is split."""
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2":
        raise EdgeLoraError(
            f"{source}: tokenizer model {model} is not rebuilt from a GGUF (only gpt2, byte-level "
            f"BPE); {_HINT}"
        )
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise EdgeLoraError(
            f"{source}: pre-tokenizer {pre} is not supported (only {', '.join(_SPLITS)}); {_HINT}"
        )
    return pre


def _read_tokens(fields: Mapping[str, Any], source: Path) -> tuple[list[str], list[int]]:
    """Tokens and their types, by id."""
    tokens = fields.get("tokenizer.ggml.tokens")
    types = fields.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens):
        raise EdgeLoraError(f"{source}: tokenizer.ggml.tokens is missing; {_HINT}")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise EdgeLoraError(f"{source}: tokenizer.ggml.token_type does not fit the tokens; {_HINT}")
    if len(set(tokens)) != len(tokens):
        raise EdgeLoraError(f"{source}: tokenizer.ggml.tokens has a token twice; {_HINT}")
    return tokens, types


def _read_merges(fields: Mapping[str, Any], source: Path) -> list[tuple[str, str]]:
    merges = fields.get("tokenizer.ggml.merges")
    pairs = [tuple(m.split(" ")) for m in merges] if isinstance(merges, list) else [()]
    if any(len(pair) != 2 for pair in pairs):
        raise EdgeLoraError(f"{source}: tokenizer.ggml.merges is missing or malformed; {_HINT}")
    return [(pair[0], pair[1]) for pair in pairs]


def _post_processor(fields: Mapping[str, Any], pre: str, tokens: list[str]) -> Any:
    """Adds the begin and end tokens where the checkpoint says so."""
    bos, eos = special_token(fields, "bos"), special_token(fields, "eos")
    before = [bos] if bos and fields.get("tokenizer.ggml.add_bos_token", pre in _ADDS_BOS) else []
    after = [eos] if eos and fields.get("tokenizer.ggml.add_eos_token", False) else []
    bytes_only = processors.ByteLevel(trim_offsets=False)
    if not before and not after:
        return bytes_only
    special = [(token, number) for number, token in {*before, *after}]
    first = [f"{token}" for _, token in before]
    last = [f"{token}" for _, token in after]
    template = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=special,
    )
    return processors.Sequence([bytes_only, template])


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text before it is split."""
    for wanted, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, special=is_special, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == wanted
        ]
        if is_special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
