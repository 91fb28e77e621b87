"""How much memory a planned model takes; all sizes in bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgelora.config import ModelConfig
from edgelora.layout import EMBEDDING, PANEL_ROWS, Projection, projections, targets
from edgelora.plan.decisions import Kind, Plan, kind_of, shares_head
from edgelora.plan.inventory import Inventory

OVERHEAD_BYTES = 60 * 10**6  # runtime, graph and activations beside weights and kv_cache
_K_STEP = 32  # columns that codes are padded to
_NF4_GROUP = 256 * 64  # weights whose absmax codes share a nested absmax
_NF4_TABLE = 256 * 4  # absmax_table, one a node
_EXTRA_BYTES = {"": 0.0, "zero_points": 0.5, "offsets": 2.0, "moved": 4.0}  # a block


@dataclass(frozen=True)
class Sizes:
    """Of the weights and adapters that a plan leads to; norms, biases and rotary tables are left
    out.
    """

    weights: int  # in the weight file: linears, embedding, and lm_head where it is not the same
    streamed: int  # read for each decoded token: linears and lm_head, not the embedding's rows
    adapters: int  # all of them
    largest_adapter: int

    @property
    def held(self) -> int:
        return self.weights + self.adapters


def plan_sizes(config: ModelConfig, plan: Plan, base: Inventory) -> Sizes:
    """Of this model under this plan."""
    *inner, head = projections(config)
    linears = sum(_projection_bytes(projection, plan, base) for projection in inner)
    embedding = embedding_bytes(config, plan, base)
    shared = shares_head(config, plan, base)
    head_bytes = embedding if shared else _projection_bytes(head, plan, base)
    side = {} if plan.mode == "merge" else base.adapters
    adapters = [
        adapter_bytes(config, plan, ranks, _vectors(base, name))
        + _prefix_bytes(config, plan, base.prefixes.get(name, 0))
        for name, ranks in side.items()
    ]
    return Sizes(
        weights=linears + embedding + (0 if shared else head_bytes),
        streamed=linears + head_bytes,
        adapters=sum(adapters),
        largest_adapter=max(adapters, default=0),
    )


def _vectors(base: Inventory, adapter: str) -> list[str]:
    """The targets that have row factors, and those that have a bias."""
    return [*base.magnitudes.get(adapter, ()), *base.biases.get(adapter, ())]


def embedding_bytes(config: ModelConfig, plan: Plan, base: Inventory) -> int:
    """A tied lm_head of flavor ort has the same codes, which are stored once (if 1 MiB or more)."""
    kind = kind_of(plan, base, EMBEDDING)
    shape = (config.vocab_size, config.hidden_size)
    return _matrix_bytes(kind, shape, plan.flavor) + _tables([kind])


def _projection_bytes(projection: Projection, plan: Plan, base: Inventory) -> int:
    """Linears in one node share an absmax table; they are in one where they are of one kind."""
    kinds = [kind_of(plan, base, linear.target) for linear in projection.linears]
    sizes = [
        _matrix_bytes(kind, (linear.out_features, linear.in_features), plan.flavor)
        for kind, linear in zip(kinds, projection.linears, strict=True)
    ]
    packed = plan.flavor == "edgelora" and projection.packable and len(set(kinds)) == 1
    return sum(sizes) + _tables(kinds[:1] if packed else kinds)


def _tables(kinds: Iterable[Kind]) -> int:
    return sum(_NF4_TABLE for kind in kinds if kind.format in ("nf4", "fp4") and not kind.extra)


def _matrix_bytes(kind: Kind, shape: tuple[int, int], flavor: str) -> int:
    """ARCHITECTURE.md, "Weights: formats"; for flavor ort the layout of MatMulNBits."""
    if flavor == "ort":
        return _nbits_bytes(kind, shape)
    rows, columns = _round_up(shape[0], PANEL_ROWS), _round_up(shape[1], _K_STEP)
    match kind.format:
        case "float":
            return rows * shape[1] * 4
        case "nf4" | "fp4":
            groups = _ceil_div(shape[0] * shape[1], _NF4_GROUP)
            group = 256 * 4 if kind.extra == "plain" else 256 + 4
            return rows * columns // 2 + groups * group + 4
        case "int8":
            return rows * columns + rows * _ceil_div(shape[1], kind.block_size) * 2
    statistics = rows * _ceil_div(shape[1], kind.block_size) * (2 + _EXTRA_BYTES[kind.extra])
    return rows * columns // 2 + int(statistics)


def _nbits_bytes(kind: Kind, shape: tuple[int, int]) -> int:
    """Scales and zero points (of offsets too) are float32 there."""
    rows, columns = shape
    if kind.format == "float":
        return rows * columns * 4
    blocks = _ceil_div(columns, kind.block_size)
    codes = rows * blocks * kind.block_size
    return codes // (1 if kind.format == "int8" else 2) + rows * blocks * (8 if kind.extra else 4)


def adapter_bytes(
    config: ModelConfig, plan: Plan, ranks: Mapping[str, int], vectors: Iterable[str] = ()
) -> int:
    """Both factors of every target: float16, or float32 in a float bundle and flavor ort; and a
    float32 for each row of the targets of `vectors`.
    """
    shapes = targets(config)
    numbers = 0
    for target, rank in ranks.items():
        rows, columns = shapes[target]
        numbers += rank * (columns + (rows if plan.flavor == "ort" else _round_up(rows, 16)))
    return numbers * _number_bytes(plan) + sum(4 * shapes[target][0] for target in vectors)


def _number_bytes(plan: Plan) -> int:
    return 2 if plan.flavor == "edgelora" and plan.format != "float" else 4


def _prefix_bytes(config: ModelConfig, plan: Plan, positions: int) -> int:
    """Keys and values in the adapter's file, from where a session copies them."""
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return positions * row * _number_bytes(plan)


def kv_bytes_per_position(config: ModelConfig, plan: Plan) -> int:
    """Keys and values of one position in all layers: ARCHITECTURE.md, "The kv_cache"; float32 in
    flavor ort.
    """
    d = config.head_dim
    key, value = _round_up(d, _K_STEP), _round_up(d, PANEL_ROWS)
    if plan.flavor == "ort":
        row = 2 * 4 * d
    elif plan.format == "float":
        row = 4 * d + 4 * value
    else:
        row = key + key // _K_STEP * 2 + value + 4  # int8 codes, float16 and float32 scales
    return config.num_hidden_layers * config.num_key_value_heads * row


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def _round_up(count: int, step: int) -> int:
    return _ceil_div(count, step) * step
