"""adapter_config.json as `Settings`: every field is exported, harmless or refused by name.

Field names, defaults and meanings are those of PEFT 0.21.2 (`peft/tuners/lora/config.py`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgelora.adapter.fields import (
    MERGE,
    TRANSPOSED,
    Check,
    Fields,
    check_version,
    is_alpha,
    is_broken,
    is_flag,
    is_layers,
    is_map_of,
    is_names,
    is_ranges,
    is_rank,
    is_text_or_names,
)
from edgelora.adapter.ledger import LedgerEntry, harmless, refused

Tokens = Mapping[str, tuple[int, ...]]  # end of a module's path → token ids


@dataclass(frozen=True)
class Targeting:
    """Which modules an adapter changes: what the configs of several families have in common."""

    target_modules: str | tuple[str, ...]  # a string is a regex or "all-linear"
    target_parameters: tuple[str, ...] = ()  # ends of paths of weights, all layers
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Tokens = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings(Targeting):
    """The fields that decide the arithmetic, under PEFT's names where they keep PEFT's meaning."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    qalora_group_size: int | None  # None: not QA-LoRA
    bias: str  # "none", "all" or "lora_only": whose biases were trained
    lora_bias: bool
    ensure_weight_tying: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]


INVOCATION = "alora_invocation_tokens"
CHANGED_BASE = "made another base of the one it was given, and belongs to that"
CONVERT = (
    "in the process that trained it, model.save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=UNTRAINED) makes plain LoRA of it (UNTRAINED: the "
    "adapter saved before training, with init_lora_weights = True)"
)
KEEP_BASE = (
    "model.unload().save_pretrained(BASE) saves that base: export it, with init_lora_weights set "
    "to true in adapter_config.json"
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
    "revision": "for people; the fingerprint binds the base",
    "runtime_config": "ignored by PEFT too",
    "task_type": "chooses a wrapper class of PEFT",
}

# field: (the values that mean "off", why it is refused otherwise)
REFUSED_UNLESS_OFF: dict[str, tuple[tuple[object, ...], str]] = {
    "arrow_config": (
        (None,),
        "Arrow mixes adapters anew for each token: export them one by one, without arrow_config",
    ),
    "enable_lora": ((None,), "MergedLinear of an old PEFT: train the adapter anew"),
    "fan_in_fan_out": ((False, None), TRANSPOSED),
    "kasa_config": ((None,), f"KaSA changes the base weights: {MERGE}"),
    "megatron_config": (
        (None, {}),
        "Megatron's parallel layers: where the base has none it does nothing, set it to null",
    ),
    "merge_weights": (
        (False, None),
        "of an old PEFT, which merged while it evaluated: set it to false if the base was saved "
        "unmerged",
    ),
    "monteclora_config": ((None,), f"MonteCLoRA draws its factors from distributions: {MERGE}"),
    "use_bdlora": ((None, False), f"block-diagonal LoRA: {MERGE}"),
    "velora_config": ((None,), f"VeLoRA: {MERGE}"),
}

# PEFT subtracts what these start with from the base weights: the adapter fits that base only.
BASE_CHANGING_INITS = re.compile(r"(pissa.*|olora|corda.*|loftq|lora_ga)", re.IGNORECASE)
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")


TOKEN_MODULES = ("model.embed_tokens", "lm_head")  # that have a row for each token


def _is_tokens(value: object) -> bool:
    """PEFT looks for the modules whose paths end with a name."""
    if isinstance(value, dict):
        known = all(any(m.endswith(name) for m in TOKEN_MODULES) and name for name in value)
        return known and all(_is_token_list(each) for each in value.values())
    return _is_token_list(value)


def _is_token_list(value: object, *, unique: bool = True) -> bool:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        return False
    distinct = not unique or len(set(value)) == len(value)
    return distinct and all(0 <= token < 2**31 for token in value)


def _is_weights(value: Any) -> bool:
    return is_names(value) and all(re.fullmatch(r".*[^.]\.weight", name) for name in value)


# field: (PEFT's default, check, what the value must be)
EXPORTED: dict[str, tuple[Any, Check, str]] = {
    "peft_type": (None, lambda value: value == "LORA", "only LORA is supported"),
    "r": (8, is_rank, "the rank must be a positive integer"),
    "lora_alpha": (8, is_alpha, "must be a positive finite number"),
    "use_rslora": (False, is_flag, "must be true or false"),
    "use_dora": (False, is_flag, "must be true or false"),
    "use_qalora": (False, is_flag, "must be true or false"),
    "qalora_group_size": (16, is_rank, "must be a positive integer"),
    "bias": (
        "none",
        lambda value: value in ("none", "all", "lora_only"),
        "must be none, all or lora_only",
    ),
    "lora_bias": (False, is_flag, "must be true or false"),
    "ensure_weight_tying": (False, is_flag, "must be true or false"),
    INVOCATION: (
        (),
        lambda value: value == () or (_is_token_list(value, unique=False) and bool(value)),
        "must be null or a list of token ids",
    ),
    "rank_pattern": ({}, is_map_of(is_rank), "must map patterns to positive integers"),
    "alpha_pattern": ({}, is_map_of(is_alpha), "must map patterns to positive finite numbers"),
    "target_modules": (
        None,
        is_text_or_names,
        "must be a list of names or a regex; save the adapter with PEFT again",
    ),
    "target_parameters": (
        [],
        _is_weights,
        "must be a list of weights (q_proj.weight): no supported base has other matrices, such as "
        "experts",
    ),
    "exclude_modules": ([], is_text_or_names, "must be a list of names or a regex"),
    "layer_replication": ([], is_ranges, "must be a list of pairs: first layer, end"),
    "layers_to_transform": ([], is_layers, "must be a layer index or a list of them"),
    "layers_pattern": ([], is_text_or_names, "must be a name or a list of names"),
    "modules_to_save": ([], is_names, "must be a list of names"),
    "trainable_token_indices": (
        [],
        _is_tokens,
        "must be a list of different token ids, or map embed_tokens and lm_head to such lists",
    ),
}


