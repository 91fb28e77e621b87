"""Every field of PEFT's configs is known once, and each that is said to count does."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

import oracle
from edgelora.adapter import adalora, adapter_ledger, ia3, prompt_learning, settings
from edgelora.adapter.fields import PEFT, Fields
from edgelora.errors import EdgeLoraError
from ledger_adapters import IDS, KINDS, make, make_base, outcome
from test_adapter import CONFIG, change_config
from test_float_oracle import TOKENS, with_adapter

FAMILIES: dict[type[peft.PeftConfig], Fields] = {
    peft.LoraConfig: settings.FIELDS,
    peft.AdaLoraConfig: adalora.FIELDS,
    peft.IA3Config: ia3.FIELDS,
    peft.PrefixTuningConfig: prompt_learning.PREFIX_TUNING,
    peft.CartridgeConfig: prompt_learning.CARTRIDGE,
    peft.PromptTuningConfig: prompt_learning.PROMPT_TUNING,
    peft.PromptEncoderConfig: prompt_learning.P_TUNING,
}
OLD = {"enable_lora", "merge_weights"}  # of LoraConfig, gone from PEFT
WRITTEN = {"megatron_core", "runtime_config"}
PROMPT_SIZES = {"num_virtual_tokens": 4, "token_dim": 48, "peft_type": "LORA"}
KEY_SIZES = PROMPT_SIZES | {"num_layers": 1, "num_attention_heads": 4}

# By the config's class, field: an adapter of which it is part, and another value that PEFT takes
COUNTING: dict[str, dict[str, tuple[str, Any]]] = {
    "LoraConfig": {
        "peft_type": ("plain", "ADALORA"),
        "r": ("plain", 3),
        "lora_alpha": ("plain", 7),
        "use_rslora": ("plain", True),
        "use_dora": ("dora", False),
        "use_qalora": ("qalora", False),
        "qalora_group_size": ("qalora", 8),
        "bias": ("bias_all", "none"),
        "lora_bias": ("lora_bias", False),
        "ensure_weight_tying": ("embedding", True),
        "alora_invocation_tokens": ("activated", [7]),
        "rank_pattern": ("patterns", {"up_proj": 3}),
        "alpha_pattern": ("patterns", {"q_proj": 5}),
        "target_modules": ("plain", ["q_proj"]),
        "target_parameters": ("weights", []),
        "exclude_modules": ("patterns", ["q_proj"]),
        "layer_replication": ("repeated", [[0, 2], [1, 2]]),
        "layers_to_transform": ("patterns", [0]),
        "layers_pattern": ("patterns", ["blocks"]),
        "modules_to_save": ("saved", ["lm_head", "embed_tokens", "k_proj"]),
        "trainable_token_indices": ("tokens", {"embed_tokens": IDS[::-1], "lm_head": [7]}),
    },
    "AdaLoraConfig": {
        "peft_type": ("adalora", "LORA"),
        "init_r": ("adalora", 4),
        "lora_alpha": ("adalora", 7),
        "rank_pattern": ("pruned", {}),
        "target_modules": ("adalora", ["q_proj", "v_proj"]),
        "exclude_modules": ("adalora", ["0.self_attn.q_proj"]),
        "layers_to_transform": ("adalora", [0]),
        "layers_pattern": ("adalora", ["blocks"]),
        "modules_to_save": ("adalora", ["norm"]),
    },
    "IA3Config": {
        "peft_type": ("ia3", "LORA"),
        "target_modules": ("ia3", ["up_proj", "down_proj"]),
        "feedforward_modules": ("ia3", ["up_proj", "down_proj"]),
        "exclude_modules": ("ia3", ["v_proj"]),
        "modules_to_save": ("ia3", ["norm"]),
    },
    "PrefixTuningConfig": {name: ("prefix", value) for name, value in KEY_SIZES.items()},
    "CartridgeConfig": {name: ("cartridge", value) for name, value in KEY_SIZES.items()},
    "PromptTuningConfig": {name: ("prompt", value) for name, value in PROMPT_SIZES.items()},
    "PromptEncoderConfig": {name: ("p_tuning", value) for name, value in PROMPT_SIZES.items()},
}
COUNTING_CASES = [
    (owner, name, *case) for owner, cases in COUNTING.items() for name, case in cases.items()
]
# Beside these, other values of harmless fields that PEFT takes; the others are texts.
OTHER: dict[str, Any] = {
    "auto_mapping": None,
    "beta1": 0.5,
    "beta2": 0.5,
    "corda_config": {},
    "deltaT": 3,
    "encoder_dropout": 0.5,
    "encoder_hidden_size": 24,
    "encoder_num_layers": 3,
    "eva_config": {},
    "inference_mode": False,
    "init_ia3_weights": False,
    "init_lora_weights": "gaussian",
    "init_weights": "zero",
    "loftq_config": {"loftq_bits": 2},
    "lora_dropout": 0.5,
    "lora_ga_config": {},
    "num_attention_heads": 3,
    "num_frozen_tokens": 0,
    "num_layers": 7,
    "orth_reg_weight": 0.1,
    "prefix_projection": True,
    "prompt_tuning_init": "RANDOM",
    "qalora_group_size": 4,
    "r": 5,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "target_r": 2,
    "tfinal": 1,
    "tinit": 2,
    "tokenizer_kwargs": None,
    "total_step": 20,
    "encoder_reparameterization_type": "LSTM",
}
OURS_ALONE = {"task_type", "base_model_name_or_path", "auto_mapping"}  # choose PEFT's classes
FAMILY_OF = {kind: owner for owner, cases in COUNTING.items() for kind, _ in cases.values()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("adapters")
    return {kind: make(kind, base, place / kind) for kind in FAMILY_OF}


def copy_with(folder: Path, copy: Path, **changes: Any) -> Path:
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change_config(copy, **changes)
    return copy


def found(kind: str, base: Path, folder: Path) -> str:
    """Of a refusal its text."""
    try:
        return outcome(kind, base, folder)
    except EdgeLoraError as error:
        assert "\n" not in str(error)
        return str(error)


def test_the_version_is_the_one_that_is_read() -> None:
    assert ".".join(map(str, PEFT)) == peft.__version__


@pytest.mark.parametrize("config", FAMILIES, ids=lambda each: each.__name__)
def test_every_field_of_peft_is_in_one_category(config: type[peft.PeftConfig]) -> None:
    fields = FAMILIES[config]
    assert fields.owner == config.__name__
    known = [*fields.exported, *fields.harmless, *fields.off, *fields.judged]
    assert len(known) == len(set(known))
    names = {each.name for each in dataclasses.fields(config)}
    assert names <= set(known)
    assert set(known) - names <= OLD | WRITTEN
    assert COUNTING[fields.owner].keys() == fields.exported.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_has_an_entry_for_every_field(kind: str, base: Path, tmp_path: Path) -> None:
    folder = make(kind, base, tmp_path / kind)
    items = [each.item for each in adapter_ledger(folder, None)]
    for name in json.loads((folder / CONFIG).read_text()):
        assert sum(item.startswith(f"{name} = ") for item in items) == 1, name


@pytest.mark.parametrize(
    ("owner", "name", "kind", "value"), COUNTING_CASES, ids=lambda each: str(each)[:30]
)
def test_a_field_that_counts_changes_what_is_exported_or_is_refused(
    owner: str, name: str, kind: str, value: Any, base: Path, folders: Any, tmp_path: Path
) -> None:
    assert outcome(kind, base, folders[kind]) != found(
        kind, base, copy_with(folders[kind], tmp_path / "other", **{name: value})
    )


@pytest.mark.parametrize("config", FAMILIES, ids=lambda each: each.__name__)
def test_what_is_not_off_is_refused_by_name(
    config: type[peft.PeftConfig], base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    fields = FAMILIES[config]
    kind = COUNTING[fields.owner]["peft_type"][0]
    for name in [*fields.off, *fields.judged, "unknown_field"]:
        other = copy_with(folders[kind], tmp_path / name, **{name: {"a": 1}})
        assert f"{name} = " in found(kind, base, other)


def other_values(fields: Fields) -> dict[str, Any]:
    return {name: OTHER.get(name, "something else") for name in fields.harmless}


@pytest.mark.parametrize("config", FAMILIES, ids=lambda each: each.__name__)
def test_harmless_fields_change_nothing_here_nor_in_peft(
    config: type[peft.PeftConfig], base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    fields = FAMILIES[config]
    kind = COUNTING[fields.owner]["peft_type"][0]
    others = other_values(fields)
    other = copy_with(folders[kind], tmp_path / "other", **others)
    assert outcome(kind, base, other) == outcome(kind, base, folders[kind])
    theirs = {name: value for name, value in others.items() if name not in OURS_ALONE}
    for_peft = copy_with(folders[kind], tmp_path / "peft", **theirs)
    before, after = (
        oracle.logits(loaded(base, folder), TOKENS) for folder in (folders[kind], for_peft)
    )
    assert np.array_equal(before, after)


def loaded(base: Path, folder: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return with_adapter(oracle.float_model(base), folder).eval()


@pytest.mark.parametrize("kind", ["plain", "adalora", "ia3", "prompt"])
@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, ""),
        ("0.21.2", ""),
        ("0.18.0.dev0@abc", ""),
        ("0.9", ""),
        ("0.21.3", "newer than the 0.21.2"),
        ("0.22.0.dev0", "newer than the 0.21.2"),
        ("1.0", "newer than the 0.21.2"),
        ("new", "no version"),
        (21, "no version"),
    ],
)
def test_a_newer_peft_is_refused(
    kind: str, version: Any, words: str, base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = copy_with(folders[kind], tmp_path / "other", peft_version=version)
    expected = outcome(kind, base, folders[kind])
    text = found(kind, base, other)
    assert f"peft_version = {json.dumps(version)}: {words}" in text if words else text == expected
