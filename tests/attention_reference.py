"""Attention in numpy and float64, with how far float32 may be from it; models of one node.

The bytes of the kv_cache are read as ARCHITECTURE.md lays them out, element by element: nothing
here comes from the runtime.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

EPSILON = 2.0**-24
BLOCK = 32
CHUNK = 256  # positions whose weights are summed together
Doubles = NDArray[np.float64]


def up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Spec:
    """What a node is."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    kv_format: str = "float"
    window: int = -1
    norms: bool = False
    packed: bool = True
    positions: int = 2048
    epsilon: float = 1e-5

    @property
    def widths(self) -> tuple[int, int, int]:
        """Of q, k and v in a row."""
        kv = self.kv_heads * self.head_dim
        return self.heads * self.head_dim, kv, kv

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Of a position's key and value in the kv_cache."""
        if self.kv_format == "float":
            return 4 * self.head_dim, 4 * up(self.head_dim, 16)
        key = up(self.head_dim, 32)
        return key + key // 16, up(self.head_dim, 16) + 4

    def table(self, function: Any) -> NDArray[np.float32]:
        """cos or sin of position / 10000^(i / half)."""
        half = self.head_dim // 2
        angles = np.outer(np.arange(self.positions), 10000.0 ** -(np.arange(half) / half))
        return function(angles).astype(np.float32)

    def norm(self, kind: str) -> NDArray[np.float32] | None:
        if not self.norms:
            return None
        rng = np.random.default_rng(ord(kind))
        return rng.uniform(0.5, 1.5, self.head_dim).astype(np.float32)

    def empty_cache(self, batch: int, capacity: int = 0) -> list[NDArray[np.uint8]]:
        """Bytes that say nothing: 0xff, NaN where they are a scale or a float."""
        return [
            np.full((batch, self.kv_heads, capacity, width), 0xFF, np.uint8)
            for width in self.row_bytes
        ]


def attention_model(spec: Spec, **changes: Any) -> bytes:
    """A model of one Attention; `changes` replace attributes or, by role, constants."""
    constants = {
        "cos": spec.table(np.cos),
        "sin": spec.table(np.sin),
        "q_norm": spec.norm("q"),
        "k_norm": spec.norm("k"),
    }
    attributes: dict[str, Any] = {
        "num_heads": spec.heads,
        "kv_num_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "local_window_size": spec.window,
        "epsilon": spec.epsilon,
        "kv_format": spec.kv_format,
    }
    inputs = ["q"] if spec.packed else ["q", "k", "v"]
    inputs = changes.pop("inputs", inputs)
    for name, change in changes.items():
        (attributes if name in attributes else constants)[name] = change
    given = {name: array for name, array in constants.items() if array is not None}
    names = [name if name in inputs else "" for name in "qkv"]
    names += ["past_key", "past_value", "last"]
    names += [name if name in given else "" for name in constants]
    while not names[-1]:
        names.pop()
    outputs = ["y", "present_key", "present_value"]
    node = helper.make_node(
        "Attention", names, outputs, "the_node", domain="edgelora", **attributes
    )
    rows = [(name, TensorProto.FLOAT, 3) for name in inputs]
    cache = [("past_key", TensorProto.UINT8, 4), ("past_value", TensorProto.UINT8, 4)]
    made = [
        ("y", TensorProto.FLOAT, 3),
        *((n.replace("past", "present"), t, r) for n, t, r in cache),
    ]
    graph = helper.make_graph(
        [node],
        "one_node",
        [_value(*each) for each in [*rows, *cache, ("last", TensorProto.INT32, 1)]],
        [_value(*each) for each in made],
        [numpy_helper.from_array(array, name) for name, array in given.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgelora", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _value(name: str, kind: int, rank: int) -> Any:
    return helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(rank)])


@dataclass
class Rows:
    """Numbers, and by how much float32 may have them differently."""

    values: Doubles
    errors: Doubles = field(default_factory=lambda: np.zeros(()))


def prepare(spec: Spec, x: NDArray[np.float32], kind: str, positions: NDArray[np.int64]) -> Rows:
    """Heads [n, heads, D] of q or k: normed, then rotated.

    The norm is a sum of D squares, its root, and two products; the rotation two products and a sum.
    """
    rows, roundings = x.astype(np.float64), 2.0
    weight = spec.norm(kind)
    if weight is not None:
        mean = (rows**2).mean(-1, keepdims=True)
        rows = rows / np.sqrt(mean + np.float64(np.float32(spec.epsilon))) * weight
        roundings += spec.head_dim / 2 + 6
    cos, sin = (spec.table(f)[positions, None].astype(np.float64) for f in (np.cos, np.sin))
    a, b = np.split(rows, 2, -1)
    values = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    ac, bs, bc, as_ = abs(a * cos), abs(b * sin), abs(b * cos), abs(a * sin)
    return Rows(values, roundings * EPSILON * np.concatenate([ac + bs, bc + as_], -1))


@dataclass
class Codes:
    """Blocks along the last dimension, each its integers and one step."""

    codes: Doubles  # […, blocks, 32]
    steps: Doubles  # […, blocks, 1]
    hairs: Doubles  # how far from a half a code must be for float32 to round it the same way


def quantize(rows: Rows) -> Codes:
    """In blocks of 32: step = largest magnitude / 127, code = the nearest integer to x / step."""
    values, errors = (
        _blocks(np.broadcast_to(x, rows.values.shape)) for x in (rows.values, rows.errors)
    )
    steps = np.abs(values).max(-1, keepdims=True) / 127
    safe = np.where(steps > 0, steps, 1)
    wrong = errors / safe + np.abs(values) / safe * (errors.max(-1, keepdims=True) / safe / 127)
    return Codes(np.rint(values / safe), steps, wrong + 4 * 127 * EPSILON)


