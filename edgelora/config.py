"""A base model's configuration, as the decoder graph needs it. Field names are Hugging Face's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """What the arithmetic of a decoder depends on; nothing else is kept."""

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
    sliding_window: int | None = None  # positions attended to, None: all
    attention_bias: bool = False  # q, k, v (and o unless qwen2)
    attention_output_bias: bool = False  # o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm on each head of q and k before rotary embedding
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
