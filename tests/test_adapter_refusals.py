"""Refusals and the ledger: a small good folder, one change, and the words of the error."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from cases import case_id
from edgelora.adapter import adapter_ledger, read_adapter
from edgelora.errors import EdgeLoraError
from test_adapter import CONFIG, PREFIX, Q0, TARGETS, V0, WEIGHTS, change_config


def good_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for target in (Q0, V0):
        rows, columns = TARGETS[target]
        a, b = rng.standard_normal((8, columns)), rng.standard_normal((rows, 8))
        tensors[f"{PREFIX}{target}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"{PREFIX}{target}.lora_B.weight"] = b.astype(np.float32)
    return tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = LoraConfig(target_modules=[Q0, V0]).to_dict() | {"target_modules": [Q0, V0]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(good_tensors(), tmp_path / WEIGHTS)
    read_adapter(tmp_path, TARGETS)
    return tmp_path


def refusal(folder: Path) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(EdgeLoraError) as caught:
        read_adapter(folder, TARGETS)
    text = str(caught.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "LOHA"),
    ({"peft_type": None}, "peft_type"),
    ({"r": 0}, "r = 0"),
    ({"r": -1}, "r = -1"),
    ({"r": 8.0}, "r = 8.0"),
    ({"r": True}, "r = true"),
    ({"lora_alpha": -16}, "lora_alpha = -16"),
    ({"lora_alpha": float("nan")}, "lora_alpha = NaN"),
    ({"lora_alpha": float("inf")}, "lora_alpha = Infinity"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"lora_alpha": "16"}, "lora_alpha"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"use_dora": 1}, "use_dora"),
    ({"use_qalora": 1}, "use_qalora = 1"),
    ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size = 0"),
    ({"use_qalora": True, "qalora_group_size": 1}, "qalora_group_size: 1: not to be told"),
    ({"use_qalora": True, "use_dora": True}, "use_dora: PEFT allows it only without use_qalora"),
    ({"use_qalora": True, "lora_bias": True}, "lora_bias: PEFT's QA-LoRA computes without it"),
    ({"use_dora": True}, f"{V0}: has no lora_magnitude_vector"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"o_proj": 8}}, "rank_pattern 'o_proj': matches no target"),
    ({"rank_pattern": {"q_proj(": 8}}, "rank_pattern 'q_proj('"),
    ({"alpha_pattern": {"(?i)Q_PROJ": 8}}, "alpha_pattern '(?i)Q_PROJ'"),
    ({"alpha_pattern": {"down_proj": 8}}, "alpha_pattern 'down_proj': matches no target"),
    ({"alpha_pattern": {"q_proj": -8}}, "alpha_pattern"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": "*"}, "target_modules '*'"),
    ({"target_modules": [Q0]}, V0),
    ({"target_modules": [Q0, V0, "o_proj"]}, "model.layers.1.self_attn.o_proj"),
    ({"target_modules": [Q0, V0, "lm_head"]}, "lm_head"),
    ({"target_modules": [Q0, V0, "embed_tokens"]}, "model.embed_tokens"),
    ({"target_modules": "all-linear"}, "model.layers.0.mlp.down_proj"),
    ({"target_modules": ".*0.*(q|v)_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    ({"layers_pattern": "layers"}, "layers_pattern"),
    ({"exclude_modules": ["v_proj"]}, V0),
    ({"exclude_modules": "("}, "exclude_modules"),
    ({"bias": "boft_only"}, 'bias = "boft_only": must be none, all or lora_only'),
    ({"bias": True}, "bias = true"),
    ({"lora_bias": True}, f"{V0}: has no lora_B.bias"),
    ({"lora_bias": 1}, "lora_bias = 1"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias: PEFT allows it only without use_dora"),
    ({"init_lora_weights": "something_new"}, "something_new"),
    ({"future_field": None}, "future_field"),
    ({"future_field": {"a": 1}}, "future_field"),
    ({"modules_to_save": "embed_tokens"}, "modules_to_save"),
    ({"trainable_token_indices": [1.0]}, "trainable_token_indices"),
    ({"layer_replication": [[1, 1]]}, "layer_replication"),
    ({"layer_replication": [0, 1]}, "layer_replication"),
    ({"target_parameters": ["experts.w"]}, "no supported base has other matrices"),
    ({"target_parameters": ["q_proj.bias"]}, "no supported base has other matrices"),
    ({"target_parameters": ["weight"]}, "target_parameters"),
    ({"alora_invocation_tokens": []}, "alora_invocation_tokens"),
    (
        {"alora_invocation_tokens": [1], "target_parameters": ["q_proj.weight"]},
        "target_parameters: PEFT allows it only without alora_invocation_tokens",
    ),
    ({"ensure_weight_tying": 1}, "ensure_weight_tying = 1"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = true: transposed weights (Conv1D)"),
    ({"megatron_config": {"a": 1}}, "set it to null"),
    ({"arrow_config": {}}, "arrow_config = {}: Arrow mixes adapters anew for each token: export"),
]
NEVER_NULL = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
BAD_FIELDS += [({name: None}, f"{name} = null") for name in NEVER_NULL]
BAD_FIELDS += [
    ({name: {}}, "merge it with PEFT (model.merge_and_unload()")
    for name in ("kasa_config", "use_bdlora", "monteclora_config", "velora_config")
]
BAD_FIELDS += [
    ({"init_lora_weights": name}, f'init_lora_weights = "{name}": made another base')
    for name in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
]


@pytest.mark.parametrize(("change", "culprit"), BAD_FIELDS, ids=case_id)
def test_bad_field_is_refused_by_name(folder: Path, change: dict[str, Any], culprit: str) -> None:
    change_config(folder, **change)
    assert culprit in refusal(folder)


Tensors = dict[str, np.ndarray]
QA, QB = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"


def extra(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)})


def with_value(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[QB].__setitem__((3, 1), value)


def all_renamed(tensors: Tensors) -> None:
    renamed = {name.replace("self_attn", "attn"): values for name, values in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


BAD_TENSORS: list[tuple[Callable[[Tensors], object], list[str]]] = [
    (lambda tensors: tensors.pop(QA), [f"{Q0}: has no lora_A"]),
    (lambda tensors: tensors.pop(QB), [f"{Q0}: has no lora_B"]),
    (lambda tensors: [tensors.pop(QA), tensors.pop(QB)], [Q0, "no lora_A and lora_B for it"]),
    (lambda tensors: tensors.clear(), ["holds no lora_A and lora_B"]),
    (all_renamed, ["attn.q_proj", "attn.v_proj", "made for another architecture?"]),
    (with_value(np.nan), [QB, "NaN"]),
    (with_value(np.inf), [QB, "infinity"]),
    (lambda t: t.update({QA: t[QA][:4]}), [QA, "[4, 64]", "[8, 64]"]),
    (lambda t: t.update({QA: t[QA][:, :48].copy()}), [QA, "[8, 48]", "[8, 64]"]),
    (lambda t: t.update({QB: t[QB].T.copy()}), [QB, "[8, 64]", "[64, 8]"]),
    (lambda t: t.update({QB: t[QB].reshape(64, 8, 1)}), [QB, "[64, 8, 1]"]),
    (lambda t: t.update({QA: t[QA][:0]}), [QA, "[0, 64]"]),
    (lambda t: t.update({QA: t[QA].astype(np.float64)}), [QA, "F64"]),
    (lambda t: t.update({QA: t[QA].astype(np.int8)}), [QA, "I8"]),
    (extra(f"{PREFIX}{Q0}.lora_A.default.weight"), [Q0, "second lora_A"]),
    (lambda t: t.update({QA.replace("A.w", "A.x.w"): t.pop(QA)}), ["(none), x", "one adapter"]),
    (extra(f"{PREFIX}{Q0}.lora_magnitude_vector"), ["magnitude_vector", "use_dora"]),
    (extra(f"{PREFIX}{Q0}.lora_magnitude_vector.b"), ["magnitude_vector.b", "no name that PEFT"]),
    (extra(f"{PREFIX}model.embed_tokens.lora_embedding_A"), ["lora_embedding_A", "embedding"]),
    (extra(f"{PREFIX}{Q0}.lora_embedding_A"), ["lora_embedding_A", "not a factor of the token"]),
    (extra(f"{PREFIX}{Q0}.lora_B.bias"), ["lora_B.bias", "lora_bias is not set"]),
    (extra(f"{PREFIX}{Q0}.lora_A.bias"), ["lora_A.bias", "no name that PEFT gives it"]),
    (extra(f"{Q0}.bias"), [f"{Q0}.bias", "no name that PEFT gives it"]),
    (extra(f"{PREFIX}{Q0}.base_layer.bias"), [f"{Q0}.base_layer.bias", "bias = none"]),
    (extra(f"{PREFIX}{Q0}.bias"), [f"{Q0}.bias", "bias = none"]),
    (extra(f"{PREFIX}{Q0}.lora_diag"), ["lora_diag", "KaSA"]),
    (extra(f"{PREFIX}{Q0}.base_layer.weight"), [f"{Q0}.base_layer", "copy of base weights"]),
    (extra(f"{PREFIX}model.norm.weight"), ["model.norm.weight", "not a LoRA factor"]),
    (extra("a\nb\x1b[2J"), [r"a\nb\x1b[2J"]),
    (extra(f"{Q0}.lora_A.weight"), [f"{Q0}.lora_A.weight", "not a LoRA factor"]),
]


@pytest.mark.parametrize(("change", "culprits"), BAD_TENSORS, ids=case_id)
def test_bad_tensor_is_refused_by_name(
    folder: Path, change: Callable[[Tensors], object], culprits: list[str]
) -> None:
    tensors = good_tensors()
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    text = refusal(folder)
    assert [each for each in culprits if each not in text] == []


Change = Callable[[np.ndarray], np.ndarray]
BAD_MAGNITUDES: list[tuple[Change, str]] = [
    (lambda magnitude: magnitude[:32], "[32]"),
    (lambda magnitude: magnitude[:, None], "[64, 1]"),
    (lambda magnitude: magnitude * np.nan, "NaN"),
    (lambda magnitude: magnitude.astype(np.int32), "I32"),
]


@pytest.mark.parametrize(("change", "culprit"), BAD_MAGNITUDES, ids=case_id)
def test_bad_magnitude_is_refused_by_name(folder: Path, change: Change, culprit: str) -> None:
    change_config(folder, use_dora=True)
    names = {target: f"{PREFIX}{target}.lora_magnitude_vector" for target in (Q0, V0)}
    good = {name: np.ones(TARGETS[target][0], np.float32) for target, name in names.items()}
    save_file(good_tensors() | good, folder / WEIGHTS)
    branches = read_adapter(folder, TARGETS).branches
    assert [branch.magnitude.shape for branch in branches.values()] == [(64,), (32,)]
    bad = np.ascontiguousarray(change(good[names[Q0]]))
    save_file(good_tensors() | good | {names[Q0]: bad}, folder / WEIGHTS)
    text = refusal(folder)
    assert names[Q0] in text
    assert culprit in text


K0 = "model.layers.0.self_attn.k_proj"
BAD_BIASES: list[tuple[str, str, Any, str]] = [
    ("all", f"{Q0}.bias", np.ones(64), "PEFT loads base_layer.bias of a linear with lora_A"),
    ("all", f"{K0}.base_layer.bias", np.ones(32), "bias of any other"),
    ("lora_only", f"{K0}.bias", np.ones(32), "bias = lora_only"),
    ("all", "model.norm.bias", np.ones(64), "no linear of this name"),
    ("all", f"{K0}.bias", np.ones(64), "shape [64], but config and base need [32]"),
    ("all", f"{K0}.bias", np.full(32, np.inf), "infinity"),
    ("lora_only", f"{Q0}.base_layer.bias", np.ones((64, 1)), "[64, 1]"),
]


@pytest.mark.parametrize(("setting", "name", "values", "culprit"), BAD_BIASES)
def test_bad_trained_bias_is_refused_by_name(
    folder: Path, setting: str, name: str, values: Any, culprit: str
) -> None:
    change_config(folder, bias=setting)
    tensors = good_tensors() | {f"{PREFIX}{name}": values.astype(np.float32)}
    save_file(tensors, folder / WEIGHTS)
    text = refusal(folder)
    assert f"{PREFIX}{name}: " in text
    assert culprit in text


def test_a_bias_that_scaling_makes_infinite_is_refused(folder: Path) -> None:
    change_config(folder, lora_bias=True, lora_alpha=1000)
    biases = {
        f"{PREFIX}{target}.lora_B.bias": np.full(TARGETS[target][0], 3e37, np.float32)
        for target in (Q0, V0)
    }
    save_file(good_tensors() | biases, folder / WEIGHTS)
    assert f"{PREFIX}{Q0}.lora_B.bias" in refusal(folder)
    assert "times scaling 125 is not finite" in refusal(folder)


def test_ledger_says_what_becomes_of_biases(folder: Path) -> None:
    change_config(folder, bias="all", lora_bias=True)
    biases = {f"{PREFIX}{t}.lora_B.bias": np.ones(TARGETS[t][0], np.float32) for t in (Q0, V0)}
    biases |= {f"{PREFIX}{Q0}.base_layer.bias": np.ones(64, np.float32)}
    biases |= {f"{PREFIX}{K0}.bias": np.ones(32, np.float32)}
    save_file(good_tensors() | biases, folder / WEIGHTS)
    for targets in (TARGETS, None):
        ledger = {each.item: each for each in adapter_ledger(folder, targets)}
        assert not [each for each in ledger.values() if each.verdict == "refused"]
        assert "a bias of its own" in ledger[f"{PREFIX}{V0}.lora_B.bias"].reason
        for name in (f"{Q0}.base_layer.bias", f"{K0}.bias"):
            assert ledger[f"{PREFIX}{name}"].reason == "replaces the base's bias"
    branches = read_adapter(folder, TARGETS).branches
    assert list(branches) == sorted([Q0, K0, V0])
    assert branches[K0].rank == 0


def test_all_problems_are_raised_at_once(folder: Path) -> None:
    change_config(folder, fan_in_fan_out=True, enable_lora=[True])
    save_file(good_tensors() | {QA: np.full((8, 64), np.nan, np.float32)}, folder / WEIGHTS)
    text = refusal(folder)
    assert all(each in text for each in ("fan_in_fan_out", "enable_lora", QA))


def test_names_with_an_adapter_name_are_read(folder: Path) -> None:
    renamed = {name.replace(".weight", ".pirate.weight"): v for name, v in good_tensors().items()}
    save_file(renamed, folder / WEIGHTS)
    assert np.array_equal(read_adapter(folder, TARGETS).branches[Q0].lora_a, good_tensors()[QA])


def test_missing_files_are_named(folder: Path) -> None:
    with pytest.raises(EdgeLoraError, match="nowhere: no such folder"):
        read_adapter(folder / "nowhere", TARGETS)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "pickle" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert f"{WEIGHTS} is missing" in refusal(folder)
    (folder / CONFIG).unlink()
    assert f"{CONFIG} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ("\xff", "not valid JSON"),
        ('{"r": 8, "r": 4}', "'r' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"base_model_name_or_path": 3}', "base_model_name_or_path"),
    ],
)
def test_bad_config_file_is_refused(folder: Path, text: str, culprit: str) -> None:
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    error = refusal(folder)
    assert CONFIG in error
    assert culprit in error


def header_file(header: object, values: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


BAD_FILES = {
    "empty": b"",
    "header beyond the file": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": header_file(b"{x", b""),
    "not an object": header_file([], b""),
    "entry is no object": header_file({"a": 3}, b""),
    "unknown dtype": header_file({"a": entry(dtype="F99")}, bytes(8)),
    "dtype is a list": header_file({"a": entry(dtype=["F32"])}, bytes(8)),
    "negative size": header_file({"a": entry(shape=[-2])}, bytes(8)),
    "boolean size": header_file({"a": entry(shape=[True, 2])}, bytes(8)),
    "product beyond 64 bits": header_file({"a": entry(shape=[2**33, 2**33])}, bytes(8)),
    "offsets reversed": header_file({"a": entry(data_offsets=[8, 0])}, bytes(8)),
    "offsets beyond the file": header_file({"a": entry(data_offsets=[8, 16])}, bytes(8)),
    "overlap": header_file({"a": entry(), "b": entry()}, bytes(8)),
    "gap": header_file({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
    "trailing bytes": header_file({"a": entry()}, bytes(9)),
    "truncated": header_file({"a": entry()}, bytes(7)),
    "name twice": header_file(b'{"a": 1, "a": 2}', b""),
    "metadata no text": header_file({"__metadata__": {"a": 1}}, b""),
}


@pytest.mark.parametrize("data", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_corrupt_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS).write_bytes(data)
    assert WEIGHTS in refusal(folder)


def test_damaged_bytes_raise_only_our_error(folder: Path) -> None:
    good = (folder / WEIGHTS).read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        data = bytearray(good)
        data[rng.randrange(600)] = rng.randrange(256)
        (folder / WEIGHTS).write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            read_adapter(folder, TARGETS)
        except EdgeLoraError as error:
            assert "\n" not in str(error)


def test_ledger_lists_every_field_and_tensor_once(folder: Path) -> None:
    change_config(folder, fan_in_fan_out=True)
    save_file(good_tensors() | {"stray": np.ones(1, np.float32)}, folder / WEIGHTS)
    for targets in (TARGETS, None):
        ledger = adapter_ledger(folder, targets)
        items = [each.item for each in ledger]
        fields = [item.split(" = ")[0] for item in items]
        for name in [*json.loads((folder / CONFIG).read_text()), *load_file(folder / WEIGHTS)]:
            assert fields.count(name) == 1
        refused = [each.item for each in ledger if each.verdict == "refused"]
        assert refused == ["fan_in_fan_out = true", "stray"]


def test_ledger_says_when_a_branch_changes_nothing(folder: Path) -> None:
    save_file(good_tensors() | {QB: np.zeros((64, 8), np.float32)}, folder / WEIGHTS)
    reasons = {each.item: each.reason for each in adapter_ledger(folder, None)}
    assert "changes nothing" in reasons[QB]


def test_unused_settings_of_older_peft_pass(folder: Path) -> None:
    change_config(folder, merge_weights=False, enable_lora=None, runtime_config={"a": 1})
    assert read_adapter(folder, TARGETS).branches.keys() == {Q0, V0}
