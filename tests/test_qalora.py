"""QA-LoRA is exact as plain LoRA: held against PEFT's own variant, put into float linears here, as
PEFT has it in GPTQ's only.
"""

from pathlib import Path

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


def make_qalora(base: Path, folder: Path, group: int) -> np.ndarray:
    """A PEFT folder, and PEFT's logits with it."""
    names = ["q_proj", "up_proj", "down_proj", PLAIN]
    settings = {"use_qalora": True, "qalora_group_size": group, "use_rslora": True}
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names, **settings)
    adapted = get_peft_model(oracle.float_model(base), config)
    for name, module in adapted.named_modules():
        if isinstance(module, Linear) and not name.endswith(PLAIN):
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
