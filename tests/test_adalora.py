"""AdaLoRA as PEFT itself reads its folder, pruned ranks too."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import edgelora
import oracle
import tiny
from edgelora.adapter import adapter_ledger, read_adapter
from edgelora.adapter.adalora import FIELDS
from edgelora.adding import add_adapter
from edgelora.checkpoint import open_checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.layout import targets
from test_adapter import PREFIX, WEIGHTS, change_config
from test_float_oracle import SHARE, TOKENS, make_adapter, with_adapter

SETTINGS = {"target_modules": ["q_proj", "up_proj"], "init_r": 6, "total_step": 10}
Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in range(2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("base"))


def make_pruned(base: Path, folder: Path) -> Path:
    """Of two targets, ranks 2 and 0 are left."""
    config = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=12, **SETTINGS)
    adapted = get_peft_model(oracle.float_model(base), config)
    torch.manual_seed(7)
    for values in adapted.parameters():
        if values.requires_grad:
            values.data = (0.3 * torch.randn_like(values)).half().float()
    masks = {Q0: [True, False, False, True, False, False], Q1: [False] * 6}
    pattern = {f"{target}.lora_E.default": mask for target, mask in masks.items()}
    adapted.peft_config["default"].rank_pattern = pattern
    with pytest.warns(UserWarning):  # of factors of rank 0
        adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["side", "merge"])
def test_pruned_ranks_compute_as_peft_reads_them(base: Path, mode: str, tmp_path: Path) -> None:
    folder = make_pruned(base, tmp_path / "a")
    options = {"format": "float", "mode": mode, "report": False}
    edgelora.export(base, tmp_path / "bundle", adapters={"a": folder}, **options)
    with edgelora.load(tmp_path / "bundle") as model:
        ours = model.logits(TOKENS, adapter="a" if mode == "side" else None)
    with warnings.catch_warnings(action="ignore"):  # of keys of rank_pattern, which are AdaLoRA's
        theirs = oracle.logits(with_adapter(oracle.float_model(base), folder), TOKENS)
    oracle.assert_close(ours, theirs, SHARE)
    branches = read_adapter(folder, targets(open_checkpoint(base).config)).branches
    assert (branches[Q0].rank, Q1 in branches) == (2, False)


def test_peft_s_defaults_pass() -> None:
    config = AdaLoraConfig(target_modules="x", total_step=10).to_dict()
    assert [each for each in FIELDS.ledger(config) if each.verdict == "refused"] == []


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"init_r": 4}, "shape [64, 6], but config and base need [64, 4]"),
        ({"init_r": 0}, "init_r = 0"),
        ({"lora_alpha": 0}, "lora_alpha = 0"),
        ({"lora_alpha": None}, "lora_alpha = null"),
        ({"init_r": None}, "init_r = null"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying = true: not supported with AdaLoRA"),
        ({"rank_pattern": {Q0: [True]}}, f"rank_pattern '{Q0}': names no lora_E"),
        ({"rank_pattern": {f"{Q0}.lora_E": 3}}, "rank_pattern = "),
        ({"use_rslora": True}, "use_rslora = true: not supported with AdaLoRA"),
        ({"bias": "all"}, 'bias = "all": not supported with AdaLoRA'),
        ({"use_dora": True}, "use_dora = true: not supported with AdaLoRA"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_modules": ["q_proj"]}, "up_proj: in the file, but the config's"),
        ({"target_modules": ["q_proj", "up_proj", "o_proj"]}, "o_proj: the file has not all of"),
        ({"future_field": 1}, "future_field = 1: not a field of PEFT 0.21.2's AdaLoraConfig"),
    ],
)
def test_bad_field_is_refused_by_name(
    base: Path, change: dict[str, Any], culprit: str, tmp_path: Path
) -> None:
    folder = make_adapter(base, tmp_path / "a", **SETTINGS)
    change_config(folder, **change)
    with pytest.raises(EdgeLoraError) as caught:
        read_adapter(folder, targets(open_checkpoint(base).config))
    assert culprit in str(caught.value)


Tensors = dict[str, np.ndarray]
E0 = f"{PREFIX}{Q0}.lora_E"


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda t: t.pop(E0), f"{Q0}: the file has not all of"),
        (lambda t: t.update({E0: t[E0][:, 0]}), f"{E0}: shape [6]"),
        (lambda t: t.update({E0: t[E0] * np.nan}), f"{E0}: holds NaN"),
        (lambda t: t.update({f"{E0}.weight": t[E0]}), f"{E0}.weight: not a factor of AdaLoRA"),
        (lambda t: t.clear(), "holds no lora_A, lora_B and lora_E"),
    ],
)
def test_bad_tensor_is_refused_by_name(
    base: Path, change: Callable[[Tensors], object], culprit: str, tmp_path: Path
) -> None:
    folder = make_adapter(base, tmp_path / "a", **SETTINGS)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(EdgeLoraError) as caught:
        read_adapter(folder, targets(open_checkpoint(base).config))
    assert culprit in str(caught.value)


def test_it_is_added_and_inspected_but_not_composed(base: Path, tmp_path: Path) -> None:
    folder = make_pruned(base, tmp_path / "a")
    ledger = {each.item: each for each in adapter_ledger(folder, None)}
    assert not [each for each in ledger.values() if each.verdict == "refused"]
    assert ledger[f"{PREFIX}{Q1}.lora_A"].reason == "rank 0: changes nothing"
    edgelora.export(base, tmp_path / "both", adapters={"a": folder}, report=False)
    edgelora.export(base, tmp_path / "plain", report=False)
    add_adapter(tmp_path / "plain", "a", folder)
    file = "adapters/a/adapter.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "both" / file).read_bytes()
    with pytest.raises(EdgeLoraError, match="/a: peft_type ADALORA: only LoRA is added"):
        edgelora.compose({folder: 1.0}, tmp_path / "out")
