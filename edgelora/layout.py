"""The tensors of a decoder: its linears by module path and shape, and which share a node.

The next architecture starts here and in config.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from edgelora.config import ModelConfig

PANEL_ROWS = (
    16  # rows that a packed panel interleaves: a packed projection's slices are multiples of it
)

EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"


@dataclass(frozen=True)
class Linear:
    """One linear of the checkpoint: y = W·x (+ bias), W [out_features, in_features]."""

    target: str  # module path: "model.layers.0.self_attn.q_proj"
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weight(self) -> str:
        return f"{self.target}.weight"


@dataclass(frozen=True)
class Projection:
    """Linears that read the same row and may share a node, in the order of their outputs."""

    name: str  # "model.layers.0.self_attn.qkv_proj"
    linears: tuple[Linear, ...]

    @property
    def packable(self) -> bool:
        """A panel belongs to one slice only if each slice is whole panels."""
        return all(linear.out_features % PANEL_ROWS == 0 for linear in self.linears)


def attention_projections(config: ModelConfig, layer: int) -> tuple[Projection, Projection]:
    """q, k, v in one; o."""
    path = f"model.layers.{layer}.self_attn"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    qkv = tuple(
        Linear(f"{path}.{name}", config.hidden_size, count * config.head_dim, config.attention_bias)
        for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads))
    )
    o_proj = Linear(
        f"{path}.o_proj", heads * config.head_dim, config.hidden_size, config.attention_output_bias
    )
    return Projection(f"{path}.qkv_proj", qkv), Projection(o_proj.target, (o_proj,))


def mlp_projections(config: ModelConfig, layer: int) -> tuple[Projection, Projection]:
    """gate, up in one; down."""
    path = f"model.layers.{layer}.mlp"
    hidden, intermediate, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    gate_up = tuple(
        Linear(f"{path}.{name}", hidden, intermediate, bias) for name in ("gate_proj", "up_proj")
    )
    down = Linear(f"{path}.down_proj", intermediate, hidden, bias)
    return Projection(f"{path}.gate_up_proj", gate_up), Projection(down.target, (down,))


def head(config: ModelConfig) -> Projection:
    """lm_head; its weight is the embedding's when they are tied."""
    return Projection("lm_head", (Linear("lm_head", config.hidden_size, config.vocab_size),))


def weight_name(config: ModelConfig, target: str) -> str:
    """The tensor that holds a target's weight: of a tied lm_head the embedding's."""
    tied = target == "lm_head" and config.tie_word_embeddings
    return f"{EMBEDDING if tied else target}.weight"


def projections(config: ModelConfig) -> Iterator[Projection]:
    """Every projection in the order in which a token meets them, lm_head last."""
    for layer in range(config.num_hidden_layers):
        yield from attention_projections(config, layer)
        yield from mlp_projections(config, layer)
    yield head(config)


def layer_of(target: str) -> int:
    """3 of "model.layers.3.mlp.up_proj"; 0 outside the layers."""
    parts = target.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else 0


def targets(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module path → (out_features, in_features) of every linear that an adapter may name."""
    return {
        linear.target: (linear.out_features, linear.in_features)
        for projection in projections(config)
        for linear in projection.linears
    }


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the checkpoint: [out_features, in_features] or [features].

    A tied lm_head is not among them.
    """
    tensors: dict[str, tuple[int, ...]] = {
        f"{EMBEDDING}.weight": (config.vocab_size, config.hidden_size)
    }
    for projection in projections(config):
        for linear in projection.linears:
            tensors[linear.weight] = (linear.out_features, linear.in_features)
            if linear.bias:
                tensors[f"{linear.target}.bias"] = (linear.out_features,)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors | {f"{norm}.weight": (size,) for norm, size in norms(config).items()}


def norms(config: ModelConfig) -> dict[str, int]:
    """Module path → features of every RMS norm."""
    sizes = {}
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        sizes[f"{path}.input_layernorm"] = config.hidden_size
        sizes[f"{path}.post_attention_layernorm"] = config.hidden_size
        if config.qk_norm:
            sizes[f"{path}.self_attn.q_norm"] = config.head_dim
            sizes[f"{path}.self_attn.k_norm"] = config.head_dim
    return sizes | {FINAL_NORM: config.hidden_size}
