"""The operator Layer in a plain onnxruntime session: bit for bit the nodes that it is made of.

What those nodes compute, test_operators and test_attention hold against numpy.
"""

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from attention_reference import Spec, attention_model, read_head
from operator_models import Packed, layer_model, linear_model, nf4, open_session, packed_of

FORMATS = [
    ("int4",) * 4,
    ("nf4",) * 4,
    ("int8",) * 4,
    ("int4+zero_points", "int8", "nf4", "float"),
    ("float", "nf4", "int4+offsets", "int4"),
]
Size = tuple[int, int]  # of the hidden state and of SwiGLU
SMALL: Size = (64, 96)  # less than q ‖ k ‖ v; a row is too little work for a second thread
WIDE: Size = (256, 512)  # a row of each linear is enough for two
REFUSED = Spec(4, 2, 32, kv_format="int8", positions=64)  # but for a change, by the tests of errors


@cache
def weights(kind: str, slices: tuple[int, ...], columns: int) -> Packed:
    packed = nf4(list(slices), columns) if kind == "nf4" else packed_of(kind, sum(slices), columns)
    packed.slices = list(slices)
    return packed


def part_models(spec: Spec, size: Size, formats: tuple[str, ...] = FORMATS[0]) -> dict[str, bytes]:
    """A model for each node that the Layer is made of, by prefix."""
    hidden, intermediate = size
    shapes = {  # slices, in_features
        "qkv_": (spec.widths, hidden),
        "o_": ((hidden,), spec.widths[0]),
        "gate_up_": ((intermediate, intermediate), hidden),
        "down_": ((hidden,), intermediate),
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
            epsilon=rng.uniform(0.1, 1),
        )
    return models


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
        "x": 4 * rng.standard_normal((len(last), sequence, size[0]), np.float32),
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
            heads = (read_head(spec, k[b, h], v[b, h]) for k, v in (ours, theirs))
            for array, wanted in zip(*(head.part(0, last[b] + 1) for head in heads), strict=True):
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


KEPT = [[32], [0], [5, 32], [32, 4, 4], list(range(33)), list(range(32, -1, -1)), [7] * 40, []]


@pytest.mark.parametrize("kv_format", ["float", "int8"])
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_layer_keeps_the_rows_asked_for(library: str, kv_format: str, kept: list[int]) -> None:
    """What is left of its output; the kv_cache is that of all rows, also behind others."""
    spec = Spec(4, 2, 32, kv_format=kv_format, norms=True)
    models = part_models(spec, WIDE)
    whole = open_session(library, layer_model(models))
    keeping = open_session(library, layer_model(models, keeps=True))
    cache = spec.empty_cache(2, 96)
    for last in ([32, 32], [65, 53]):
        feeds = random_feeds(WIDE, cache, 33, last)
        y, *wanted = whole.run(None, feeds)
        ours, *cache = keeping.run(None, feeds | {"kept": np.array(kept, np.int64)})
        assert ours.shape == (2, len(kept), WIDE[0])
        # A row may meet a kernel for few rows: its sums round otherwise, and then a code.
        np.testing.assert_allclose(ours, y[:, kept], rtol=0, atol=0.01 * np.abs(y).max())
        for b, h in np.ndindex(2, spec.kv_heads):
            heads = (read_head(spec, k[b, h], v[b, h]) for k, v in (cache, wanted))
            for array, other in zip(*(head.part(0, last[b] + 1) for head in heads), strict=True):
                np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize(
    "kept, message",
    [
        ([0, 1], "row 1 of 1 cannot be kept"),
        ([-1], "row -1 of 1 cannot be kept"),
    ],
)
def test_layer_refuses_rows_that_are_not_there(library: str, kept: list[Any], message: str) -> None:
    session = open_session(library, layer_model(part_models(REFUSED, SMALL), keeps=True))
    feeds = random_feeds(SMALL, REFUSED.empty_cache(1, 32), 1, [5])
    y, *_ = session.run(None, feeds | {"kept": np.array([], np.int64)})
    assert y.shape == (1, 0, SMALL[0])
    with pytest.raises(Exception, match=r"edgelora\.Layer the_node: ") as error:
        session.run(None, feeds | {"kept": np.array(kept, np.int64)})
    assert message in str(error.value)


def check_refusal(library: str, models: dict[str, bytes], message: str, **changes: Any) -> None:
    with pytest.raises(Exception, match=r"edgelora\.Layer the_node: ") as error:
        open_session(library, layer_model(models, **changes))
    assert str(error.value).endswith(f"{message} [EDGELORA_BAD_FILE]")
    assert str(error.value).count("the_node") == 1


