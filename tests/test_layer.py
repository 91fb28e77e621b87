"""The operator Layer in a plain onnxruntime session: bit for bit the nodes that it is made of.

What those nodes compute, test_operators and test_attention hold against numpy.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from attention_reference import Spec, attention_model, read_head
from operator_models import Packed, linear_model, nf4, open_session, packed_of

PREFIXES = ("qkv_", "o_", "gate_up_", "down_")  # of the linears; those of attention have none
FORMATS = [
    ("int4",) * 4,
    ("nf4",) * 4,
    ("int8",) * 4,
    ("int4+zero_points", "int8", "nf4", "float"),
    ("float", "nf4", "int4+offsets", "int4"),
]


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int


SMALL = Size(64, 96)  # less than q ‖ k ‖ v; a row is too little work for a second thread
WIDE = Size(256, 512)  # a row of each linear is enough for two


@cache
def weights(kind: str, slices: tuple[int, ...], columns: int) -> Packed:
    packed = nf4(list(slices), columns) if kind == "nf4" else packed_of(kind, sum(slices), columns)
    packed.slices = list(slices)
    return packed


def part_models(spec: Spec, size: Size, formats: tuple[str, ...] = FORMATS[0]) -> dict[str, bytes]:
    """A model for each node that the Layer is made of, by prefix."""
    shapes = {  # slices, in_features
        "qkv_": (spec.widths, size.hidden),
        "o_": ((size.hidden,), spec.widths[0]),
        "gate_up_": ((size.intermediate,) * 2, size.hidden),
        "down_": ((size.hidden,), size.intermediate),
    }
    rng = np.random.default_rng(0)
    models = {"": attention_model(spec)}
    for kind, (prefix, (slices, columns)) in zip(formats, shapes.items(), strict=True):
        norm = rng.uniform(0.01, 0.1, columns).astype(np.float32)
        models[prefix] = linear_model(
            weights(kind, slices, columns),
            bias=rng.standard_normal(sum(slices), np.float32),
            residual=prefix in ("o_", "down_"),
            norm=norm if prefix in ("qkv_", "gate_up_") else None,
            activation="swiglu" if prefix == "gate_up_" else "none",
        )
    return models


def layer_model(parts: dict[str, bytes], **changes: Any) -> bytes:
    """A model of one Layer that has all inputs and attributes of its parts.

    `changes` replace attributes or constants (None: left out); they begin with the prefix.
    """
    graphs = {prefix: onnx.load_from_string(model).graph for prefix, model in parts.items()}
    names = ["x", "adapter_ids"]
    attributes: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for prefix, graph in graphs.items():
        (node,) = graph.node
        first = 2 if prefix else 3  # behind x and adapter_ids, or q, k and v
        own = [*node.input[first:], *[""] * 7][:7]
        names += [prefix + name if name else "" for name in own]
        attributes |= {prefix + a.name: helper.get_attribute_value(a) for a in node.attribute}
        constants |= {prefix + t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for name, change in changes.items():
        (attributes if name in attributes else constants)[name] = change
    names = ["" if constants.get(name, name) is None else name for name in names]
    attributes = {name: value for name, value in attributes.items() if value is not None}
    outputs = list(graphs[""].output)
    node = helper.make_node(
        "Layer", names, [each.name for each in outputs], "the_node", domain="edgelora", **attributes
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [*graphs["qkv_"].input[:2], *graphs[""].input[1:]],
        outputs,
        [numpy_helper.from_array(array, name) for name, array in constants.items()
         if array is not None],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgelora", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


class Parts:
    """The separate nodes, run one after the other."""

    def __init__(self, library: str, models: dict[str, bytes]) -> None:
        self.sessions = {prefix: open_session(library, model) for prefix, model in models.items()}

    def run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """y, present_key and present_value."""
        x, ids, *_ = feeds.values()
        cached = {name: feeds[name] for name in ("past_key", "past_value", "last")}

        def linear(prefix: str, x: NDArray[Any], **residual: NDArray[Any]) -> NDArray[Any]:
            return self.sessions[prefix].run(None, {"x": x, "adapter_ids": ids, **residual})[0]

        attended, *present = self.sessions[""].run(None, {"q": linear("qkv_", x), **cached})
        middle = linear("o_", attended, residual=x)
        return [linear("down_", linear("gate_up_", middle), residual=middle), *present]


def random_feeds(
    size: Size, cache: list[NDArray[np.uint8]], sequence: int, last: list[int]
) -> dict[str, Any]:
    rng = np.random.default_rng([sequence, *last])
    return {
        "x": 4 * rng.standard_normal((len(last), sequence, size.hidden), np.float32),
        "adapter_ids": np.zeros(len(last), np.int64),
        "past_key": cache[0],
        "past_value": cache[1],
        "last": np.array(last, np.int32),
    }


def check_layer(
    library: str, spec: Spec, size: Size, formats: tuple[str, ...], calls: list[list[int]]
) -> None:
    """Each call: the rows of a sequence, then the last position of each sequence."""
    models = part_models(spec, size, formats)
    layer, parts = open_session(library, layer_model(models)), Parts(library, models)
    ours = theirs = spec.empty_cache(len(calls[0]) - 1)
    for sequence, *last in calls:
        y, *ours = layer.run(None, random_feeds(size, ours, sequence, last))
        expected, *theirs = parts.run(random_feeds(size, theirs, sequence, last))
        assert np.isfinite(y).all()
        np.testing.assert_array_equal(y, expected)
        for b, h in np.ndindex(len(last), spec.kv_heads):
            made, kept = (read_head(spec, k[b, h], v[b, h]) for k, v in (ours, theirs))
            for array, wanted in zip(
                made.part(0, last[b] + 1), kept.part(0, last[b] + 1), strict=True
            ):
                np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("formats", FORMATS, ids=",".join)
@pytest.mark.parametrize("kv_format", ["float", "int8"])
@pytest.mark.parametrize("sequence", [1, 33, 70])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
def test_layer_equals_its_parts(
    library: str,
    formats: tuple[str, ...],
    kv_format: str,
    sequence: int,
    batch: int,
    *,
    norms: bool,
) -> None:
    """A prefill, of which the second sequence is shorter and padded, and three decode steps."""
    spec = Spec(4, 2, 32, kv_format=kv_format, norms=norms)
    held = [sequence - 1, sequence // 2][:batch]
    calls = [[sequence, *held], *([1, *(last + i for last in held)] for i in (1, 2, 3))]
    check_layer(library, spec, SMALL, formats, calls)


@pytest.mark.parametrize("kv_format", ["float", "int8"])
def test_layer_equals_its_parts_when_threads_share_a_row(library: str, kv_format: str) -> None:
    """As many threads as the machine has; the long context is attended to in parts."""
    spec = Spec(4, 2, 32, kv_format=kv_format, norms=True)
    check_layer(library, spec, WIDE, FORMATS[0], [[1, 0], [40, 40], [1, 41], [300, 341], [1, 342]])


@pytest.mark.parametrize("kv_format", ["float", "int8"])
def test_layer_keeps_the_cache_of_an_empty_sequence(library: str, kv_format: str) -> None:
    spec = Spec(4, 2, 32, kv_format=kv_format)
    check_layer(library, spec, SMALL, FORMATS[0], [[5, 4, 2], [0, 4, 2], [1, 5, 3]])