def _blocks(x: Doubles) -> Doubles:
    room = -x.shape[-1] % BLOCK
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, room)])
    return padded.reshape(*x.shape[:-1], -1, BLOCK)


def rounded(rows: Rows) -> Rows:
    """What `quantize` makes of them; a step of doubt where a hair decides between two codes."""
    made = quantize(rows)
    width = rows.values.shape[-1]
    values = _blocks(rows.values) / np.where(made.steps > 0, made.steps, 1)
    doubtful = np.abs(np.abs(values - made.codes) - 0.5) <= made.hairs
    product = made.codes * made.steps
    relative = made.hairs.max(-1, keepdims=True) / 127  # of the step itself
    errors = np.where(doubtful, made.steps, 0) + np.abs(product) * relative
    flat = (*rows.values.shape[:-1], -1)
    return Rows(product.reshape(flat)[..., :width], errors.reshape(flat)[..., :width])


@dataclass
class Head:
    """One head's kv_cache as its bytes say: codes · scales, or floats whose scales are 1."""

    key_codes: NDArray[Any]  # [capacity, D]
    key_scales: NDArray[Any]  # [capacity, blocks]
    value_codes: NDArray[Any]  # [capacity, D]
    value_scales: NDArray[Any]  # [capacity]

    def keys(self, end: int) -> Doubles:
        codes = self.key_codes[:end].astype(np.float64)
        scales = self.key_scales[:end].astype(np.float64)
        return codes * np.repeat(scales, BLOCK, -1)[:, : codes.shape[1]]

    def part(self, begin: int, end: int) -> list[NDArray[Any]]:
        arrays = (self.key_codes, self.key_scales, self.value_codes, self.value_scales)
        return [array[begin:end] for array in arrays]


def read_head(spec: Spec, key: NDArray[np.uint8], value: NDArray[np.uint8]) -> Head:
    """From the bytes [capacity, row bytes] of a head."""
    capacity, d = key.shape[0], spec.head_dim
    wide, tall = up(d, 32), up(d, 16)
    k, v = key.reshape(-1), value.reshape(-1)
    if spec.kv_format == "float":
        keys = k.view(np.float32).reshape(capacity // 16, d, 16).transpose(0, 2, 1)
        values = v.view(np.float32).reshape(tall // 16, capacity, 16).transpose(1, 0, 2)
        ones = np.ones((capacity, wide // 32))
        return Head(
            keys.reshape(capacity, d), ones, values.reshape(capacity, tall)[:, :d], ones[:, 0]
        )
    split = capacity * wide
    codes = k[:split].view(np.int8).reshape(capacity // 16, wide // 4, 16, 4)  # panel, quad, row
    scales = k[split:].view(np.float16).reshape(capacity // 16, wide // 32, 16)
    end = capacity * tall
    columns = v[:end].view(np.int8).reshape(tall // 16, capacity // 4, 16, 4)
    return Head(
        codes.transpose(0, 2, 1, 3).reshape(capacity, wide)[:, :d],
        scales.transpose(0, 2, 1).reshape(capacity, wide // 32),
        columns.transpose(1, 3, 0, 2).reshape(capacity, tall)[:, :d],
        v[end:].view(np.float32),
    )


def attend(spec: Spec, q: Rows, head: Head, positions: NDArray[np.int64]) -> Rows:
    """q [n, D] of one head, prepared, at their positions → [n, D]."""
    count = int(positions.max()) + 1
    keys, values = head.keys(count), head.value_codes[:count].astype(np.float64)
    shrink = 1 / np.sqrt(spec.head_dim)
    q = Rows(q.values * shrink, q.errors * shrink + 2 * EPSILON * np.abs(q.values * shrink))
    if spec.kv_format == "int8":
        q = rounded(q)
    age = positions[:, None] - np.arange(count)
    seen = (age >= 0) & ((age < spec.window) if spec.window > 0 else True)
    scores = np.where(seen, q.values @ keys.T, -np.inf)
    sums = (spec.head_dim + 4) * EPSILON
    doubts = q.errors @ np.abs(keys).T + sums * (np.abs(q.values) @ np.abs(keys).T)
    below = scores - scores.max(-1, keepdims=True)
    weights = np.exp(below)
    # Of a weight, relative to the largest: both scores' doubts, and two exponentials for each
    # chunk that may bring a new largest score, each as exact as its argument.
    span = np.where(seen, -below, 0).max(-1, keepdims=True)
    doubt = np.where(seen, doubts, 0).max(-1, keepdims=True)
    chunks = count // CHUNK + 20  # one more for each thread's part
    relative = 2 * doubt + 2 * (span + 8) * EPSILON * min(chunks, 24)
    scaled = Rows(weights * head.value_scales[:count], np.zeros(()))
    scaled.errors = scaled.values * relative
    if spec.kv_format == "int8":
        scaled = rounded(scaled)
    total = weights.sum(-1, keepdims=True)
    out = scaled.values @ values / total
    size = np.abs(scaled.values) @ np.abs(values) / total
    errors = scaled.errors @ np.abs(values) / total
    adding = 2 * (CHUNK + chunks + 16) * EPSILON
    return Rows(out, errors + size * (adding + relative) + np.abs(out) * relative)
