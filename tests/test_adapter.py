"""PEFT is the oracle: what its own model merges is what the reader must understand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import LlamaConfig, LlamaForCausalLM

from edgelora.adapter import compare_base_name, doubts, read_adapter, warning_about
from edgelora.adapter.settings import read_settings
from edgelora.adapter.targets import implied_targets, pattern_value
from edgelora.merge import merge

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
PREFIX = "base_model.model."
HIDDEN, INTERMEDIATE, KV, VOCABULARY = 64, 112, 32, 90
SIZES = {  # [out_features, in_features] by the last component
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KV, HIDDEN),
    "v_proj": (KV, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
TARGETS = {
    f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}": size
    for layer in range(2)
    for name, size in SIZES.items()
}
MODULES = ["model", "model.embed_tokens", "model.layers.0", "model.layers.0.mlp", "model.norm"]
MODULES += [*TARGETS, "lm_head", "model.layers.11.self_attn.q_proj", "model.layers.1.experts.0.w1"]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=VOCABULARY))


def save_peft(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A PEFT model with random factors, saved to `folder`."""
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = (torch.randn_like(parameter) * 0.1).to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_alpha": 3},
    "all_linear": {"target_modules": "all-linear", "r": 5, "lora_alpha": 16},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\.mlp\..*": 2, "v_proj": 6},
        "alpha_pattern": {r".*\.0\.self_attn\.q_proj": 3, "mlp.up_proj": 32, r"\w+_proj": 7},
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "one_layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers_of_pattern": {
        "target_modules": [Q0, "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "regex": {"target_modules": r".*\.1\.(self_attn\.[qk]|mlp\.up)_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.v_proj"]},
    "excluded_regex": {"target_modules": "all-linear", "exclude_modules": r".*mlp\..*"},
    "unused_name": {"target_modules": ["q_proj", "c_attn"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True},
    "dora_rslora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "gaussian": {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_delta_equals_peft_merge(tmp_path: Path, config: dict[str, Any]) -> None:
    save_peft(tmp_path, **config)
    # As loaded, not as trained: PEFT sorts the patterns when it saves, and the first match counts.
    model = PeftModel.from_pretrained(tiny_model(), tmp_path)
    head = {"lm_head": (VOCABULARY, HIDDEN)} if "lm_head" in config["target_modules"] else {}
    adapter = read_adapter(tmp_path, TARGETS | head)
    assert sorted(adapter.branches) == sorted(model.base_model.targeted_module_names)
    merged = model.merge_and_unload().state_dict()
    for name, weight in tiny_model().state_dict().items():
        before, after = weight.double().numpy(), merged[name].double().numpy()
        branch = adapter.branches.get(name.removesuffix(".weight"))
        if branch is None:
            assert np.array_equal(before, after)
            continue
        a, b = branch.lora_a.astype(np.float64), branch.lora_b.astype(np.float64)
        wanted = before + branch.scaling * b @ a
        # One rounding a product and sum of rank terms, one for scaling, one for adding.
        roundings = branch.rank + 3
        bound = np.abs(before) + branch.scaling * np.abs(b) @ np.abs(a)
        if branch.magnitude is not None:
            factor = branch.magnitude[:, None] / np.linalg.norm(wanted, axis=1, keepdims=True)
            wanted, bound = factor * wanted, np.abs(factor) * bound
            roundings += len(a.T) + 3  # the norm's sum and root, the quotient, the product
        bound *= roundings * np.finfo(np.float32).eps
        assert (np.abs(wanted - after) <= bound).all(), name
        ours = merge(weight.numpy(), branch.lora_a, branch.lora_b, branch.scaling, branch.magnitude)
        assert (np.abs(wanted - ours) <= bound).all(), name


# PEFT expands "all-linear" from the model itself: the merge test covers it.
BY_NAME = {key: each for key, each in VARIANTS.items() if each["target_modules"] != "all-linear"}
BY_NAME |= {  # the first number of a path is the layer: experts.0 is in layer 1
    "experts": {"target_modules": ["w1"], "layers_to_transform": [1]},
    "experts_zero": {"target_modules": ["w1"], "layers_to_transform": [0]},
    "experts_of_pattern": {
        "target_modules": ["w1"],
        "layers_to_transform": 0,
        "layers_pattern": ["experts", "layers"],
    },
    "layer_eleven": {"target_modules": ["q_proj"], "layers_to_transform": [11, 0]},
    "any_pattern": {
        "target_modules": ["w1"],
        "layers_to_transform": [1],
        "layers_pattern": r"(layers|experts)",
    },
}


@pytest.mark.parametrize("config", BY_NAME.values(), ids=BY_NAME.keys())
def test_implied_targets_equal_peft_matching(config: dict[str, Any]) -> None:
    peft = LoraConfig(**config)
    found = {name: check_target_module_exists(peft, name) for name in MODULES}
    expected = [
        name for name in MODULES if found[name] and type(found[name]) is not _ExcludedModule
    ]
    settings, _ = read_settings(json.loads(json.dumps({"peft_type": "LORA"} | config)))
    assert settings is not None
    assert implied_targets(settings, MODULES) == expected


@pytest.mark.parametrize("key", ["q_proj", "^model.layers.0.*", r"1\..*", "proj", "a|k_proj", Q0])
def test_pattern_value_equals_peft_pattern_key(key: str) -> None:
    patterns = {key: 1, "v_proj": 2}
    for name in MODULES:
        expected = patterns.get(get_pattern_key(patterns.keys(), name), 3)
        assert pattern_value(patterns, name, 3) == expected


def test_peft_s_defaults_pass() -> None:
    config = json.loads(json.dumps(LoraConfig(target_modules="x").to_dict()))
    assert [each for each in read_settings(config)[1] if each.verdict == "refused"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_keep_their_values_and_bfloat16_becomes_float32(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = save_peft(tmp_path, dtype=dtype, target_modules=["q_proj"])
    branch = read_adapter(tmp_path, TARGETS).branches[Q0]
    stored = model.state_dict()[f"{PREFIX}{Q0}.lora_B.default.weight"]
    assert stored.dtype == dtype
    expected = np.float16 if dtype == torch.float16 else np.float32
    assert branch.lora_a.dtype == branch.lora_b.dtype == expected
    assert np.array_equal(branch.lora_b.astype(np.float32), stored.float().numpy())


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_ranks_and_fingerprint_and_base_name(tmp_path: Path) -> None:
    save_peft(tmp_path / "pirate", target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    adapter = read_adapter(tmp_path / "pirate", TARGETS)
    ranks = {target[-6:]: branch.rank for target, branch in adapter.branches.items()}
    assert (adapter.source, ranks) == ("pirate", {"q_proj": 8, "v_proj": 2})
    assert {branch.scaling for branch in adapter.branches.values()} == {1.0, 4.0}
    assert read_adapter(tmp_path / "pirate", TARGETS).fingerprint == adapter.fingerprint
    change_config(tmp_path / "pirate", lora_alpha=9, base_model_name_or_path="hub/Tiny-LLAMA")
    changed = read_adapter(tmp_path / "pirate", TARGETS)
    assert changed.fingerprint != adapter.fingerprint
    assert compare_base_name(changed, "/models/tiny-llama/") is None
    assert compare_base_name(adapter, "anything") is None
    assert "hub/Tiny-LLAMA" in (compare_base_name(changed, "other") or "")


def test_alphas_of_one_target_whose_order_peft_loses_are_doubtful(tmp_path: Path) -> None:
    """PEFT takes the first that matches, and writes them sorted: what was trained is not known."""
    order = {"q_proj": 40, "layers.0.self_attn.q_proj": 4, "v_proj": 7}
    save_peft(tmp_path / "a", target_modules=["q_proj", "v_proj"], alpha_pattern=order)
    adapter = read_adapter(tmp_path / "a", TARGETS)
    assert adapter.branches[Q0].scaling == 4 / 8
    (doubt,) = doubts(adapter)
    assert (
        f"adapter a: alpha_pattern 'layers.0.self_attn.q_proj', 'q_proj': all match {Q0}" in doubt
    )
    assert warning_about(replace(adapter, base_model_name_or_path="x"), "y") == (
        f"{doubt}; adapter a was trained on x, but the base is y"
    )
    save_peft(tmp_path / "b", target_modules=["q_proj"], alpha_pattern={"0.*": 4, "q_proj": 4})
    assert doubts(read_adapter(tmp_path / "b", TARGETS)) == []
