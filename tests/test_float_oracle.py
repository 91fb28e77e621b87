"""With weights left in float, the graph and its side branches compute what transformers and PEFT
compute.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import edgelora
import oracle
import tiny

SHARE = 1e-4  # of the largest logit's magnitude: float32 itself is good for 0.8e-4 on SmolLM2
TOKENS = [5, 17, 300, 42, 42, 0, 99, 380, 7, 256, 12, 3, 64, 65, 66, 200, 1, 31, 77, 150]

ARCHITECTURES: dict[str, Callable[..., Path]] = {
    "llama": tiny.tiny_llama,
    "llama3_rope": tiny.tiny_llama3_rope,
    "mistral": tiny.tiny_mistral,
    "qwen2": tiny.tiny_qwen2,
    "qwen3": tiny.tiny_qwen3,
    "biased": partial(tiny.tiny_llama, attention_bias=True, mlp_bias=True),
}
ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "one_of_a_packed_projection": {"target_modules": ["v_proj", "up_proj"]},
    "all_linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 6},
        "alpha_pattern": {"gate_proj": 40},
    },
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora_lm_head": {"target_modules": ["lm_head", "v_proj"], "use_dora": True},
    "lora_bias": {"target_modules": "all-linear", "lora_bias": True},
    "lora_bias_lm_head": {"target_modules": ["lm_head", "v_proj", "down_proj"], "lora_bias": True},
    "bias_of_all": {"target_modules": ["o_proj", "down_proj"], "bias": "all"},
    "bias_of_targets": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    "bias_of_all_and_its_own": {"target_modules": ["v_proj"], "bias": "all", "lora_bias": True},
    "ia3": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "ia3_of_up_and_down": {
        "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"],
        "feedforward_modules": ".*down_proj",
    },
    "ia3_lm_head": {"target_modules": ["lm_head", "gate_proj"], "feedforward_modules": []},
    "adalora": {"target_modules": "all-linear", "init_r": 6, "total_step": 10},
    "dora_and_bias": {"target_modules": ["q_proj", "up_proj"], "bias": "all", "use_dora": True},
}


def make_adapter(base: Path, folder: Path, **settings: object) -> Path:
    """A PEFT folder with random factors that float16 can hold, B not zero; (IA)³ where settings
    name feedforward_modules, AdaLoRA where they name init_r.
    """
    model = oracle.float_model(base)
    if "feedforward_modules" in settings:
        config: PeftConfig = IA3Config(task_type="CAUSAL_LM", **settings)
    elif "init_r" in settings:
        config = AdaLoraConfig(task_type="CAUSAL_LM", **{"lora_alpha": 12, **settings})
    else:
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, **settings})
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # PEFT on a tied lm_head
        adapted = get_peft_model(model, config)
    torch.manual_seed(7)
    for name, values in adapted.named_parameters():
        if values.requires_grad:
            around = 1.0 if ".ia3_l" in name else 0.0
            values.data = (around + 0.2 * torch.randn_like(values)).half().float()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # PEFT on lora_bias
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def with_adapter(model: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
    """PEFT's own reading of the folder."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return PeftModel.from_pretrained(model, str(folder), adapter_name=name)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ARCHITECTURES[request.param](tmp_path_factory.mktemp(request.param))


