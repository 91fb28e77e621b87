"""QA-LoRA is exact as plain LoRA: held against PEFT's own variant, put into float linears here, as
PEFT has it in GPTQ's only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger, read_adapter
from edgelora.adding import add_adapter
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.layout import targets
from test_adapter import PREFIX, WEIGHTS
from test_float_oracle import SHARE, TOKENS

PLAIN = "o_proj"  # left as it is, as PEFT leaves what is not GPTQ's
Q0, O0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_qwen2(tmp_path_factory.mktemp("base"))


NAMES = ("q_proj", "up_proj", "down_proj", PLAIN)


def make_qalora(
    base: Path, folder: Path, group: int, names: tuple[str, ...] = NAMES, plain: str = PLAIN
) -> np.ndarray:
    """A PEFT folder, and PEFT's logits with it."""
    settings = {"use_qalora": True, "qalora_group_size": group, "use_rslora": True}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(names), **settings)
    adapted = get_peft_model(oracle.float_model(base), config)
    for name, module in adapted.named_modules():
        if isinstance(module, Linear) and not name.endswith(plain):
            module.lora_variant["default"] = QALoraLinearVariant()
            QALoraLinearVariant.init(module, "default", config)
    torch.manual_seed(7)
    for name, values in adapted.named_parameters():
        if ".lora_" in name:
            values.data = (0.2 * torch.randn_like(values)).half().float()
    adapted.save_pretrained(folder)
    return oracle.logits(adapted.eval(), TOKENS)


@pytest.mark.parametrize("group", [2, 16, 32])
@pytest.mark.parametrize("mode", ["side", "merge"])
def test_logits_equal_peft(base: Path, mode: str, group: int, tmp_path: Path) -> None:
    theirs = make_qalora(base, tmp_path / "a", group)
    options = {"format": "float", "mode": mode, "report": False}
    edgelora.export(base, tmp_path / "bundle", adapters={"a": tmp_path / "a"}, **options)
    with edgelora.load(tmp_path / "bundle") as model:
        ours = model.logits(TOKENS, adapter="a" if mode == "side" else None)
    oracle.assert_close(ours, theirs, SHARE)
    plain = oracle.logits(oracle.float_model(base), TOKENS)
    assert np.abs(theirs - plain).max() > 100 * SHARE * np.abs(theirs).max()


