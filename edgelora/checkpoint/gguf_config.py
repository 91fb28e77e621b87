"""A GGUF file's fields as ModelConfig, and its tensor names as Hugging Face's.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the values are what llama.cpp's
convert_hf_to_gguf.py writes for these architectures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.checkpoint.gguf_file import GgufFile
from edgelora.checkpoint.layout import EMBEDDING, HEAD
from edgelora.config import ARCHITECTURES, ModelConfig, RopeScaling
from edgelora.config_keys import Lookups
from edgelora.errors import EdgeLoraError

SUPPORTED = ("llama", "qwen2", "qwen3")  # general.architecture; Mistral is written as llama
ROPE_FACTORS = "rope_freqs.weight"  # [head_dim / 2], divides the rotary frequencies

_GLOBAL_NAMES = {
    EMBEDDING: "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# `{arch}.` keys that are read below
_READ = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
    ]
)
# `{arch}.` keys that would change the arithmetic, with the only values EdgeLoRA computes
_ONLY_VALUES: Mapping[str, tuple[object, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0,),
    "rope.scale_linear": (1.0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "embedding_scale": (1.0,),
    "residual_scale": (1.0,),
    "use_parallel_residual": (False,),
}
_STOP_TOKENS = ("eos", "eot", "eom")  # end of text, of turn, of message: generation ends at each
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192  # in every published Llama 3
_FACTOR_TOLERANCE = 1e-4  # the converter computes the factors in float32


def huggingface_name(gguf_name: str) -> str | None:
    """`blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`; None if unknown."""
    for theirs, name in _GLOBAL_NAMES.items():
        if name == gguf_name:
            return theirs
    parts = gguf_name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] not in ("weight", "bias"):
        return None
    modules = [theirs for theirs, name in _LAYER_NAMES.items() if name == parts[2]]
    return f"model.layers.{parts[1]}.{modules[0]}.{parts[3]}" if modules else None


def read_gguf_config(gguf: GgufFile) -> ModelConfig:
    """Raises EdgeLoraError, naming every key that is missing, wrong, unsupported or unknown."""
    path = gguf.file.path
    architecture = gguf.fields.get("general.architecture")
    if architecture not in SUPPORTED:
        raise EdgeLoraError(
            f"{path}: architecture {architecture} is not supported; EdgeLoRA supports "
            f"{', '.join(ARCHITECTURES)} (in GGUF: {', '.join(SUPPORTED)})"
        )
    prefix = f"{architecture}."
    values = {k.removeprefix(prefix): v for k, v in gguf.fields.items() if k.startswith(prefix)}
    lookups = Lookups(values)
    fields = _read_fields(architecture, lookups, gguf)
    problems = [*(prefix + problem for problem in lookups.problems), *_refused(values, prefix)]
    if problems:
        raise EdgeLoraError(f"{path}: {'; '.join(problems)}")
    try:
        return ModelConfig(**fields, rope_scaling=_read_rope_factors(gguf, fields))
    except EdgeLoraError as error:
        raise EdgeLoraError(f"{path}: {error}") from None


def _refused(values: Mapping[str, Any], prefix: str) -> list[str]:
    problems = [
        f"{prefix}{name} = {values[name]!r} is not supported (only {only[0]!r})"
        for name, only in _ONLY_VALUES.items()
        if name in values and values[name] not in only
    ]
    unknown = sorted(prefix + name for name in values.keys() - _READ - _ONLY_VALUES.keys())
    if unknown:
        problems.append(
            f"{', '.join(unknown)}: not known to EdgeLoRA; it may change the arithmetic"
        )
    return problems


def _read_fields(architecture: str, lookups: Lookups, gguf: GgufFile) -> dict[str, Any]:
    heads = lookups.integer("attention.head_count")
    hidden_size = lookups.integer("embedding_length")
    head_dim = _read_head_dim(lookups, hidden_size, heads)
    window = lookups.values.get("attention.sliding_window") or None
    bos = _read_token_ids(gguf, lookups, "bos")
    return {
        "architecture": "mistral" if window and architecture == "llama" else architecture,
        "vocab_size": _read_vocab_size(lookups, gguf),
        "hidden_size": hidden_size,
        "intermediate_size": lookups.integer("feed_forward_length"),
        "num_hidden_layers": lookups.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": lookups.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": lookups.integer("context_length"),
        "rms_norm_eps": lookups.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": lookups.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "sliding_window": _read_window(architecture, lookups, window),
        **_find_biases(architecture, gguf),
        "qk_norm": architecture == "qwen3",
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": _read_token_ids(gguf, lookups, *_STOP_TOKENS),
    }


def _read_head_dim(lookups: Lookups, hidden_size: int, heads: int) -> int:
    """Keys, values and rotary dimensions must all have the one head_dim."""
    if "attention.key_length" not in lookups.values and hidden_size % heads:
        lookups.problems.append(f"embedding_length {hidden_size} is no multiple of {heads} heads")
    head_dim = lookups.integer("attention.key_length", max(1, hidden_size // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if lookups.integer(name, head_dim) != head_dim:
            lookups.problems.append(f"{name} must be the head's {head_dim}")
    return head_dim


def _read_vocab_size(lookups: Lookups, gguf: GgufFile) -> int:
    """The embedding has a row for each token; the key is optional."""
    embedding = gguf.tensors.get(_GLOBAL_NAMES[EMBEDDING])
    return lookups.integer("vocab_size", embedding.shape[0] if embedding else None)


def _read_window(architecture: str, lookups: Lookups, window: object) -> int | None:
    if window is None:
        return None
    if architecture != "llama":
        lookups.problems.append("attention.sliding_window is not supported for this architecture")
    return lookups.integer("attention.sliding_window")


def _find_biases(architecture: str, gguf: GgufFile) -> dict[str, bool]:
    """GGUF has no key for them: layer 0 shows which there are; the layout check does the rest."""
    found = {
        name: f"blk.0.{name}.bias" in gguf.tensors for name in ("attn_q", "attn_output", "ffn_up")
    }
    llama_like = architecture == "llama"
    return {
        "attention_bias": architecture == "qwen2" or found["attn_q"],
        "attention_output_bias": architecture != "qwen2" and found["attn_output"],
        "mlp_bias": llama_like and found["ffn_up"],
    }


def _read_token_ids(gguf: GgufFile, lookups: Lookups, *names: str) -> tuple[int, ...]:
    """The ids of the named special tokens that the file has."""
    special = Lookups(gguf.fields)
    ids = [i for n in names for i in special.token_ids(f"tokenizer.ggml.{n}_token_id")]
    lookups.problems += special.problems
    return tuple(dict.fromkeys(ids))


def _read_rope_factors(gguf: GgufFile, fields: Mapping[str, Any]) -> RopeScaling | None:
    """The llama3 parameters that give the file's rotary factors. GGUF stores only the factors."""
    if ROPE_FACTORS not in gguf.tensors:
        return None
    path, tensor = gguf.file.path, gguf.tensors[ROPE_FACTORS]
    if tensor.type.name != "F32" or tensor.shape != (fields["head_dim"] // 2,):
        raise EdgeLoraError(f"{path}: {ROPE_FACTORS} must be F32 [{fields['head_dim'] // 2}]")
    factors = gguf.raw(ROPE_FACTORS).view("<f4").reshape(-1)
    if np.all(factors == 1):
        return None
    scaling = RopeScaling(round(float(factors.max())), _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL)
    expected = llama3_factors(fields["rope_theta"], fields["head_dim"], scaling)
    if not np.allclose(factors, expected, rtol=_FACTOR_TOLERANCE, atol=0):
        raise EdgeLoraError(
            f"{path}: {ROPE_FACTORS} is not Llama 3's rotary scaling (low 1, high 4, original "
            "8192 positions), the only one that EdgeLoRA supports in a GGUF"
        )
    return scaling


def llama3_factors(theta: float, head_dim: int, scaling: RopeScaling) -> NDArray[np.float64]:
    """What llama3 scaling divides each rotary frequency by, [head_dim / 2].

    1 where the wavelength is below original / high, factor where it is above original / low, and
    between them 1 / ((1 − s) / factor + s) with s = (original / wavelength − low) / (high − low).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    result: NDArray[np.float64] = 1 / ((1 - smooth) / scaling.factor + smooth)
    return result
