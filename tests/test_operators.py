"""Our operators in a plain onnxruntime session, against numpy in float64 on the same codes."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from activation_groups import tops
from conftest import has_amx
from operator_models import (
    Packed,
    embedding_model,
    int4,
    int8,
    linear_model,
    nf4,
    open_session,
    packed_of,
    swiglu_model,
)

EPSILON = 2.0**-24
BFLOAT16 = 1.01 * 2.0**-7  # both factors of a product, rounded


def random_x(batch: int, sequence: int, columns: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([batch, sequence, columns])
    return rng.standard_normal((batch, sequence, columns), np.float32)


def activation_steps(x: NDArray[np.float32], format: str) -> NDArray[np.float64]:
    """The step of the int8 grid of a block of 32 at each value, beside weights of a format."""
    columns = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], -(-columns // 32) * 32))
    padded[..., :columns] = np.abs(x)
    largest = padded.reshape(*x.shape[:-1], -1, 32).max(-1)
    return np.repeat(tops(largest, format) / 127, 32, axis=-1)[..., :columns]


def tolerance(packed: Packed, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Float sums over K; half a step of each activation times its weight; nf4's rounded table;
    bfloat16 where rows are many and the CPU multiplies it.
    """
    magnitude = np.abs(packed.matrix)
    products = np.abs(x) @ magnitude.T
    bound = 4 * (packed.shape[1] + 8) * EPSILON * products
    if packed.format == "float":
        return bound
    if has_amx() and x.size // x.shape[-1] > 16:
        bound += BFLOAT16 * products
    steps = activation_steps(x, packed.format)
    bound += steps @ (0.501 * magnitude.T)
    if packed.format == "int4":  # offsets in float32 are read in float16
        bound += 2.0**-11 * np.abs(x).sum(axis=-1, keepdims=True)
    if packed.format in ("nf4", "fp4"):
        bound += (np.abs(x) + steps) @ packed.rounding.T
    return bound


def check_linear(library: str, packed: Packed, batch: int, sequence: int) -> None:
    session = open_session(library, linear_model(packed))
    x = random_x(batch, sequence, packed.shape[1])
    (y,) = session.run(None, {"x": x, "adapter_ids": np.zeros(batch, np.int64)})
    assert y.shape == (batch, sequence, packed.shape[0])
    assert (np.abs(y - x @ packed.matrix.T) <= tolerance(packed, x)).all()