def test_logits_equal_transformers_for_the_base(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", format="float")
    with edgelora.load(tmp_path / "bundle", threads=2) as model:
        oracle.assert_close(
            model.logits(TOKENS), oracle.logits(oracle.float_model(base), TOKENS), SHARE
        )


def test_decode_continues_as_transformers_does(base: Path, tmp_path: Path) -> None:
    edgelora.export(base, tmp_path / "bundle", format="float")
    with edgelora.load(tmp_path / "bundle", threads=1) as model, model.session() as session:
        session.prefill(TOKENS)
        ids = session.decode(12, ignore_eos=True)
    assert ids == oracle.greedy(oracle.float_model(base), TOKENS, 12)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_equal_peft_for_an_adapter(base: Path, kind: str, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / kind, **ADAPTERS[kind])
    edgelora.export(base, tmp_path / "bundle", adapters={"a": adapter}, format="float")
    with edgelora.load(tmp_path / "bundle", threads=2) as model:
        ours, without = model.logits(TOKENS, adapter="a"), model.logits(TOKENS)
    plain = oracle.float_model(base)
    oracle.assert_close(without, oracle.logits(plain, TOKENS), SHARE)
    theirs = oracle.logits(with_adapter(plain, adapter), TOKENS)
    oracle.assert_close(ours, theirs, SHARE)
    assert np.abs(ours - without).max() > 100 * SHARE * np.abs(theirs).max()


def test_weighted_sum_equals_peft_s_cat(base: Path, tmp_path: Path) -> None:
    folders = {
        "a": make_adapter(base, tmp_path / "a", target_modules="all-linear"),
        "b": make_adapter(base, tmp_path / "b", target_modules=["q_proj", "down_proj"], r=2),
    }
    edgelora.export(base, tmp_path / "bundle", adapters=folders, format="float")
    with edgelora.load(tmp_path / "bundle", threads=2) as model:
        ours = model.logits(TOKENS, adapter={"a": 0.7, "b": 0.3})
    theirs = with_adapter(oracle.float_model(base), folders["a"], "a")
    theirs.load_adapter(str(folders["b"]), adapter_name="b")
    add_scaled_deltas(theirs, {"a": 0.7, "b": 0.3})
    with theirs.disable_adapter():
        oracle.assert_close(ours, oracle.logits(theirs, TOKENS), SHARE)


def test_weighted_sum_with_dora_and_ia3_adds_each_one_s_change(base: Path, tmp_path: Path) -> None:
    folders = {
        "a": make_adapter(base, tmp_path / "a", target_modules="all-linear", use_dora=True),
        "b": make_adapter(base, tmp_path / "b", target_modules=["q_proj", "down_proj"], r=2),
        "c": make_adapter(
            base, tmp_path / "c", target_modules=["v_proj", "up_proj"], use_dora=True
        ),
        "d": make_adapter(
            base, tmp_path / "d", target_modules=["k_proj", "v_proj"], feedforward_modules=[]
        ),
    }
    weights = {"a": 0.7, "b": 0.3, "c": -0.4, "d": 0.6}
    edgelora.export(base, tmp_path / "bundle", adapters=folders, format="float")
    with edgelora.load(tmp_path / "bundle", threads=2) as model:
        ours = model.logits(TOKENS, adapter=weights)
    oracle.assert_close(ours, oracle.logits(summed(base, folders, weights), TOKENS), SHARE)


def test_weighted_sum_with_biases_adds_each_one_s_change(base: Path, tmp_path: Path) -> None:
    """Two that train the base's biases, which PEFT itself cannot hold at once."""
    settings = {
        "a": {"target_modules": ["o_proj", "up_proj"], "bias": "all", "use_dora": True},
        "b": {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    }
    weights = {"a": 0.7, "b": -0.4}
    folders = {name: make_adapter(base, tmp_path / name, **settings[name]) for name in weights}
    edgelora.export(base, tmp_path / "bundle", adapters=folders, format="float")
    with edgelora.load(tmp_path / "bundle", threads=2) as model:
        ours = model.logits(TOKENS, adapter=weights)
    oracle.assert_close(ours, oracle.logits(summed(base, folders, weights), TOKENS), SHARE)


def summed(base: Path, folders: dict[str, Path], weights: dict[str, float]) -> PreTrainedModel:
    """The base plus the weighted changes that PEFT's merge of each adapter makes."""
    total = oracle.float_model(base)
    plain = {name: values.clone() for name, values in total.state_dict().items()}
    for name, folder in folders.items():
        merged = with_adapter(oracle.float_model(base), folder).merge_and_unload().state_dict()
        for key, values in total.state_dict().items():
            values += weights[name] * (merged[key] - plain[key])
    return total


def add_scaled_deltas(model: PeftModel, weights: dict[str, float]) -> None:
    """W0 += Σ weight·delta, by PEFT's own get_delta_weight."""
    with torch.no_grad():
        for module in model.modules():
            for name, weight in weights.items():
                if hasattr(module, "get_delta_weight") and name in module.lora_A:
                    module.get_base_layer().weight += weight * module.get_delta_weight(name)


ADAPTERS_TO_MERGE = {k: v for k, v in ADAPTERS.items() if "bias" in k or "ia3" in k}
ADAPTERS_TO_MERGE |= {k: ADAPTERS[k] for k in ("all_linear", "dora", "adalora")}
ADAPTERS_TO_MERGE["ia3_of_inputs"] = {
    "target_modules": ["q_proj", "v_proj", "gate_proj", "o_proj", "down_proj"],
    "feedforward_modules": ["q_proj", "gate_proj", "o_proj", "down_proj"],
}


@pytest.mark.parametrize("kind", ADAPTERS_TO_MERGE)
def test_merged_equals_peft_merge(base: Path, kind: str, tmp_path: Path) -> None:
    """PEFT merges no bias of lora_B into a base that has none, and a tied head into the embedding
    too: there its forward alone is asked.
    """
    settings = ADAPTERS_TO_MERGE[kind]
    adapter = make_adapter(base, tmp_path / "a", **settings)
    edgelora.export(
        base, tmp_path / "bundle", adapters={"a": adapter}, format="float", mode="merge"
    )
    with edgelora.load(tmp_path / "bundle") as model:
        ours = model.logits(TOKENS)
    theirs = with_adapter(oracle.float_model(base), adapter)
    oracle.assert_close(ours, oracle.logits(theirs, TOKENS), SHARE)
    if "lora_bias" not in settings and "lm_head" not in settings["target_modules"]:
        oracle.assert_close(ours, oracle.logits(theirs.merge_and_unload(), TOKENS), SHARE)
