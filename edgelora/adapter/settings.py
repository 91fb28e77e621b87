"""adapter_config.json as `Settings`: every field is exported, harmless or refused by name.

Field names, defaults and meanings are those of PEFT 0.21.2 (`peft/tuners/lora/config.py`).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelora.adapter.ledger import LedgerEntry, exported, harmless, refused

Tokens = Mapping[str, tuple[int, ...]]  # end of a module's path → token ids


@dataclass(frozen=True)
class Settings:
    """The fields that decide the arithmetic, under PEFT's names where they keep PEFT's meaning."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    bias: str  # "none", "all" or "lora_only": whose biases were trained
    lora_bias: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]  # a string is a regex or "all-linear"
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: int | tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Tokens


Check = Callable[[Any], bool]

CHANGED_BASE = (
    "belongs to a changed base; PEFT's save_pretrained makes it plain LoRA if it is given "
    "path_initial_model_for_weight_conversion"
)

HARMLESS = {
    "auto_mapping": "names Python classes",
    "base_model_name_or_path": "compared with the base's name",
    "corda_config": "used only by init_lora_weights = corda",
    "eva_config": "decides how A starts, not what it means",
    "inference_mode": "training only",
    "lora_dropout": "training only",
    "lora_ga_config": "used only by init_lora_weights = lora_ga",
    "loftq_config": "used only by init_lora_weights = loftq",
    "megatron_core": "used only with megatron_config",
    "peft_version": "for people",
    "qalora_group_size": "used only with use_qalora",
    "revision": "for people; the fingerprint binds the base",
    "runtime_config": "ignored by PEFT too",
    "task_type": "chooses a wrapper class of PEFT",
}

# field: (the values that mean "off", why it is refused otherwise)
REFUSED_UNLESS_OFF: dict[str, tuple[tuple[object, ...], str]] = {
    "alora_invocation_tokens": (
        (None,),
        "activated LoRA is not supported: its branch must start at the invocation",
    ),
    "arrow_config": ((None,), "Arrow routing is not supported"),
    "enable_lora": ((None,), "PEFT's old merged linear is not supported"),
    "ensure_weight_tying": ((False, None), "tied embedding adapters are not supported"),
    "fan_in_fan_out": ((False, None), "transposed base weights (Conv1D) are not supported"),
    "kasa_config": ((None,), "KaSA changes the base weights; not supported"),
    "layer_replication": ((None, []), "repeated layers are not supported"),
    "megatron_config": ((None, {}), "Megatron's parallel layers are not supported"),
    "merge_weights": ((False, None), "PEFT's old merging during training is not supported"),
    "monteclora_config": ((None,), "MonteCLoRA is not supported"),
    "target_parameters": ((None, []), "LoRA on bare parameters (experts) is not supported"),
    "use_bdlora": ((None, False), "block-diagonal LoRA is not supported"),
    "use_qalora": ((False, None), "QA-LoRA is not supported"),
    "velora_config": ((None,), "VeLoRA is not supported"),
}

# PEFT subtracts what these start with from the base weights: the adapter fits that base only.
BASE_CHANGING_INITS = re.compile(r"(pissa.*|olora|corda.*|loftq|lora_ga)", re.IGNORECASE)
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: Any) -> bool:
    """False for NaN and for what float32 cannot hold."""
    return type(value) in (int, float) and 0 < value < 1e38


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_text_or_names(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_layers(value: object) -> bool:
    return type(value) is int or (
        isinstance(value, list) and all(type(index) is int for index in value)
    )


TOKEN_MODULES = ("model.embed_tokens", "lm_head")  # that have a row for each token


def _is_tokens(value: object) -> bool:
    """PEFT looks for the modules whose paths end with a name."""
    if isinstance(value, dict):
        known = all(any(m.endswith(name) for m in TOKEN_MODULES) and name for name in value)
        return known and all(_is_token_list(each) for each in value.values())
    return _is_token_list(value)


def _is_token_list(value: object) -> bool:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        return False
    return len(set(value)) == len(value) and all(0 <= token < 2**31 for token in value)


def _is_map_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(each) for each in value.values())