def test_layer_names_a_missing_attribute_with_its_part(library: str) -> None:
    models = part_models(REFUSED, SMALL)
    (node,) = onnx.load_from_string(layer_model(models)).graph.node
    for name in [attribute.name for attribute in node.attribute]:
        message = f"attribute {name} is missing or has the wrong type"
        check_refusal(library, models, message, **{name: None})


@pytest.mark.parametrize(
    "prefix, rows, columns, message",
    [
        ("qkv_", 240, 64, "qkv has 240 features where 256 are expected"),
        ("o_", 64, 96, "o has 96 features where 128 are expected"),
        ("o_", 80, 128, "o has 80 features where 64 are expected"),
        ("gate_up_", 192, 80, "gate_up has 80 features where 64 are expected"),
        ("gate_up_", 160, 64, "down has 96 features where 80 are expected"),
        ("down_", 64, 128, "down has 128 features where 96 are expected"),
        ("down_", 80, 96, "down has 80 features where 64 are expected"),
    ],
)
def test_layer_refuses_widths_that_do_not_fit(
    library: str, prefix: str, rows: int, columns: int, message: str
) -> None:
    gated = prefix == "gate_up_"
    slices, activation = ((rows // 2,) * 2, "swiglu") if gated else ((rows,), "none")
    changed = {prefix: linear_model(weights("int4", slices, columns), activation=activation)}
    check_refusal(library, part_models(REFUSED, SMALL) | changed, message)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 2}, "qkv has 256 features where 192 are expected"),
        ({"kv_num_heads": 4}, "qkv has 256 features where 384 are expected"),
        ({"gate_up_activation": "none"}, 'gate_up: activation is "none", expected swiglu'),
        ({"down_activation": "swiglu"}, 'down: activation is "swiglu", expected none'),
        ({"qkv_activation": "swiglu"}, 'qkv: activation is "swiglu", expected none'),
        ({"o_activation": "swiglu"}, 'o: activation is "swiglu", expected none'),
        ({"down_targets": "a,b"}, "down: targets has 2 names, slices has 1"),
        ({"qkv_format": 4}, "qkv: attribute qkv_format is missing or has the wrong type"),
        ({"gate_up_epsilon": 1},
         "gate_up: attribute gate_up_epsilon is missing or has the wrong type"),
        ({"qkv_slices": "64"}, "qkv: attribute qkv_slices has no integers"),
        ({"o_block_size": 48}, "o: block_size is 48, expected 32, 64 or 128"),
        ({"qkv_codes": np.zeros((16, 8, 64), np.int8)},
         "qkv: codes is int8 [16, 8, 64], expected uint8 [16, 8, 64]"),
        ({"o_scales": np.zeros((4, 4, 16), np.float32)},
         "o: scales is float32 [4, 4, 16], expected float16 [4, 4, 16]"),
        ({"gate_up_scales": None}, "gate_up: scales is missing"),
        ({"gate_up_norm": np.zeros(96, np.float32)}, "gate_up: norm must be float32 [64]"),
        ({"down_bias": np.zeros(96, np.float32)}, "down: bias must be float32 [64]"),
        ({"sin": np.zeros((64, 32), np.float32)}, "sin must be float32 [positions, 16]"),
    ],
)  # fmt: skip
def test_layer_refuses_a_wrong_model(library: str, change: dict[str, Any], message: str) -> None:
    check_refusal(library, part_models(REFUSED, SMALL), message, **change)


@pytest.mark.parametrize("name", ["sin", "o_bias", "gate_up_norm"])
def test_layer_takes_float32_where_a_type_is_fixed(library: str, name: str) -> None:
    """ONNX Runtime says it, before the node is made."""
    model = layer_model(part_models(REFUSED, SMALL), **{name: np.zeros(64, np.float16)})
    with pytest.raises(Exception, match=rf"tensor\(float16\).*\({name}\).*\(the_node\)"):
        open_session(library, model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.zeros((1, 1, 96), np.float32)}, "x is [1, 1, 96]"),
        ({"adapter_ids": np.zeros(2, np.int64)}, "adapter_ids is [2], expected [1]"),
        ({"adapter_ids": np.array([7_000_000])}, "adapter handle 7000000 is not loaded"),
        ({"past_key": np.zeros((1, 4, 32, 34), np.uint8)}, "the kv_cache is [1, 4, 32, 34]"),
        ({"last": np.array([64], np.int32)}, "position 65 is beyond the context of 64"),
    ],
)  # fmt: skip
def test_layer_refuses_wrong_inputs(library: str, change: dict[str, Any], message: str) -> None:
    session = open_session(library, layer_model(part_models(REFUSED, SMALL)))
    feeds = random_feeds(SMALL, REFUSED.empty_cache(1, 32), 1, [5])
    session.run(None, feeds)
    with pytest.raises(Exception, match=r"edgelora\.Layer the_node: ") as error:
        session.run(None, feeds | change)
    assert message in str(error.value)
