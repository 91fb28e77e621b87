"""The operator Attention in a plain onnxruntime session, against numpy in float64."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attention_reference import (
    EPSILON,
    Head,
    Rows,
    Spec,
    attend,
    attention_model,
    prepare,
    quantize,
    read_head,
    up,
)
from int8_attention import attention as torch_attention
from operator_models import open_session

pytestmark = pytest.mark.usefixtures("integer_kernels")

Cache = list[NDArray[np.uint8]]
FORMATS = ["float", "int8"]
SHAPES = [(4, 4, 16), (6, 2, 64), (8, 2, 80), (4, 1, 128), (2, 2, 6)]


def random_rows(spec: Spec, batch: int, sequence: int, seed: int) -> list[NDArray[np.float32]]:
    """q, k and v, each [batch, sequence, width]."""
    rng = np.random.default_rng([seed, batch, sequence])
    return [
        rng.standard_normal((batch, sequence, width), np.float32) * scale
        for width, scale in zip(spec.widths, (2.0, 1.0, 1.0), strict=True)
    ]


def feeds(spec: Spec, rows: list[NDArray[Any]], cache: Cache, last: list[int]) -> dict[str, Any]:
    given = {"q": np.concatenate(rows, -1)} if spec.packed else dict(zip("qkv", rows, strict=True))
    return {
        **given,
        "past_key": cache[0],
        "past_value": cache[1],
        "last": np.array(last, np.int32),
    }


def read_heads(spec: Spec, cache: Cache, sequence: int) -> list[Head]:
    keys, values = (tensor[sequence] for tensor in cache)
    return [read_head(spec, k, v) for k, v in zip(keys, values, strict=True)]


class Decoding:
    """A kv_cache that grows call by call; each call is checked to the last element."""

    def __init__(self, library: str, spec: Spec, batch: int = 1, capacity: int = 0) -> None:
        self.spec = spec
        self.batch = batch
        self.session = open_session(library, attention_model(spec))
        self.cache = spec.empty_cache(batch, capacity)
        self.calls = 0

    def step(self, sequence: int, last: list[int]) -> None:
        """`sequence` rows for each of the batch, after which it holds last + 1 positions."""
        self.calls += 1
        rows = random_rows(self.spec, self.batch, sequence, self.calls)
        before = self.cache
        y, *self.cache = self.session.run(None, feeds(self.spec, rows, before, last))
        past = [max(0, each + 1 - sequence) for each in last]
        self.check_shapes(sequence, max(past), before)
        for b in range(self.batch):
            heads, olds = read_heads(self.spec, self.cache, b), read_heads(self.spec, before, b)
            for head, old in zip(heads, olds, strict=True):
                for kept, was in zip(head.part(0, past[b]), old.part(0, past[b]), strict=True):
                    np.testing.assert_array_equal(kept, was)
            count = last[b] + 1 - past[b]  # rows that are no padding
            mine = [part[b, :count].reshape(count, -1, self.spec.head_dim) for part in rows]
            positions = past[b] + np.arange(count)
            check_appended(self.spec, mine[1], mine[2], positions, heads)
            check_attended(self.spec, mine[0], positions, heads, y[b, :count])

    def check_shapes(self, sequence: int, past: int, before: Cache) -> None:
        capacity = max(before[0].shape[2], up(past + sequence, 32))
        for cache, width in zip(self.cache, self.spec.row_bytes, strict=True):
            assert cache.shape == (self.batch, self.spec.kv_heads, capacity, width)


def check_appended(
    spec: Spec,
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    positions: NDArray[np.int64],
    heads: list[Head],
) -> None:
    """The new rows of the kv_cache are the keys, rotated, and the values."""
    keys = prepare(spec, k, "k", positions)
    span = slice(int(positions[0]), int(positions[-1]) + 1)
    for h, head in enumerate(heads):
        key = Rows(keys.values[:, h], keys.errors[:, h])
        value = v[:, h].astype(np.float64)
        if spec.kv_format == "float":
            assert (np.abs(head.key_codes[span] - key.values) <= key.errors).all()
            np.testing.assert_array_equal(head.value_codes[span], v[:, h])
            continue
        check_keys(key, head.key_codes[span], head.key_scales[span])
        scales = head.value_scales[span].astype(np.float64)
        np.testing.assert_allclose(scales, np.abs(value).max(-1) / 127, rtol=2 * EPSILON)
        off = np.abs(head.value_codes[span] - value / scales[:, None])
        assert (off <= 0.5 + 4 * 127 * EPSILON).all()


def check_keys(key: Rows, codes: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    """Nearest integers to key / step; the step is kept as float16."""
    made = quantize(key)
    steps = made.steps[..., 0]
    assert (np.abs(scales - steps) <= (2.0**-11 + 1e-6) * steps + 2.0**-25).all()
    width = key.values.shape[-1]
    exact = key.values / np.repeat(steps, 32, -1)[:, :width]
    hairs = made.hairs.reshape(len(exact), -1)[:, :width]
    assert (np.abs(codes - exact) <= 0.5 + hairs).all()


def check_attended(
    spec: Spec,
    q: NDArray[np.float32],
    positions: NDArray[np.int64],
    heads: list[Head],
    y: NDArray[np.float32],
) -> None:
    prepared = prepare(spec, q, "q", positions)
    for h in range(spec.heads):
        row = Rows(prepared.values[:, h], prepared.errors[:, h])
        wanted = attend(spec, row, heads[h // (spec.heads // spec.kv_heads)], positions)
        got = y[:, h * spec.head_dim : (h + 1) * spec.head_dim]
        assert (np.abs(got - wanted.values) <= wanted.errors).all(), f"head {h}"


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packed", [True, False])
def test_attention_equals_numpy(
    library: str, kv_format: str, shape: tuple[int, int, int], *, packed: bool
) -> None:
    decoding = Decoding(library, Spec(*shape, kv_format=kv_format, packed=packed))
    held = 0
    for sequence in [1, 1, 20, 1, 16, 64, 1, 1, 50, 1]:
        held += sequence
        decoding.step(sequence, [held - 1])


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("sequence", [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 96, 97, 256, 257])
def test_a_first_prefill_equals_numpy(library: str, kv_format: str, sequence: int) -> None:
    decoding = Decoding(library, Spec(3, 1, 32, kv_format=kv_format))
    decoding.step(sequence, [sequence - 1])
    decoding.step(1, [sequence])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_attention_norms_heads(library: str, kv_format: str) -> None:
    decoding = Decoding(library, Spec(4, 2, 64, kv_format=kv_format, norms=True))
    decoding.step(40, [39])
    decoding.step(1, [40])


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [1, 5, 32, 33, 100])
def test_attention_sees_a_window(library: str, kv_format: str, window: int) -> None:
    decoding = Decoding(library, Spec(4, 2, 32, kv_format=kv_format, window=window))
    for sequence, last in [(70, 69), (1, 70), (30, 100), (1, 101)]:
        decoding.step(sequence, [last])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_batch_is_padded_on_the_right_then_decodes(library: str, kv_format: str) -> None:
    decoding = Decoding(library, Spec(6, 2, 64, kv_format=kv_format), batch=3)
    last = [30, 3, 60]
    decoding.step(61, last)
    for _ in range(6):  # past 64 positions: one of the three makes room for all
        last = [each + 1 for each in last]
        decoding.step(1, last)
    last = [each + 7 for each in last]
    decoding.step(7, last)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [-1, 700])
def test_a_long_context_is_decoded_in_parts(library: str, kv_format: str, window: int) -> None:
    spec = Spec(4, 2, 64, kv_format=kv_format, window=window)
    decoding = Decoding(library, spec, batch=2)
    held = [0, 0]
    for sequence in [500, 400, 300]:
        held = [each + sequence for each in held]
        decoding.step(sequence, [each - 1 for each in held])
    decoding.step(1, [1200, 333])  # one sequence goes back: what it decides counts
    decoding.step(1, [1201, 334])
    decoding.step(3, [1204, 337])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_room_is_kept_and_old_bytes_do_no_harm(library: str, kv_format: str) -> None:
    """0xff everywhere: NaN in scales and floats that were never written."""
    decoding = Decoding(library, Spec(4, 2, 48, kv_format=kv_format), batch=2, capacity=96)
    decoding.step(5, [4, 2])
    decoding.step(1, [5, 3])
    decoding.step(91, [96, 94])  # grows


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("isa", ["scalar"])
def test_other_kernels_equal_numpy(
    library: str, kv_format: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELORA_FORCE_ISA", isa)
    decoding = Decoding(library, Spec(4, 2, 48, kv_format=kv_format, norms=True))
    decoding.step(300, [299])
    decoding.step(1, [300])


def test_int8_rounds_nothing_but_a_zero_to_zero(library: str) -> None:
    """Keys and values of a single magnitude are exact; an all-zero row stays zero."""
    spec = Spec(2, 1, 32, kv_format="int8")
    session = open_session(library, attention_model(spec))
    rows = [np.zeros((1, 3, width), np.float32) for width in spec.widths]
    rows[2][0, 1] = 127 * np.sign(np.arange(32) - 15.5)
    y, *cache = session.run(None, feeds(spec, rows, spec.empty_cache(1), [2]))
    head = read_head(spec, cache[0][0, 0], cache[1][0, 0])
    assert (head.key_codes[:3] == 0).all() and (head.key_scales[:3] == 0).all()
    np.testing.assert_array_equal(head.value_scales[:3], [0, 1, 0])
    np.testing.assert_array_equal(head.value_codes[:3], rows[2][0])
    thirds = rows[2][0, 1] / np.array([[np.inf], [2], [3]])  # all keys alike: the mean
    np.testing.assert_allclose(y[0, :, :32], thirds, rtol=8 * EPSILON)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_nan_reaches_who_sees_it_and_nobody_else(library: str, kv_format: str) -> None:
    spec = Spec(2, 2, 32, kv_format=kv_format)
    session = open_session(library, attention_model(spec))
    for part, bad in [(0, np.nan), (1, np.nan), (2, np.nan)]:
        rows = random_rows(spec, 1, 40, 1)
        rows[part][0, 20, 3] = bad  # of head 0
        y, *_ = session.run(None, feeds(spec, rows, spec.empty_cache(1), [39]))
        wrong = np.isnan(y[0].reshape(40, 2, 32)).any(-1)
        assert not wrong[:, 1].any()
        assert not wrong[:20, 0].any()
        assert wrong[20, 0]
        assert wrong[21:, 0].all() == (part > 0)
        assert wrong[21:, 0].any() == (part > 0)


def test_the_reference_equals_torch() -> None:
    """Of tests/int8_attention.py, which judges whole models."""
    spec = Spec(6, 2, 80, kv_format="int8")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 50, 80)) for heads in (6, 2, 2))
    heads = []
    for key, value in zip(k, v, strict=True):
        made = quantize(Rows(key))
        steps = np.abs(value).max(-1) / 127
        codes = made.codes.reshape(50, -1)[:, :80]
        heads.append(
            Head(
                codes, made.steps[..., 0].astype(np.float16), np.rint(value / steps[:, None]), steps
            )
        )
    ours = [attend(spec, Rows(q[h]), heads[h // 3], np.arange(50)).values for h in range(6)]
    mask = torch.full((1, 1, 50, 50), -torch.inf, dtype=torch.float64).triu(1)
    theirs, _ = torch_attention(
        SimpleNamespace(num_key_value_groups=3),
        *(torch.from_numpy(x)[None] for x in (q, k, v)),
        mask,
        scaling=80**-0.5,
    )
    np.testing.assert_allclose(np.stack(ours, 1), theirs[0].numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_an_empty_sequence_keeps_the_cache(library: str, kv_format: str) -> None:
    spec = Spec(2, 1, 32, kv_format=kv_format)
    decoding = Decoding(library, spec)
    decoding.step(5, [4])
    rows = random_rows(spec, 1, 0, 1)
    y, *cache = decoding.session.run(None, feeds(spec, rows, decoding.cache, [4]))
    assert y.shape == (1, 0, 64)
    (kept,), (was,) = read_heads(spec, cache, 0), read_heads(spec, decoding.cache, 0)
    for ours, theirs in zip(kept.part(0, 5), was.part(0, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, "num_heads is no multiple of kv_num_heads"),
        ({"num_heads": 0}, "num_heads is 0, expected 1 to 65536"),
        ({"kv_num_heads": 8}, "kv_num_heads is 8, expected 1 to 4"),
        ({"head_dim": 31}, "head_dim is odd: rotary embedding needs two halves"),
        ({"head_dim": 514}, "head_dim is 514, expected 1 to 512"),
        ({"head_dim": 64}, "cos must be float32 [positions, 32]"),
        ({"local_window_size": 0}, "local_window_size is neither"),
        ({"kv_format": "int4"}, 'kv_format is "int4", expected int8 or float'),
        ({"kv_format": 8}, "attribute kv_format is missing or has the wrong type"),
        ({"sin": np.zeros((8, 15), np.float32)}, "sin must be float32 [positions, 16]"),
        ({"cos": np.zeros(16, np.float32)}, "cos must be float32 [positions, 16]"),
        ({"q_norm": np.ones(31, np.float32)}, "q_norm must be float32 [32]"),
        ({"k_norm": np.ones((1, 32), np.float32)}, "k_norm must be float32 [32]"),
        ({"inputs": ["q", "k"]}, "k and v come together or packed with q"),
        ({"inputs": ["q", "v"]}, "k and v come together or packed with q"),
    ],
)
def test_attention_refuses_a_wrong_model(
    library: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=r"edgelora\.Attention the_node: ") as error:
        open_session(library, attention_model(Spec(4, 2, 32, positions=64), **change))
    assert message in str(error.value)


SMALL = Spec(4, 2, 32, kv_format="int8", positions=64, packed=False)


def wrong_feeds(change: dict[str, Any]) -> dict[str, Any]:
    """One row behind 5 positions, but for the change."""
    rows = random_rows(SMALL, 1, 1, 1)
    return {**feeds(SMALL, rows, SMALL.empty_cache(1, 32), [5]), **change}


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def cache_of(*shape: int) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": zeros(1, 1, 127)}, "q is [1, 1, 127], expected [batch, sequence, 128]"),
        ({"v": zeros(1, 1, 32)}, "v is [1, 1, 32], expected [batch, sequence, 64]"),
        ({"k": zeros(1, 2, 64)}, "k is [1, 2, 64], q is [1, 1, 128]"),
        ({"past_key": cache_of(1, 2, 32, 128)},
         "the kv_cache is [1, 2, 32, 128], expected [1, 2, a multiple of 32 ≥ 5, 34]"),
        ({"past_value": cache_of(1, 2, 32, 128)}, "expected [1, 2, a multiple of 32 ≥ 5, 36]"),
        ({"past_key": cache_of(1, 2, 33, 34)}, "the kv_cache is [1, 2, 33, 34]"),
        ({"past_key": cache_of(1, 2, 0, 34)}, "the kv_cache is [1, 2, 0, 34]"),
        ({"past_key": cache_of(1, 1, 32, 34)}, "the kv_cache is [1, 1, 32, 34]"),
        ({"past_key": cache_of(2, 2, 32, 34)}, "the kv_cache is [2, 2, 32, 34]"),
        ({"past_key": cache_of(1, 2, 64, 34)}, "past_key and past_value differ in capacity"),
        ({"last": np.array([64], np.int32)}, "position 65 is beyond the context of 64"),
        ({"last": np.array([2**31 - 1], np.int32)}, "is beyond the context of 64"),
        ({"last": np.array([-2], np.int32)}, "last position is -2, expected −1 or more"),
        ({"last": np.array([5, 5], np.int32)}, "last position is [2], expected [1]"),
    ],
)  # fmt: skip
def test_attention_refuses_wrong_inputs(library: str, change: dict[str, Any], message: str) -> None:
    session = open_session(library, attention_model(SMALL))
    session.run(None, wrong_feeds({}))
    with pytest.raises(Exception, match=r"edgelora\.Attention the_node: ") as error:
        session.run(None, wrong_feeds(change))
    assert message in str(error.value)


def test_a_float_cache_is_no_int8_cache(library: str) -> None:
    """A bundle's cache of one accuracy is refused by the other in words."""
    session = open_session(library, attention_model(SMALL))
    other = replace(SMALL, kv_format="float").empty_cache(1, 32)
    with pytest.raises(Exception, match=r"the kv_cache is \[1, 2, 32, 128\].*34\]"):
        session.run(None, wrong_feeds({"past_key": other[0], "past_value": other[1]}))