# field: (PEFT's default, check, what the value must be)
EXPORTED: dict[str, tuple[Any, Check, str]] = {
    "peft_type": (None, lambda value: value == "LORA", "only LORA is supported"),
    "r": (8, _is_rank, "the rank must be a positive integer"),
    "lora_alpha": (8, _is_alpha, "must be a positive finite number"),
    "use_rslora": (False, _is_flag, "must be true or false"),
    "use_dora": (False, _is_flag, "must be true or false"),
    "bias": (
        "none",
        lambda value: value in ("none", "all", "lora_only"),
        "must be none, all or lora_only",
    ),
    "lora_bias": (False, _is_flag, "must be true or false"),
    "rank_pattern": ({}, _is_map_of(_is_rank), "must map patterns to positive integers"),
    "alpha_pattern": ({}, _is_map_of(_is_alpha), "must map patterns to positive finite numbers"),
    "target_modules": (
        None,
        _is_text_or_names,
        "must be a list of names or a regex; save the adapter with PEFT again",
    ),
    "exclude_modules": ([], _is_text_or_names, "must be a list of names or a regex"),
    "layers_to_transform": ([], _is_layers, "must be a layer index or a list of them"),
    "layers_pattern": ([], _is_text_or_names, "must be a name or a list of names"),
    "modules_to_save": ([], _is_names, "must be a list of names"),
    "trainable_token_indices": (
        [],
        _is_tokens,
        "must be a list of different token ids, or map embed_tokens and lm_head to such lists",
    ),
}


def read_settings(config: Mapping[str, Any]) -> tuple[Settings | None, list[LedgerEntry]]:
    """Settings (None if a field that they need is bad) and the ledger of every field."""
    values = {
        name: _or_default(config.get(name), default) for name, (default, _, _) in EXPORTED.items()
    }
    ledger = [_check_exported(name, value) for name, value in values.items()]
    ledger += [
        _check_other(name, value) for name, value in sorted(config.items()) if name not in EXPORTED
    ]
    ledger += _check_together(config, values)
    broken = {entry.item.split(" ")[0] for entry in ledger if entry.verdict == "refused"}
    return (None if broken & EXPORTED.keys() else _settings(values)), ledger


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_exported(name: str, value: Any) -> LedgerEntry:
    _, check, expected = EXPORTED[name]
    item = f"{name} = {_short(value)}"
    return exported(item, "resolved as PEFT does") if check(value) else refused(item, expected)


def _check_other(name: str, value: Any) -> LedgerEntry:
    item = f"{name} = {_short(value)}"
    if name == "init_lora_weights":
        return _check_init(item, value)
    if name in HARMLESS:
        return harmless(item, HARMLESS[name])
    if name not in REFUSED_UNLESS_OFF:
        return refused(item, "not a field of PEFT 0.21.2's LoraConfig, so its meaning is unknown")
    off, reason = REFUSED_UNLESS_OFF[name]
    is_off = any(type(value) is type(each) and value == each for each in off)
    return harmless(item, "off") if is_off else refused(item, reason)


def _check_init(item: str, value: Any) -> LedgerEntry:
    if isinstance(value, str) and BASE_CHANGING_INITS.fullmatch(value):
        return refused(item, CHANGED_BASE)
    if value is None or (isinstance(value, bool | str) and value in PLAIN_INITS):
        return harmless(item, "leaves the base as it is")
    return refused(item, "an unknown initialization may have changed the base")


def _check_together(config: Mapping[str, Any], values: Mapping[str, Any]) -> list[LedgerEntry]:
    """PEFT's own rules for fields that exclude each other."""
    entries = []
    if values["use_dora"] is True and values["lora_bias"] is True:
        entries.append(refused("lora_bias", "PEFT allows it only without use_dora"))
    is_regex = isinstance(values["target_modules"], str)
    for name in ("layers_to_transform", "layers_pattern"):
        if is_regex and config.get(name) is not None:
            entries.append(refused(name, "PEFT allows it only with a list of target_modules"))
    if values["layers_pattern"] and config.get("layers_to_transform") is None:
        entries.append(refused("layers_pattern", "PEFT allows it only with layers_to_transform"))
    return entries


def _settings(values: Mapping[str, Any]) -> Settings:
    layers = values["layers_to_transform"]
    pattern = values["layers_pattern"]
    return Settings(
        rank=values["r"],
        alpha=float(values["lora_alpha"]),
        use_rslora=values["use_rslora"],
        use_dora=values["use_dora"],
        bias=values["bias"],
        lora_bias=values["lora_bias"],
        rank_pattern=values["rank_pattern"],
        alpha_pattern=values["alpha_pattern"],
        target_modules=_frozen(values["target_modules"]),
        exclude_modules=_frozen(values["exclude_modules"]),
        layers_to_transform=layers if isinstance(layers, int) else (tuple(layers) or None),
        layers_pattern=((pattern,) if pattern else ())
        if isinstance(pattern, str)
        else tuple(pattern),
        modules_to_save=tuple(values["modules_to_save"]),
        trainable_token_indices=_tokens(values["trainable_token_indices"]),
    )


def _tokens(value: list[int] | dict[str, list[int]]) -> Tokens:
    """A list means those of the embedding."""
    by_module = value if isinstance(value, dict) else {"embed_tokens": value}
    return {name: tuple(tokens) for name, tokens in by_module.items() if tokens}


def _frozen(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
