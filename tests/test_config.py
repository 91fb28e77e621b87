"""config.json → ModelConfig: what is read, what passes, what is refused and with which words."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from edgelora.config import ModelConfig, RopeScaling, read_config
from edgelora.errors import EdgeLoraError
from edgelora.plan import ExportOptions
from edgelora.request import prepare
from tiny import LLAMA3_ROPE, SIZES, tiny_llama

SOURCE = Path("base/config.json")
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
CLASSES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def config(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """A small config.json; a value of `...` removes the key."""
    values = {**SIZES, "architectures": [NAMES[architecture]], "model_type": architecture}
    values |= changes
    return {name: value for name, value in values.items() if value is not ...}


def read(architecture: str = "llama", **changes: Any) -> ModelConfig:
    return read_config(config(architecture, **changes), SOURCE)


def refusal(architecture: str = "llama", **changes: Any) -> str:
    with pytest.raises(EdgeLoraError) as caught:
        read(architecture, **changes)
    message = str(caught.value)
    assert message.startswith(f"{SOURCE}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("architecture", NAMES)
def test_everything_that_transformers_writes_is_known(architecture: str) -> None:
    values = CLASSES[architecture](**SIZES).to_dict()
    values["architectures"] = [NAMES[architecture]]
    if architecture == "qwen3":
        values["head_dim"] = 16
    assert read_config(values, SOURCE).architecture == architecture


def test_fields_are_read() -> None:
    found = read()
    assert (found.vocab_size, found.hidden_size, found.intermediate_size) == (384, 64, 96)
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (4, 2, 16)
    assert (found.rms_norm_eps, found.rope_theta) == (2.0**-17, 10000.0)
    assert (found.bos_token_id, found.eos_token_ids) == (0, (1,))
    assert found.rope_scaling is None and found.sliding_window is None


@pytest.mark.parametrize(
    ("architecture", "head_dim"), [("llama", 16), ("mistral", 16), ("qwen2", 16), ("qwen3", 128)]
)
def test_head_dim_has_the_default_of_transformers(architecture: str, head_dim: int) -> None:
    assert read(architecture, head_dim=..., sliding_window=None).head_dim == head_dim


def test_key_value_heads_default_to_all_heads_for_llama_only() -> None:
    assert read(num_key_value_heads=...).num_key_value_heads == 4
    assert "num_key_value_heads is missing" in refusal("qwen2", num_key_value_heads=...)


def test_biases_belong_to_the_architecture() -> None:
    def biases(architecture: str, **changes: Any) -> tuple[bool, bool, bool, bool]:
        found = read(architecture, **changes)
        return (
            found.attention_bias,
            found.attention_output_bias,
            found.mlp_bias,
            found.qk_norm,
        )

    assert biases("llama") == (False, False, False, False)
    assert biases("llama", attention_bias=True, mlp_bias=True) == (True, True, True, False)
    assert biases("qwen2") == (True, False, False, False)
    assert biases("qwen3") == (False, False, False, True)
    assert biases("qwen3", attention_bias=True) == (True, True, False, True)
    assert "attention_bias = True contradicts" in refusal("mistral", attention_bias=True)
    assert "attention_bias = False contradicts" in refusal("qwen2", attention_bias=False)
    assert "mlp_bias = True contradicts" in refusal("qwen3", mlp_bias=True)


def test_end_tokens_are_those_of_both_files() -> None:
    values = config(eos_token_id=[1, 5])
    found = read_config(values, SOURCE, {"eos_token_id": [5, 7]})
    assert found.eos_token_ids == (1, 5, 7)
    assert read(eos_token_id=...).eos_token_ids == ()
    assert "eos_token_id = 'end'" in refusal(eos_token_id="end")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bos_token_id": 384}, "bos_token_id 384: not below vocab_size 384"),
        ({"eos_token_id": [1, 500]}, "eos_token_id 500: not below vocab_size 384"),
        ({"vocab_size": 1}, "eos_token_id 1: not below vocab_size 1"),
    ],
)
def test_token_ids_beyond_the_vocabulary_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(**changes)


def test_end_token_of_the_generation_file_is_held_to_the_vocabulary() -> None:
    with pytest.raises(EdgeLoraError, match="eos_token_id 384: not below vocab_size 384"):
        read_config(config(), SOURCE, {"eos_token_id": 384})


def test_end_token_of_the_tokenizer_is_held_to_the_vocabulary(tmp_path: Path) -> None:
    """An added token that the embedding was not resized for."""
    base = tiny_llama(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|{i}|>" for i in range(384)])
    tokenizer.save(str(base / "tokenizer.json"))
    last = tokenizer.token_to_id("<|383|>")
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|383|>"}))
    with pytest.raises(EdgeLoraError, match=f"end tokens {last} of the tokenizer: not below"):
        prepare(base, {}, ExportOptions())


LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5, "rope_scaling": dict(LLAMA3_ROPE)},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3_ROPE, "type": "llama3"}},
        {"rope_theta": ..., "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}},
    ],
)
def test_both_spellings_of_rotary_settings_give_the_same(changes: dict[str, Any]) -> None:
    found = read(**changes)
    assert (found.rope_theta, found.rope_scaling) == (5e5, LLAMA3)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_theta": ...},
    ],
)
def test_no_rotary_scaling_passes(changes: dict[str, Any]) -> None:
    found = read(**changes)
    assert (found.rope_theta, found.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "mrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_other_rotary_types_are_refused_by_name(kind: str, key: str, spelling: str) -> None:
    message = refusal(**{key: {spelling: kind, "factor": 2.0}})
    assert f"{key}.rope_type {kind} is not supported (only default, llama3)" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is given as 10000.0 and as 500000"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {**LLAMA3_ROPE, "beta": 1}}, "rope_scaling.beta not known"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must be greater"),
        ({"rope_scaling": "llama3"}, "must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_type none"),
        ({"rope_theta": float("nan")}, "rope_theta = nan: must be a positive number"),
    ],
)
def test_contradicting_rotary_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(**changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_multiplier", 12.0),
    ],
)
def test_what_changes_the_arithmetic_is_refused(key: str, value: object) -> None:
    assert f"{key} = {value!r} is not supported" in refusal(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "silu"),
        ("pretraining_tp", 1),
        ("partial_rotary_factor", 1.0),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
        ("use_sliding_window", False),
        ("sliding_window", None),
        ("something_new", None),
        ("torch_dtype", "bfloat16"),
        ("_name_or_path", "x"),
    ],
)
def test_what_is_switched_off_or_harmless_passes(key: str, value: object) -> None:
    assert read(**{key: value}) == read()


def test_unknown_keys_are_all_named() -> None:
    message = refusal(zebra_norm=True, alpha_gate=0.5)
    assert "alpha_gate, zebra_norm: not known to EdgeLoRA; it may change the arith" in message


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 8}, 8),
        ({"sliding_window": None}, None),
        ({}, 4096),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}, 8),
    ],
)
def test_mistral_window_is_read(changes: dict[str, Any], window: int | None) -> None:
    assert read("mistral", **changes).sliding_window == window


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}, None),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, 8),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, None),
        ({"layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_qwen_window_of_all_or_no_layers_is_read(
    architecture: str, changes: dict[str, Any], window: int | None
) -> None:
    assert read(architecture, **changes).sliding_window == window


def test_windows_in_some_layers_are_refused() -> None:
    mixed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert "max_window_layers = 1" in refusal("qwen2", **mixed)
    types = ["full_attention", "sliding_attention"]
    assert "layer_types" in refusal("qwen3", layer_types=types)
    assert "layer_types" in refusal("mistral", sliding_window=8, layer_types=types)
    assert "sliding_window is not supported for llama" in refusal(sliding_window=8)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_other_architectures_are_refused_with_the_list(name: str) -> None:
    message = refusal(architectures=[name])
    assert f"{name} is not supported" in message
    assert all(supported in message for supported in NAMES.values())


def test_missing_architecture_and_foreign_model_type_are_refused() -> None:
    assert "architecture is missing" in refusal(architectures=...)
    assert "model_type 'mistral' does not belong" in refusal(model_type="mistral")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64", None])
def test_sizes_must_be_positive_integers(value: object) -> None:
    assert re.search(r"hidden_size (=|is missing).*positive integer", refusal(hidden_size=value))


def test_all_problems_are_named_at_once() -> None:
    message = refusal(vocab_size=..., hidden_act="gelu", zebra=1, rms_norm_eps=0)
    assert all(word in message for word in ("vocab_size", "hidden_act", "zebra", "rms_norm_eps"))


def test_heads_must_fit() -> None:
    assert "no multiple of num_key_value_heads 3" in refusal(num_key_value_heads=3)
    assert "head_dim 12 is no multiple of 8" in refusal(head_dim=12)
    assert "head_dim is not given" in refusal(hidden_size=66, head_dim=...)