def test_factors_are_those_of_the_formula(base: Path, tmp_path: Path) -> None:
    make_qalora(base, tmp_path, 16)
    stored = load_file(tmp_path / WEIGHTS)
    branches = read_adapter(tmp_path, targets(open_checkpoint(base).config)).branches
    pooled = stored[f"{PREFIX}{Q0}.lora_A.weight"]
    assert pooled.shape == (4, 64 // 16)
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    means = x.reshape(4, 16).mean(axis=1) * 4
    np.testing.assert_allclose(branches[Q0].lora_a @ x, pooled @ means, rtol=1e-5, atol=1e-5)
    assert np.array_equal(branches[O0].lora_a, stored[f"{PREFIX}{O0}.lora_A.weight"])


def test_a_width_that_is_neither_is_refused(base: Path, tmp_path: Path) -> None:
    make_qalora(base, tmp_path, 16)
    tensors = load_file(tmp_path / WEIGHTS)
    name = f"{PREFIX}{Q0}.lora_A.weight"
    save_file(tensors | {name: np.ones((4, 8), np.float32)}, tmp_path / WEIGHTS)
    with pytest.raises(EdgeLoraError, match=rf"{Q0}.lora_A.weight: shape \[4, 8\], .*\[4, 64\]"):
        read_adapter(tmp_path, targets(open_checkpoint(base).config))


MERGES: list[tuple[int, dict[str, Any]]] = [
    (32, {}),
    (32, {"zero_points": True}),
    (64, {"block_size": 64}),
    (64, {"block_size": 32, "embedding_format": "int4"}),
]
WIDE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")  # 64 inputs
ALL = (*WIDE, "down_proj")  # 96


@pytest.mark.parametrize(("group", "options"), MERGES, ids=str)
def test_merging_moves_offsets_and_no_code(
    group: int, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    names = ALL if group == 32 else WIDE
    make_qalora(base, tmp_path / "a", group, names, plain="none")
    edgelora.export(base, tmp_path / "side", report=False, **options)
    settings: dict[str, Any] = {"adapters": {"a": tmp_path / "a"}, "mode": "merge"}
    merged = edgelora.export(base, tmp_path / "merged", **settings, **options, report=False)
    assert f"of {2 * len(names)} linears no code, only" in merged.plan.reasons["mode"]
    plain, moved = (oracle.BundleWeights(tmp_path / name) for name in ("side", "merged"))
    for name in plain.tensors:
        if name.endswith((".codes", ".scales")):
            assert np.array_equal(plain.array(name), moved.array(name)), name
    before, after = dict(plain.matrices()), dict(moved.matrices())
    branches = read_adapter(tmp_path / "a", targets(open_checkpoint(base).config)).branches
    for target, branch in branches.items():
        delta = branch.scaling * (branch.lora_b.astype(float) @ branch.lora_a.astype(float))
        wanted = before[target] + delta
        assert np.abs(after[target] - wanted).max() <= 1e-6 * np.abs(wanted).max(), target


@pytest.mark.parametrize("kind", ["float", "Q4_0", "Q4_1"])
def test_merged_computes_what_the_side_branch_does(kind: str, base: Path, tmp_path: Path) -> None:
    """On the float path; on the int8 path to the float16 of its offsets. A base's own codes stay.
    A side branch's A is float16, which holds PEFT's times 64 / 32 / 32.
    """
    make_qalora(base, tmp_path / "a", 32, WIDE, plain="none")
    source = base if kind == "float" else tiny.tiny_gguf(tmp_path / "b.gguf", kind, source=base)
    adapters = {"a": tmp_path / "a"}
    edgelora.export(source, tmp_path / "m", adapters=adapters, mode="merge", report=False)
    edgelora.export(source, tmp_path / "s", adapters=adapters, report=False)
    with edgelora.load(tmp_path / "m", accuracy="float") as merged:
        ours = merged.logits(TOKENS)
    with edgelora.load(tmp_path / "s", accuracy="float") as side:
        theirs, without = side.logits(TOKENS, adapter="a"), side.logits(TOKENS)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - without).max() > 0.01 * np.abs(theirs).max()
    model = oracle.bundle_model(tmp_path / "m", oracle.float_model(base))
    oracle.assert_close(ours, oracle.logits(model, TOKENS), 1e-5)
    with edgelora.load(tmp_path / "m") as merged:
        merged.selfcheck()
        rounded = merged.logits(TOKENS)
    assert np.abs(rounded - ours).mean() < 0.02 * np.abs(ours).max()


def test_a_merged_bundle_of_stock_operators_computes_the_same(base: Path, tmp_path: Path) -> None:
    make_qalora(base, tmp_path / "a", 32, ALL, plain="none")
    options: dict[str, Any] = {"adapters": {"a": tmp_path / "a"}, "report": False, "flavor": "ort"}
    edgelora.export(base, tmp_path / "m", mode="merge", **options)
    edgelora.export(base, tmp_path / "s", **options)
    with edgelora.load(tmp_path / "m") as merged, edgelora.load(tmp_path / "s") as side:
        ours, theirs = merged.logits(TOKENS), side.logits(TOKENS, adapter="a")
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(theirs).max()


def test_groups_that_blocks_do_not_divide_are_rounded_anew_and_it_is_said(
    base: Path, tmp_path: Path
) -> None:
    make_qalora(base, tmp_path / "a", 16)
    options: dict[str, Any] = {"adapters": {"a": tmp_path / "a"}, "mode": "merge"}
    report = edgelora.export(base, tmp_path / "m", **options)
    assert "only offsets of 0 of QA-LoRA's 6 linears" in report.plan.reasons["mode"]
    assert "divide its groups of 16" in report.plan.reasons["mode"]


def test_the_report_sees_a_delta_that_no_rounding_touched(base: Path, tmp_path: Path) -> None:
    make_qalora(base, tmp_path / "a", 32, ALL, plain="none")
    edgelora.export(base, tmp_path / "m", adapters={"a": tmp_path / "a"}, mode="merge")
    variants = json.loads((tmp_path / "m" / "report.json").read_text())["variants"]
    for variant in variants:
        if variant["kind"].startswith("merged"):
            assert variant["delta_changed"] == 0 and variant["delta_correlation"] > 0.999


def test_it_is_added_and_inspected_without_the_base(base: Path, tmp_path: Path) -> None:
    make_qalora(base, tmp_path / "a", 16)
    ledger = {each.item: each.reason for each in adapter_ledger(tmp_path / "a", None)}
    assert "of means of inputs (QA-LoRA)" in ledger[f"{PREFIX}{Q0}.lora_A.weight"]
    edgelora.export(base, tmp_path / "both", adapters={"a": tmp_path / "a"}, report=False)
    edgelora.export(base, tmp_path / "plain", report=False)
    add_adapter(tmp_path / "plain", "a", tmp_path / "a")
    file = "adapters/a/adapter.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "both" / file).read_bytes()


def test_a_composition_takes_none(base: Path, tmp_path: Path) -> None:
    make_qalora(base, tmp_path / "a", 16)
    with pytest.raises(EdgeLoraError, match="/a: use_qalora: only the base tells"):
        edgelora.compose({tmp_path / "a": 1.0}, tmp_path / "out")
