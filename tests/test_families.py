"""Families of adapters beside LoRA: (IA)³ read as PEFT reads it, all others refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import IA3Config, PeftType
from peft.tuners.ia3 import IA3Model
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from cases import case_id
from edgelora.adapter import adapter_ledger, read_adapter
from edgelora.adapter.families import ADAPTER_HUB, FAMILIES, REFUSED
from edgelora.adapter.ia3 import FIELDS, is_feedforward
from edgelora.adding import add_adapter
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.layout import targets
from edgelora.manifest import read_manifest
from test_adapter import CONFIG, MODULES, PREFIX, TARGETS, WEIGHTS, change_config
from test_adapter_refusals import refusal
from test_float_oracle import TOKENS, make_adapter

LAYER = "model.layers.0"
V0, UP0, DOWN0 = f"{LAYER}.self_attn.v_proj", f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj"
V, DOWN = f"{PREFIX}{V0}.ia3_l", f"{PREFIX}{DOWN0}.ia3_l"
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def good_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    (rows, _), (_, columns) = TARGETS[V0], TARGETS[DOWN0]
    values = {V: rng.standard_normal((rows, 1)), DOWN: rng.standard_normal((1, columns))}
    return {name: each.astype(np.float32) for name, each in values.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = IA3Config(target_modules=[V0, DOWN0], feedforward_modules=[DOWN0]).to_dict()
    config |= {"target_modules": [V0, DOWN0], "feedforward_modules": [DOWN0]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    save_file(good_tensors(), tmp_path / WEIGHTS)
    return tmp_path


def test_factors_of_down_proj_s_inputs_become_those_of_up_proj_s_outputs(folder: Path) -> None:
    branches = read_adapter(folder, TARGETS).branches
    assert list(branches) == [UP0, V0]
    assert np.array_equal(branches[UP0].output_factor, good_tensors()[DOWN][0])
    assert np.array_equal(branches[V0].output_factor, good_tensors()[V][:, 0])
    assert {branch.rank for branch in branches.values()} == {0}


@pytest.mark.parametrize("targets", [TARGETS, None], ids=["base", "alone"])
def test_ledger_says_what_becomes_of_factors(folder: Path, targets: Any) -> None:
    ledger = {each.item: each for each in adapter_ledger(folder, targets)}
    assert not [each for each in ledger.values() if each.verdict == "refused"]
    assert ledger[V].reason == "a factor of each output"
    assert "an output of up_proj" in ledger[DOWN].reason
    change_config(folder, feedforward_modules=[V0, DOWN0])
    columns = TARGETS[V0][1]
    save_file(good_tensors() | {V: np.ones((1, columns), np.float32)}, folder / WEIGHTS)
    ledger = {each.item: each for each in adapter_ledger(folder, targets)}
    assert ledger[V].reason == "a factor of each input: --mode merge"


def test_peft_s_defaults_pass() -> None:
    config = IA3Config(target_modules="x", feedforward_modules="x").to_dict()
    assert [each for each in FIELDS.ledger(config) if each.verdict == "refused"] == []


@pytest.mark.parametrize("names", ["x", r".*\.0\..*v_proj", ["v_proj"], ["proj"], ["n.v_proj"], []])
def test_feedforward_modules_are_peft_s(names: Any) -> None:
    config = IA3Config(target_modules="x", feedforward_modules=names)
    ours = names if isinstance(names, str) else tuple(names)
    for name in MODULES:
        expected = IA3Model._check_target_module_feedforward(config, name)
        assert is_feedforward(ours, name) == expected


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"feedforward_modules": None}, "feedforward_modules = null: must be a list of names"),
    ({"feedforward_modules": "("}, "feedforward_modules '(': not a valid regex"),
    ({"feedforward_modules": []}, f"{DOWN}: shape [1, 112], but config and base need [64, 1]"),
    ({"feedforward_modules": [V0, DOWN0]}, f"{V}: shape [32, 1]"),
    ({"target_modules": None}, "target_modules = null"),
    ({"target_modules": [V0]}, f"{DOWN0}: in the file, but the config's target_modules do not"),
    ({"target_modules": [V0, DOWN0, UP0]}, f"{UP0}: named by target_modules, but"),
    ({"target_modules": [V0, DOWN0, "embed_tokens"]}, "model.embed_tokens: the base has no linear"),
    ({"exclude_modules": [V0]}, f"{V0}: in the file, but"),
    ({"exclude_modules": "("}, "exclude_modules"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = true"),
    ({"modules_to_save": ["norm"]}, "modules_to_save 'norm': the file has nothing of it"),
    ({"modules_to_save": "norm"}, "modules_to_save"),
    ({"r": 8}, "r = 8: not a field of PEFT 0.21.2's IA3Config"),
]


@pytest.mark.parametrize(("change", "culprit"), BAD_FIELDS, ids=case_id)
def test_bad_field_of_ia3_is_refused_by_name(
    folder: Path, change: dict[str, Any], culprit: str
) -> None:
    change_config(folder, **change)
    assert culprit in refusal(folder)


Tensors = dict[str, np.ndarray]
BAD_TENSORS: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.pop(V), f"{V0}: named by target_modules, but the file has no ia3_l"),
    (lambda t: t.clear(), "holds no ia3_l"),
    (lambda t: t.update({V: t[V].T.copy()}), "shape [1, 32]"),
    (lambda t: t.update({V: t[V] * np.nan}), "NaN"),
    (lambda t: t.update({V: t[V].astype(np.int8)}), "I8"),
    (lambda t: t.update({f"{V}.default": t[V]}), f"a second ia3_l for the target {V0}"),
    (lambda t: t.update({f"{DOWN}.x": t.pop(DOWN)}), "(none), x: adapter names"),
    (lambda t: t.update({f"{PREFIX}{V0}.lora_A.weight": t[V]}), "not a factor of (IA)³"),
    (lambda t: t.update({V.replace("model.layers", "h"): t.pop(V)}), "the base has no linear"),
]


@pytest.mark.parametrize(("change", "culprit"), BAD_TENSORS, ids=case_id)
def test_bad_tensor_of_ia3_is_refused_by_name(
    folder: Path, change: Callable[[Tensors], object], culprit: str
) -> None:
    tensors = good_tensors()
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    assert culprit in refusal(folder)


def test_factors_whose_product_overflows_are_refused(folder: Path) -> None:
    change_config(folder, target_modules=[UP0, DOWN0])
    large = {DOWN: np.full((1, 112), 1e30, np.float32)}
    large[f"{PREFIX}{UP0}.ia3_l"] = np.full((112, 1), 1e30, np.float32)
    save_file(large, folder / WEIGHTS)
    assert f"{DOWN0}: its factors times up_proj's are not finite" in refusal(folder)


def test_input_factors_are_merged_or_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    settings = {"target_modules": ["v_proj", "o_proj"], "feedforward_modules": ["o_proj"]}
    adapter = make_adapter(base, tmp_path / "a", **settings)
    wanted = r"/a: feedforward_modules: .*0\.self_attn\.o_proj and 1 more.*--mode merge"
    for flavor in ("edgelora", "ort"):
        with pytest.raises(EdgeLoraError, match=wanted):
            edgelora.export(base, tmp_path / "side", adapters={"a": adapter}, flavor=flavor)
    edgelora.export(base, tmp_path / "plain", report=False)
    with pytest.raises(EdgeLoraError, match=wanted):
        add_adapter(tmp_path / "plain", "a", adapter)
    edgelora.export(base, tmp_path / "auto", adapters={"a": adapter}, mode="auto")
    plan = read_manifest(tmp_path / "auto")["plan"]
    assert (plan["mode"], read_manifest(tmp_path / "auto")["merged"].keys()) == ("merge", {"a"})


def test_output_factors_in_flavor_ort_are_merged_or_refused(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", **IA3)
    with pytest.raises(EdgeLoraError, match=r"the outputs of 6 linears.*--mode merge"):
        edgelora.export(base, tmp_path / "ort", adapters={"a": adapter}, flavor="ort")
    edgelora.export(base, tmp_path / "o", adapters={"a": adapter}, flavor="ort", mode="merge")


def test_a_base_s_own_codes_are_not_kept_where_factors_are_merged(tmp_path: Path) -> None:
    base = tiny.tiny_gguf(tmp_path / "base.gguf", "Q4_0")
    adapter = make_adapter(tmp_path / "base-source", tmp_path / "a", **IA3)
    edgelora.export(base, tmp_path / "plain", report=False)
    options = {"adapters": {"a": adapter}, "mode": "merge", "report": False}
    edgelora.export(base, tmp_path / "merged", **options)
    plain, merged = (
        dict(oracle.BundleWeights(tmp_path / name).matrices()) for name in ("plain", "merged")
    )
    branches = read_adapter(adapter, targets(open_checkpoint(base).config)).branches
    for name, rows in plain.items():
        ratios = (merged[name] * rows).sum(axis=1) / (rows * rows).sum(axis=1)
        factors = branches[name].output_factor if name in branches else 1
        np.testing.assert_allclose(ratios, np.broadcast_to(factors, len(rows)), atol=0.03)


def test_an_added_adapter_computes_as_an_exported_one(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", **IA3)
    edgelora.export(base, tmp_path / "both", adapters={"a": adapter})
    edgelora.export(base, tmp_path / "plain")
    add_adapter(tmp_path / "plain", "a", adapter)
    file = "adapters/a/adapter.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "both" / file).read_bytes()
    entry = read_manifest(tmp_path / "plain")["adapters"]["a"]
    assert (entry["ranks"], entry["scalings"], entry["targets"]) == ([], [], 6)
    with edgelora.load(tmp_path / "plain") as ours, edgelora.load(tmp_path / "both") as theirs:
        logits = ours.logits(TOKENS, adapter="a")
        assert np.array_equal(logits, theirs.logits(TOKENS, adapter="a"))
        assert not np.allclose(logits, ours.logits(TOKENS))


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_an_adapter_that_changes_a_bias_cannot_be_added_without_the_base(
    biases: dict[str, bool], tmp_path: Path
) -> None:
    base = tiny.tiny_llama(tmp_path / "base", **biases)
    adapter = make_adapter(base, tmp_path / "a", **IA3)
    edgelora.export(base, tmp_path / "plain", report=False)
    with pytest.raises(EdgeLoraError, match=r"/a: \(IA\)³ multiplies \d biases.*--base"):
        add_adapter(tmp_path / "plain", "a", adapter)
    other = {"target_modules": ["gate_proj" if "attention_bias" in biases else "v_proj"]}
    unbiased = make_adapter(base, tmp_path / "b", **other, feedforward_modules=[])
    add_adapter(tmp_path / "plain", "b", unbiased)


def test_a_composition_takes_no_ia3(tmp_path: Path) -> None:
    adapter = make_adapter(tiny.tiny_llama(tmp_path / "base"), tmp_path / "a", **IA3)
    with pytest.raises(EdgeLoraError, match=r"/a: \(IA\)³ multiplies the outputs of 6 linears"):
        edgelora.compose({adapter: 1.0}, tmp_path / "out")


def test_every_kind_of_peft_has_a_reader_or_a_reason() -> None:
    assert {kind.value for kind in PeftType} == FAMILIES.keys() | REFUSED.keys()
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("kind", REFUSED)
def test_other_families_are_refused_by_name(folder: Path, kind: str) -> None:
    """Before their weights are looked at."""
    change_config(folder, peft_type=kind)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").touch()
    for read in (refusal, ledger_error):
        text = read(folder)
        assert text.startswith(f"{folder}: peft_type {kind}: {REFUSED[kind][0]} is not supported: ")
        assert "train" in text or "merge_and_unload" in text


def ledger_error(folder: Path) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        adapter_ledger(folder, None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "culprit"),
    [
        (None, "no peft_type in its config"),
        ("SOMETHING", "peft_type 'SOMETHING': PEFT 0.21.2 has no such kind"),
        (["LORA"], "peft_type ['LORA']"),
    ],
)
def test_an_unknown_family_is_refused(folder: Path, kind: Any, culprit: str) -> None:
    change_config(folder, peft_type=kind)
    assert culprit in refusal(folder)


@pytest.mark.parametrize("name", ADAPTER_HUB)
def test_adapters_of_adapter_hub_are_recognized_by_their_files(folder: Path, name: str) -> None:
    (folder / CONFIG).write_text(json.dumps({"config": {"reduction_factor": 16}, "name": "a"}))
    (folder / WEIGHTS).unlink()
    (folder / name).touch()
    assert "an adapter of the library `adapters` (AdapterHub)" in refusal(folder)


def test_implied_targets_leave_out_the_head(tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    settings = {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}
    adapter = make_adapter(base, tmp_path / "a", **settings)
    assert len(load_file(adapter / WEIGHTS)) == 14
    edgelora.export(base, tmp_path / "o", adapters={"a": adapter}, report=False)
    assert read_manifest(tmp_path / "o")["adapters"]["a"]["targets"] == 12