def read_settings(config: Mapping[str, Any]) -> tuple[Settings | None, list[LedgerEntry]]:
    """Settings (None if a field that they need is bad) and the ledger of every field."""
    values = FIELDS.values(config)
    ledger = FIELDS.ledger(config) + _check_together(config, values)
    return (None if is_broken(FIELDS, ledger) else _settings(values)), ledger


def _check_init(item: str, value: Any) -> LedgerEntry:
    if isinstance(value, str) and BASE_CHANGING_INITS.fullmatch(value):
        ways = [KEEP_BASE] if value.lower() == "loftq" else [CONVERT, KEEP_BASE]
        return refused(item, f"{CHANGED_BASE}: {'; or '.join(ways)}")
    if value is None or (isinstance(value, bool | str) and value in PLAIN_INITS):
        return harmless(item, "leaves the base as it is")
    return refused(item, "an unknown initialization may have changed the base")


FIELDS = Fields(
    "LoraConfig",
    EXPORTED,
    HARMLESS,
    REFUSED_UNLESS_OFF,
    {"init_lora_weights": _check_init, "peft_version": check_version},
    never_null=("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
)


def _check_together(config: Mapping[str, Any], values: Mapping[str, Any]) -> list[LedgerEntry]:
    """PEFT's own rules for fields that exclude each other."""
    entries = []
    if values["use_dora"] is True and values["lora_bias"] is True:
        entries.append(refused("lora_bias", "PEFT allows it only without use_dora"))
    if values[INVOCATION]:
        entries += _check_activated(values)
    if values["use_qalora"] is True:
        entries += _check_qalora(values)
    return entries + check_layers(config, values)


def check_layers(config: Mapping[str, Any], values: Mapping[str, Any]) -> list[LedgerEntry]:
    """PEFT's rules for the fields that narrow target_modules to some layers."""
    entries = []
    is_regex = isinstance(values["target_modules"], str)
    for name in ("layers_to_transform", "layers_pattern"):
        if is_regex and config.get(name) is not None:
            entries.append(refused(name, "PEFT allows it only with a list of target_modules"))
    if values["layers_pattern"] and config.get("layers_to_transform") is None:
        entries.append(refused("layers_pattern", "PEFT allows it only with layers_to_transform"))
    return entries


def _check_activated(values: Mapping[str, Any]) -> list[LedgerEntry]:
    """Nothing of it may act before its invocation."""
    alone = f"PEFT allows it only without {INVOCATION}"
    base = f"would act before {INVOCATION} too: train it without"
    reasons = dict.fromkeys(("use_dora", "use_qalora", "target_parameters"), alone)
    reasons |= dict.fromkeys(("modules_to_save", "trainable_token_indices"), base)
    entries = [refused(name, why) for name, why in reasons.items() if values[name]]
    if values["bias"] != "none":
        entries.append(refused("bias", base))
    return entries


def _check_qalora(values: Mapping[str, Any]) -> list[LedgerEntry]:
    reasons = {
        "use_dora": "PEFT allows it only without use_qalora",
        "lora_bias": "PEFT's QA-LoRA computes without it",
    }
    entries = [refused(name, why) for name, why in reasons.items() if values[name] is True]
    if values["qalora_group_size"] == 1:
        entries.append(refused("qalora_group_size", "1: not to be told from plain LoRA"))
    return entries


def _settings(values: Mapping[str, Any]) -> Settings:
    return Settings(
        **vars(targeting(values)),
        rank=values["r"],
        alpha=float(values["lora_alpha"]),
        use_rslora=values["use_rslora"],
        use_dora=values["use_dora"],
        qalora_group_size=values["qalora_group_size"] if values["use_qalora"] else None,
        bias=values["bias"],
        lora_bias=values["lora_bias"],
        ensure_weight_tying=values["ensure_weight_tying"],
        rank_pattern=values["rank_pattern"],
        alpha_pattern=values["alpha_pattern"],
    )


def targeting(values: Mapping[str, Any]) -> Targeting:
    """Of checked fields, those that a family has not left out."""
    layers, pattern = values.get("layers_to_transform", []), values.get("layers_pattern", [])
    return Targeting(
        target_modules=frozen(values["target_modules"]),
        target_parameters=tuple(values.get("target_parameters", [])),
        exclude_modules=frozen(values["exclude_modules"]),
        layers_to_transform=layers if isinstance(layers, int) else (tuple(layers) or None),
        layers_pattern=(pattern,) * bool(pattern) if isinstance(pattern, str) else tuple(pattern),
        modules_to_save=tuple(values["modules_to_save"]),
        trainable_token_indices=_tokens(values.get("trainable_token_indices", [])),
    )


def _tokens(value: list[int] | dict[str, list[int]]) -> Tokens:
    """A list means those of the embedding."""
    by_module = value if isinstance(value, dict) else {"embed_tokens": value}
    return {name: tuple(tokens) for name, tokens in by_module.items() if tokens}


def frozen(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)