KINDS = [
    "int4",
    "int4+zero_points",
    "int4+offsets",
    "int4+float32 offsets",
    "int8",
    "float",
    "nf4",
    "fp4",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows, columns", [(1, 1), (16, 32), (37, 100), (48, 257), (130, 96)])
@pytest.mark.parametrize("batch, sequence", [(1, 1), (1, 7), (3, 5), (1, 40)])
def test_linear_equals_numpy(
    library: str, kind: str, rows: int, columns: int, batch: int, sequence: int
) -> None:
    check_linear(library, packed_of(kind, rows, columns), batch, sequence)


@pytest.mark.parametrize("sequence", range(1, 41))
def test_linear_equals_numpy_for_any_number_of_rows(library: str, sequence: int) -> None:
    check_linear(library, int4(48, 64, 32, "zero_points"), 1, sequence)


@pytest.mark.parametrize("kind", ["int4", "int4+zero_points", "int4+offsets", "int8"])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_linear_equals_numpy_for_each_block_size(library: str, kind: str, block_size: int) -> None:
    check_linear(library, packed_of(kind, 33, 200, block_size), 1, 3)


def test_linear_equals_numpy_when_threads_share_the_panels(library: str) -> None:
    """As many as the machine has; tests/native/linear_job_test.cc chooses their number."""
    check_linear(library, int4(1040, 320, 32), 1, 1)
    check_linear(library, int4(400, 320, 32), 2, 30)


def test_linear_counts_nf4_blocks_in_each_slice_anew(library: str) -> None:
    check_linear(library, nf4([48, 16, 560], 96), 1, 5)


def test_linear_packs_several_slices(library: str) -> None:
    packed = int4(80, 64, 32)
    packed.slices = [16, 48, 16]
    check_linear(library, packed, 1, 5)


def test_linear_adds_bias(library: str) -> None:
    packed = int4(37, 64, 32)
    bias = np.arange(37, dtype=np.float32)
    x = random_x(2, 3, 64)
    feeds = {"x": x, "adapter_ids": np.zeros(2, np.int64)}
    (plain,) = open_session(library, linear_model(packed)).run(None, feeds)
    (y,) = open_session(library, linear_model(packed, bias=bias)).run(None, feeds)
    np.testing.assert_array_equal(y, plain + bias)


def run_linear(
    library: str, packed: Packed, x: NDArray[np.float32], **extra: NDArray[np.float32]
) -> NDArray[np.float32]:
    """`norm`, `bias` and `residual` as they are given; SwiGLU for two slices."""
    residual = {name: extra.pop(name) for name in ("residual",) if name in extra}
    activation = "swiglu" if len(packed.slices) == 2 else "none"
    model = linear_model(packed, residual=bool(residual), activation=activation, **extra)
    feeds = {"x": x, "adapter_ids": np.zeros(len(x), np.int64), **residual}
    (y,) = open_session(library, model).run(None, feeds)
    return y


def normed(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = x.astype(np.float64)
    epsilon = np.float64(np.float32(1e-5))  # of linear_model
    return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + epsilon) * weight


def product_tolerance(packed: Packed, n: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `tolerance`; a normed value is off by a sum of K squares, halved by the root, and a few
    roundings more.
    """
    off = (packed.shape[1] / 2 + 8) * EPSILON
    return 1.01 * tolerance(packed, n.astype(np.float32)) + off * (
        np.abs(n) @ np.abs(packed.matrix).T
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, sequence", [(1, 1), (2, 1), (1, 67)])
def test_linear_norms_its_rows(library: str, kind: str, batch: int, sequence: int) -> None:
    packed = packed_of(kind, 37, 96)
    weight = np.random.default_rng(1).uniform(0.5, 1.5, 96).astype(np.float32)
    x = 8 * random_x(batch, sequence, 96)
    n = normed(x, weight)
    y = run_linear(library, packed, x, norm=weight)
    assert (np.abs(y - n @ packed.matrix.T) <= product_tolerance(packed, n)).all()


@pytest.mark.parametrize("sequence", [1, 64, 65])
def test_linear_adds_a_residual(library: str, sequence: int) -> None:
    packed = int4(37, 64, 32)
    x, residual = random_x(2, sequence, 64), random_x(2, sequence, 37)
    plain = run_linear(library, packed, x)
    y = run_linear(library, packed, x, residual=residual)
    np.testing.assert_array_equal(y, plain + residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence", [1, 3, 65])
def test_linear_gates_its_halves(library: str, kind: str, sequence: int) -> None:
    packed = nf4([48, 48], 96, kind) if kind in ("nf4", "fp4") else packed_of(kind, 96, 96)
    packed.slices = [48, 48]
    weight = np.random.default_rng(1).uniform(0.05, 0.2, 96).astype(np.float32)
    bias = np.linspace(-1, 1, 96, dtype=np.float32)
    x, residual = random_x(1, sequence, 96), random_x(1, sequence, 48)
    n = normed(x, weight)
    both = n @ packed.matrix.T + bias
    off = product_tolerance(packed, n) + 4 * EPSILON * np.abs(both)
    gate, up = np.split(both, 2, -1)
    off_gate, off_up = np.split(off, 2, -1)
    silu = gate / (1 + np.exp(-gate))
    bound = np.abs(silu) * off_up + 1.1 * off_gate * (np.abs(up) + off_up)  # |silu'| <= 1.1
    bound += 16 * EPSILON * (np.abs(silu * up) + np.abs(residual))
    y = run_linear(library, packed, x, norm=weight, bias=bias, residual=residual)
    assert y.shape == (1, sequence, 48)
    assert (np.abs(y - (silu * up + residual)) <= bound).all()


def test_linear_equals_its_parts(library: str) -> None:
    """Bit for bit what SwiGlu makes of the products: fusing changes nothing."""
    packed = int4(96, 64, 32)
    x, residual = random_x(1, 5, 64), random_x(1, 5, 48)
    products = run_linear(library, packed, x)
    (activated,) = open_session(library, swiglu_model()).run(None, {"x": products})
    packed.slices = [48, 48]
    fused = run_linear(library, packed, x, residual=residual)
    np.testing.assert_array_equal(fused, activated + residual)


@pytest.mark.parametrize("shape", [(1, 2, 47), (1, 3, 48), (2, 2, 48), (1, 2, 1)])
def test_linear_refuses_a_residual_of_another_shape(
    library: str, shape: tuple[int, int, int]
) -> None:
    session = open_session(library, linear_model(int4(48, 64, 32), residual=True))
    feeds = {"x": random_x(1, 2, 64), "adapter_ids": np.zeros(1, np.int64)}
    expected = f"residual is {list(shape)}, expected [1, 2, 48]"
    with pytest.raises(Exception, match=r"edgelora\.Linear the_node: ") as error:
        session.run(None, {**feeds, "residual": np.zeros(shape, np.float32)})
    assert expected in str(error.value)


def test_linear_gives_an_empty_output_for_an_empty_sequence(library: str) -> None:
    session = open_session(library, linear_model(int4(16, 32, 32)))
    feeds = {"x": np.zeros((2, 0, 32), np.float32), "adapter_ids": np.zeros(2, np.int64)}
    assert session.run(None, feeds)[0].shape == (2, 0, 16)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "int3"}, 'format is "int3", expected one of int4, int8, nf4, nf4_bf'),
        ({"block_size": 16}, "block_size is 16, expected 32, 64 or 128"),
        ({"in_features": 65}, "codes is uint8 [3, 8, 64], expected uint8 [3, 12, 64]"),
        ({"in_features": 0}, "in_features is 0"),
        ({"in_features": 2**62}, "in_features is"),
        ({"out_features": 49}, "slices do not add up to out_features"),
        ({"out_features": -48}, "out_features is -48"),
        ({"slices": [24, 24], "targets": "a,b"}, "a slice has 24 rows, not a multiple of 16"),
        ({"slices": [48, -16, 16], "targets": "a,b,c"}, "slices do not add up"),
        ({"slices": [2**62, 2**62], "targets": "a,b"}, "slices do not add up"),
        ({"targets": "a,b"}, "targets has 2 names, slices has 1"),
        ({"targets": ""}, "targets has an empty name"),
        ({"targets": ["a"]}, "attribute targets is missing or has the wrong type"),
        ({"scales": None}, "scales is missing"),
        ({"scales": np.zeros((3, 2, 15), np.float16)}, "expected float16 [3, 2, 16]"),
        ({"scales": np.zeros((3, 2, 16), np.float32)}, "scales is float32 [3, 2, 16]"),
        ({"codes": np.zeros((3, 8, 64), np.int8)}, "codes is int8 [3, 8, 64]"),
        ({"codes": np.zeros((2, 8, 64), np.uint8)}, "codes is uint8 [2, 8, 64]"),
        ({"zero_points": np.zeros((3, 2, 16), np.uint8)}, "expected uint8 [3, 2, 8]"),
        ({"zero_points": np.zeros((3, 2, 8), np.float16)}, "offsets is float16 [3, 2, 8]"),
        ({"bias": np.zeros(47, np.float32)}, "bias must be float32 [48]"),
        ({"norm": np.zeros(48, np.float32)}, "norm must be float32 [64]"),
        ({"activation": "gelu"}, 'activation is "gelu", expected none or swiglu'),
        ({"activation": "swiglu"}, "swiglu needs two slices of one size: gate and up"),
        (
            {"activation": "swiglu", "slices": [32, 16], "targets": "a,b"},
            "swiglu needs two slices of one size: gate and up",
        ),
        (
            {"activation": "swiglu", "slices": [16, 16, 16], "targets": "a,b,c"},
            "swiglu needs two slices of one size: gate and up",
        ),
        ({"epsilon": "small"}, "attribute epsilon is missing or has the wrong type"),
    ],
)
def test_linear_refuses_a_wrong_model(
    library: str, change: dict[str, object], message: str
) -> None:
    model = linear_model(int4(48, 64, 32), **change)
    with pytest.raises(Exception, match=r"edgelora\.Linear the_node: ") as error:
        open_session(library, model)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scales": np.zeros(3, np.float32)}, "nested_absmax is float32 [3], expected float32 [2]"),
        ({"zero_points": np.zeros(600, np.uint8)}, "absmax is uint8 [600], expected uint8 [512]"),
        ({"absmax_offset": np.zeros(2, np.float32)}, "expected float32 [1]"),
        ({"absmax_table": None}, "absmax_table is missing"),
        ({"block_size": 32}, "block_size is 32, nf4 and fp4 have 64"),
    ],
)
def test_linear_refuses_wrong_nf4(library: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=r"edgelora\.Linear the_node: ") as error:
        open_session(library, linear_model(nf4([176], 96), **change))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["int4", "int8", "float"])
@pytest.mark.parametrize("name", ["absmax_offset", "absmax_table"])
def test_linear_refuses_what_only_nf4_has(library: str, kind: str, name: str) -> None:
    size = 1 if name == "absmax_offset" else 256
    model = linear_model(packed_of(kind, 48, 64), **{name: np.zeros(size, np.float32)})
    with pytest.raises(Exception, match=f"the_node: {name} is given, which {kind} does not have"):
        open_session(library, model)


def test_linear_refuses_scales_of_floats(library: str) -> None:
    model = linear_model(packed_of("float", 48, 64), scales=np.zeros(3, np.float16))
    with pytest.raises(Exception, match="the_node: scales is given, which float does not have"):
        open_session(library, model)


@pytest.mark.parametrize(
    "x, ids, message",
    [
        ((1, 2, 63), [0], "x is [1, 2, 63], expected [batch, sequence, 64]"),
        ((2, 2, 64), [0], "adapter_ids is [1], expected [2]"),
        ((2, 2, 64), [0, 7_000_000], "adapter handle 7000000 is not loaded"),
        ((1, 2, 64), [-1], "adapter handle -1 is not loaded"),
    ],
)
def test_linear_refuses_wrong_inputs(
    library: str, x: tuple[int, ...], ids: list[int], message: str
) -> None:
    session = open_session(library, linear_model(int4(48, 64, 32)))
    with pytest.raises(Exception, match=r"edgelora\.Linear the_node: ") as error:
        session.run(None, {"x": np.zeros(x, np.float32), "adapter_ids": np.array(ids, np.int64)})
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["int4", "int4+zero_points", "int4+offsets", "int8", "float"])
def test_embedding_equals_numpy(library: str, kind: str) -> None:
    packed = packed_of(kind, 37, 100)
    ids = np.random.default_rng(0).integers(0, 37, (2, 400))
    (y,) = open_session(library, embedding_model(packed)).run(None, {"input_ids": ids})
    np.testing.assert_allclose(y, packed.matrix[ids], rtol=4 * EPSILON, atol=4 * EPSILON)


@pytest.mark.parametrize("token", [-1, 37, 2**40])
def test_embedding_refuses_an_id_out_of_range(library: str, token: int) -> None:
    session = open_session(library, embedding_model(int8(37, 64, 32)))
    with pytest.raises(Exception, match=f"token id {token} is not in 0 to 36"):
        session.run(None, {"input_ids": np.array([[0, token]])})


def test_embedding_refuses_nf4(library: str) -> None:
    with pytest.raises(Exception, match="expected int4, int8 or float"):
        open_session(library, embedding_model(nf4([16], 32)))
    with pytest.raises(Exception, match=r"fp4_float16.*expected int4, int8 or float"):
        open_session(library, embedding_model(replace(nf4([16], 32), format="fp4_float16")))


@pytest.mark.parametrize("sequence, n", [(1, 1), (1, 1536), (3, 17), (40, 500), (1, 20000)])
def test_swiglu_equals_numpy(library: str, sequence: int, n: int) -> None:
    x = 4 * random_x(1, sequence, 2 * n)
    (y,) = open_session(library, swiglu_model()).run(None, {"x": x})
    gate, up = x[..., :n].astype(np.float64), x[..., n:].astype(np.float64)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=1e-7)


def test_swiglu_refuses_an_odd_width(library: str) -> None:
    with pytest.raises(Exception, match="expected an even last dimension"):
        open_session(library, swiglu_model()).run(None, {"x": np.zeros((1, 1, 3), np.float32)})


def test_registration_refuses_an_unknown_isa(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_FORCE_ISA", "abacus")
    with pytest.raises(Exception, match=r"EDGELORA_FORCE_ISA=abacus is not available.*scalar"):
        open_session(library, swiglu_model())
