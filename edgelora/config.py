"""A base model's configuration, as the decoder graph needs it. Field names are Hugging Face's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.config_keys import Lookups, unknown, unsupported
from edgelora.errors import EdgeLoraError
from edgelora.rope import RopeScaling, read_rope

__all__ = ["ARCHITECTURES", "ModelConfig", "RopeScaling", "read_config"]

# Class name in `config.json` → ours, which is transformers' model_type.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_HEAD_DIM_STEP = 8  # the kernels' smallest vector of a head
_QWEN3_HEAD_DIM = 128  # transformers' default, not hidden_size / num_attention_heads
_MISTRAL_WINDOW = 4096  # transformers' default where the key is absent (null: no window)


@dataclass(frozen=True)
class ModelConfig:
    """What the arithmetic of a decoder depends on; nothing else is kept.

    Raises EdgeLoraError, naming every problem, when the numbers cannot belong together.
    """

    architecture: str  # "llama", "mistral", "qwen2", "qwen3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # positions attended to, the own included; None: all
    attention_bias: bool = False  # q, k, v
    attention_output_bias: bool = False  # o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm on each head of q and k before rotary embedding
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        problems = [f"{name} must be positive" for name in _POSITIVE if getattr(self, name) <= 0]
        if self.sliding_window is not None and self.sliding_window <= 0:
            problems.append("sliding_window must be positive")
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % _HEAD_DIM_STEP:
            problems.append(f"head_dim {self.head_dim} is no multiple of {_HEAD_DIM_STEP}")
        problems += self._token_problems()
        if problems:
            raise EdgeLoraError("; ".join(problems))

    def _token_problems(self) -> list[str]:
        """Ids that no row of the embedding has."""
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        keys = {"bos_token_id": bos, "eos_token_id": self.eos_token_ids}
        return [
            f"{key} {token}: not below vocab_size {self.vocab_size}"
            for key, tokens in keys.items()
            for token in tokens
            if not 0 <= token < self.vocab_size
        ]


_POSITIVE = [
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
]


def read_config(
    values: Mapping[str, Any], source: Path, generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """A ModelConfig from the object in `config.json`; `source` is that file, for messages.

    generation: the object in `generation_config.json`; its end tokens are added (chat models
    stop on them).
    Raises EdgeLoraError, naming every key that is missing, wrong, unsupported or unknown.
    """
    architecture = _read_architecture(values, source)
    lookups = Lookups(values)
    fields = _read_fields(architecture, lookups, generation or {})
    problems = [*lookups.problems, *unsupported(values)]
    if names := unknown(values):
        problems.append(f"{', '.join(names)}: not known to EdgeLoRA; it may change the arithmetic")
    if problems:
        raise EdgeLoraError(f"{source}: {'; '.join(problems)}")
    try:
        return ModelConfig(architecture=architecture, **fields)
    except EdgeLoraError as error:
        raise EdgeLoraError(f"{source}: {error}") from None


def _read_architecture(values: Mapping[str, Any], source: Path) -> str:
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        given = "is missing" if name is None else f"{name} is not supported"
        raise EdgeLoraError(
            f"{source}: architecture {given}; EdgeLoRA supports {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    if values.get("model_type") not in (None, architecture):
        raise EdgeLoraError(
            f"{source}: model_type {values['model_type']!r} does not belong to {name} "
            f"(which has {architecture!r})"
        )
    return architecture


def _read_fields(
    architecture: str, lookups: Lookups, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """Every field of ModelConfig but the architecture; problems are left in `lookups`."""
    heads = lookups.integer("num_attention_heads")
    hidden_size = lookups.integer("hidden_size")
    rope_theta, rope_scaling = read_rope(lookups.values, lookups.problems)
    bos = lookups.token_ids("bos_token_id")
    more = Lookups(generation)
    eos = (*lookups.token_ids("eos_token_id"), *more.token_ids("eos_token_id"))
    lookups.problems += [f"generation_config.json: {problem}" for problem in more.problems]
    return {
        "vocab_size": lookups.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": lookups.integer("intermediate_size"),
        "num_hidden_layers": lookups.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": _read_key_value_heads(architecture, lookups, heads),
        "head_dim": _read_head_dim(architecture, lookups, hidden_size, heads),
        "max_position_embeddings": lookups.integer("max_position_embeddings"),
        "rms_norm_eps": lookups.number("rms_norm_eps"),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": lookups.flag("tie_word_embeddings", default=False),
        "sliding_window": _read_window(architecture, lookups),
        **_read_biases(architecture, lookups),
        "qk_norm": architecture == "qwen3",
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": tuple(dict.fromkeys(eos)),
    }


def _read_key_value_heads(architecture: str, lookups: Lookups, heads: int) -> int:
    """Llama's older configs have no such key; the others' defaults differ: it must be given."""
    given = "num_key_value_heads" in lookups.values
    return lookups.integer(
        "num_key_value_heads", heads if given or architecture == "llama" else None
    )


def _read_head_dim(architecture: str, lookups: Lookups, hidden_size: int, heads: int) -> int:
    if lookups.values.get("head_dim") is None and architecture == "qwen3":
        return _QWEN3_HEAD_DIM
    if lookups.values.get("head_dim") is None and hidden_size % heads:
        lookups.problems.append(
            f"hidden_size {hidden_size} is no multiple of num_attention_heads {heads}, "
            "and head_dim is not given"
        )
    return lookups.integer("head_dim", max(1, hidden_size // heads))


def _read_biases(architecture: str, lookups: Lookups) -> dict[str, bool]:
    """Qwen2 always has q, k, v biases and Mistral none: the file may only agree."""
    implied = {"qwen2": True, "mistral": False}.get(architecture)
    bias = lookups.flag("attention_bias", default=bool(implied))
    if implied is not None and bias != implied:
        lookups.problems.append(
            f"attention_bias = {bias} contradicts the architecture {architecture}"
        )
    mlp_bias = lookups.flag("mlp_bias", default=False)
    if mlp_bias and architecture != "llama":
        lookups.problems.append(f"mlp_bias = True contradicts the architecture {architecture}")
    return {
        "attention_bias": bias,
        "attention_output_bias": bias and architecture != "qwen2",
        "mlp_bias": mlp_bias,
    }


def _read_window(architecture: str, lookups: Lookups) -> int | None:
    """The sliding window of all layers. A mixture of windowed and full layers is a problem."""
    window = _configured_window(architecture, lookups)
    types = lookups.values.get("layer_types")
    kind = "full_attention" if window is None else "sliding_attention"
    if types is not None and (not isinstance(types, list) or any(t != kind for t in types)):
        lookups.problems.append(
            f"layer_types other than {kind} in every layer are not supported here"
        )
    return window


def _configured_window(architecture: str, lookups: Lookups) -> int | None:
    values = lookups.values
    if architecture in ("qwen2", "qwen3"):
        return _read_qwen_window(lookups)
    if architecture == "llama":
        if values.get("sliding_window") is not None:
            lookups.problems.append("sliding_window is not supported for llama")
        return None
    if "sliding_window" in values and values["sliding_window"] is None:
        return None
    return lookups.integer("sliding_window", _MISTRAL_WINDOW)


def _read_qwen_window(lookups: Lookups) -> int | None:
    """Qwen's layers from max_window_layers on have the window: all or none is supported."""
    if not lookups.flag("use_sliding_window", default=False):
        return None
    first, layers = map(lookups.values.get, ("max_window_layers", "num_hidden_layers"))
    if isinstance(first, int) and isinstance(layers, int) and first >= layers:
        return None
    if first != 0:
        lookups.problems.append(
            f"max_window_layers = {first}: a sliding window in some layers only is not supported"
        )
    return lookups.integer("sliding_window")
