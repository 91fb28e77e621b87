"""The tensors of each architecture, by Hugging Face name. The next architecture starts here."""

from collections.abc import Collection, Mapping
from pathlib import Path

from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_IGNORED = ".rotary_emb.inv_freq"  # older checkpoints store it; it follows from rope_theta

Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name → shape of every tensor of the model: [out_features, in_features] or [features]."""
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    layer = _layer_tensors(config)
    for index in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, config.hidden_size)
    return tensors


def _layer_tensors(config: ModelConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    tensors["post_attention_layernorm.weight"] = (hidden,)
    if config.qk_norm:
        tensors["self_attn.q_norm.weight"] = (config.head_dim,)
        tensors["self_attn.k_norm.weight"] = (config.head_dim,)
    for name, shape, has_bias in _linears(config):
        tensors[f"{name}.weight"] = shape
        if has_bias:
            tensors[f"{name}.bias"] = (shape[0],)
    return tensors


def _linears(config: ModelConfig) -> list[tuple[str, tuple[int, int], bool]]:
    """(module, (out_features, in_features), has a bias) of one layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    return [
        ("self_attn.q_proj", (query, hidden), config.attention_bias),
        ("self_attn.k_proj", (key, hidden), config.attention_bias),
        ("self_attn.v_proj", (key, hidden), config.attention_bias),
        ("self_attn.o_proj", (hidden, query), config.attention_output_bias),
        ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, inner), config.mlp_bias),
    ]


def check_layout(found: Mapping[str, Shape], config: ModelConfig, source: Path) -> None:
    """Raises EdgeLoraError that names every missing, extra or wrongly shaped tensor.

    A tied head that the file holds nevertheless is no extra; its bytes are the reader's to compare.
    """
    if config.num_hidden_layers > len(found):  # before a list of that length is made
        raise EdgeLoraError(
            f"{source}: {len(found)} tensors cannot be {config.num_hidden_layers} layers"
        )
    expected = expected_tensors(config)
    extra = {name for name in found.keys() - expected.keys() if not name.endswith(_IGNORED)}
    if config.tie_word_embeddings:
        extra.discard(HEAD)
    wrong = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = _named("missing tensors", expected.keys() - found.keys())
    problems += _named("tensors that this architecture does not have", extra)
    problems += _named("wrong shapes", wrong)
    if problems:
        raise EdgeLoraError(
            f"{source}: {'; '.join(problems)}; the weights do not belong to this config "
            f"({config.architecture})"
        )


def _named(what: str, names: Collection[str]) -> list[str]:
    if not names:
        return []
    ordered = sorted(names)
    return [f"{what}: {', '.join(ordered)}"]
