"""The keys of a Hugging Face `config.json`, and typed look-ups that collect every problem."""

from collections.abc import Mapping
from typing import Any

# Read by `config.py`, each into a field of ModelConfig or into a refusal.
READ = frozenset(
    [
        "architectures",
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "bos_token_id",
        "eos_token_id",
        "quantization_config",
    ]
)  # quantization_config is the checkpoint readers' subject

# Training, generation, bookkeeping: they never reach the arithmetic of a forward pass.
HARMLESS = frozenset(
    [
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "return_dict_in_generate",
        "output_scores",
        "torchscript",
        "tf_legacy_loss",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "task_specific_params",
        "problem_type",
        "tokenizer_class",
        "prefix",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "gradient_checkpointing",
        "is_decoder",
        "chunk_size_feed_forward",
        "max_sequence_length",
        "attn_implementation",
        "unsloth_fixed",
        "unsloth_version",
        "model_name",
        "name_or_path",
        "ignore_keys_at_rope_validation",
        "transformers.js_config",
        "is_llama_config",
    ]
)

# Keys that would change the arithmetic, with the only value EdgeLoRA computes (null passes too).
ONLY_VALUE: Mapping[str, object] = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_bfloat16": False,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "clip_qkv": None,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "use_mrope": False,
    "rope_interleaved": False,
}


def unsupported(values: Mapping[str, Any]) -> list[str]:
    """What in `values` has a value that EdgeLoRA does not compute; empty if nothing."""
    return [
        f"{name} = {values[name]!r} is not supported (only {only!r})"
        for name, only in ONLY_VALUE.items()
        if values.get(name) is not None and not _same(values[name], only)
    ]


def _same(value: object, only: object) -> bool:
    """1 and 1.0 are the same setting; 1 and True are not."""
    return value == only and isinstance(value, bool) == isinstance(only, bool)


def unknown(values: Mapping[str, Any]) -> list[str]:
    """Keys that are set but neither read nor known to be harmless.

    A null is "not set", and a leading underscore marks transformers' own notes.
    """
    known = READ | HARMLESS | ONLY_VALUE.keys()
    return sorted(
        name
        for name, value in values.items()
        if name not in known and value is not None and not name.startswith("_")
    )


class Lookups:
    """Typed look-ups in a JSON object. A problem is noted, and a stand-in returned."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.problems: list[str] = []

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._present(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        return int(self._refuse(name, value, "a positive integer"))

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self._present(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and 0 < value < float("inf"):
            return float(value)
        return self._refuse(name, value, "a positive number")

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._present(name, default)
        if isinstance(value, bool):
            return value
        return bool(self._refuse(name, value, "true or false"))

    def token_ids(self, name: str) -> tuple[int, ...]:
        """An id, a list of ids, or nothing: as a tuple without repeats."""
        value = self.values.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(dict.fromkeys(ids))
        self._refuse(name, value, "a token id or a list of them")
        return ()

    def _present(self, name: str, default: object) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _refuse(self, name: str, value: object, wanted: str) -> float:
        given = "is missing" if value is None else f"= {value!r}"
        self.problems.append(f"{name} {given}: must be {wanted}")
        return 1
