"""How much memory a planned model takes; all sizes in bytes."""

from edgelora.config import ModelConfig

OVERHEAD_BYTES = 60 * 10**6  # runtime, graph and activations beside weights and kv_cache
_SCALE_BITS = 16
_OFFSET_BITS = 16


def linear_weights(config: ModelConfig) -> int:
    """Weights of all linears but lm_head."""
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    attention = config.hidden_size * (2 * query + 2 * key)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + mlp)


def embedding_weights(config: ModelConfig) -> int:
    """Weights of the embedding, and of lm_head where it is not tied."""
    matrices = 1 if config.tie_word_embeddings else 2
    return matrices * config.vocab_size * config.hidden_size


def bits_per_weight(weight_format: str, block_size: int, *, zero_points: bool = False) -> float:
    """Of codes, scales and zero points."""
    match weight_format:
        case "float":
            return 32.0
        case "nf4":
            return 4 + 8 / 64 + 32 / (64 * 256)
        case "int8":
            return 8 + _SCALE_BITS / block_size
    return 4 + (_SCALE_BITS + (4 if zero_points else 0)) / block_size


def weight_bytes(config: ModelConfig, weight_format: str, block_size: int) -> int:
    """Linears in the format, embedding and head in int8 (float in a float model)."""
    embedding = bits_per_weight("float" if weight_format == "float" else "int8", 32)
    bits = linear_weights(config) * bits_per_weight(weight_format, block_size)
    return int((bits + embedding_weights(config) * embedding) / 8)


def kv_bytes_per_position(config: ModelConfig) -> int:
    """Keys and values of one position in float32."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
