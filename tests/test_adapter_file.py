"""adapter.safetensors: the documented layout, byte for byte, and what float16 may change."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from edgelora.adapter import Adapter, Branch, valid_adapter_name, valid_adapter_names
from edgelora.adapter_file import read_adapter_file, write_adapter
from edgelora.errors import EdgeLoraError

BASE = "sha256:" + "5" * 64
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
TARGETS = {Q: (64, 64), UP: (37, 64)}  # 37: the last panel holds 5 rows


def factors(rows: int, rank: int, *, columns: int = 64, size: float = 0.1) -> tuple[Any, Any]:
    rng = np.random.default_rng(rows + rank)
    a, b = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
    return (a * size).astype(np.float32), (b * size).astype(np.float32)


def adapter_of(**branches: Branch) -> Adapter:
    names = {"q": Q, "up": UP}
    return Adapter("source", None, {names[key]: each for key, each in branches.items()}, BASE)


def good_adapter() -> Adapter:
    return adapter_of(up=Branch(*factors(37, 3), 0.75), q=Branch(*factors(64, 8), 2.0))


def write(adapter: Adapter, **changes: Any) -> bytes:
    options = {"name": "pirate", "base_fingerprint": BASE, "dtype": "float16"} | changes
    return write_adapter(adapter, **options)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(("dtype", "code", "size"), [("float16", "<e", 2), ("float32", "<f", 4)])
def test_layout_equals_the_documented_formula(dtype: str, code: str, size: int) -> None:
    adapter = good_adapter()
    header, values = split(write(adapter, dtype=dtype))
    del header["__metadata__"]
    assert list(header) == [f"{UP}.lora_a", f"{UP}.lora_b", f"{Q}.lora_a", f"{Q}.lora_b"]
    for target, branch in adapter.branches.items():
        rows, rank = branch.lora_b.shape
        panels = header[f"{target}.lora_b"]
        assert header[f"{target}.lora_a"]["shape"] == [rank, 64]
        assert panels["shape"] == [-(-rows // 16), rank, 16]
        for row in range(panels["shape"][0] * 16):
            for column in range(rank):
                index = (row // 16 * rank + column) * 16 + row % 16
                (found,) = struct.unpack_from(
                    code, values, panels["data_offsets"][0] + index * size
                )
                exact = branch.lora_b[row, column] if row < rows else 0.0
                assert found == np.dtype(dtype).type(exact)


def test_file_is_valid_safetensors_with_the_documented_metadata() -> None:
    data = write(good_adapter())
    assert load(data)[f"{Q}.lora_a"].dtype == np.float16
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    metadata = split(data)[0]["__metadata__"]
    assert json.loads(metadata.pop("scaling")) == {Q: 2.0, UP: 0.75}
    assert metadata == {
        "base_fingerprint": BASE,
        "format": "edgelora-adapter",
        "format_version": "1",
        "name": "pirate",
    }


def test_bytes_do_not_depend_on_order_of_branches() -> None:
    adapter = good_adapter()
    turned = dict(reversed(adapter.branches.items()))
    assert write(adapter) == write(good_adapter())
    assert write(adapter) == write(Adapter("other", "x", turned, "y"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_round_trip_keeps_factors_and_scaling(tmp_path: Path, dtype: str) -> None:
    adapter = good_adapter()
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(adapter, dtype=dtype))
    stored = read_adapter_file(path, TARGETS)
    assert (stored.name, stored.base_fingerprint, stored.dtype) == ("pirate", BASE, dtype)
    assert list(stored.branches) == sorted(adapter.branches)
    for target, branch in stored.branches.items():
        expected = adapter.branches[target]
        assert branch.scaling == expected.scaling
        assert np.array_equal(branch.lora_a, expected.lora_a.astype(dtype))
        assert np.array_equal(branch.lora_b, expected.lora_b.astype(dtype))
    assert read_adapter_file(path).branches[UP].lora_b.shape == (48, 3)


def test_small_factor_is_balanced_by_a_power_of_two(tmp_path: Path) -> None:
    a, b = factors(64, 4)
    small = Branch(a, b * np.float32(1e-6), 1.0)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(adapter_of(q=small)))
    stored = read_adapter_file(path, TARGETS).branches[Q]
    ratio = stored.lora_a.astype(np.float64)[0, 0] / a[0, 0]
    exponent = round(np.log2(ratio))
    assert exponent < 0
    assert np.array_equal(stored.lora_a, np.ldexp(a, exponent).astype(np.float16))
    assert np.array_equal(stored.lora_b, np.ldexp(small.lora_b, -exponent).astype(np.float16))
    delta = small.lora_b.astype(np.float64) @ small.lora_a
    error = stored.lora_b.astype(np.float64) @ stored.lora_a - delta
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(delta)


def test_large_factor_is_balanced_by_a_power_of_two(tmp_path: Path) -> None:
    a, b = factors(64, 4)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(adapter_of(q=Branch(a * np.float32(1e6), b, 1.0))))
    stored = read_adapter_file(path, TARGETS).branches[Q]
    delta = b.astype(np.float64) @ (a * np.float32(1e6))
    error = stored.lora_b.astype(np.float64) @ stored.lora_a - delta
    assert np.linalg.norm(error) < 1e-3 * np.linalg.norm(delta)


def test_zero_factor_stays_zero(tmp_path: Path) -> None:
    a, b = factors(64, 4)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(adapter_of(q=Branch(a, b * 0, 1.0))))
    assert not read_adapter_file(path, TARGETS).branches[Q].lora_b.any()


def test_overflow_names_tensor_and_value() -> None:
    a, b = factors(64, 4)
    a[1, 2] = -3e12
    with pytest.raises(EdgeLoraError, match=rf"pirate: {Q}\.lora_[ab]: .*float16") as caught:
        write(adapter_of(q=Branch(a, b * np.float32(1e6), 1.0)))
    assert "does not fit" in str(caught.value)
    assert write(adapter_of(q=Branch(a, b, 1.0)), dtype="float32")


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), 1e39, True])
def test_bad_scaling_and_values_are_not_written(scaling: float) -> None:
    a, b = factors(64, 4)
    with pytest.raises(EdgeLoraError, match="q_proj: scaling"):
        write(adapter_of(q=Branch(a, b, scaling)))
    with pytest.raises(EdgeLoraError, match=r"q_proj: .* NaN"):
        write(adapter_of(q=Branch(a * np.float32(np.nan), b, 1.0)), dtype="float32")
    with pytest.raises(EdgeLoraError, match="has no targets"):
        write(adapter_of())


def test_underflow_of_both_factors_suggests_scaling() -> None:
    a, b = factors(64, 4, size=1e-7)
    with pytest.raises(EdgeLoraError, match=r"q_proj\.lora_a: values are too small .*alpha down"):
        write(adapter_of(q=Branch(a, b, 1.0)))


@pytest.mark.parametrize("name", ["a", "0", "_x", "pirate-v1.2", "A" * 64, "console", "com10"])
def test_good_name_is_valid(name: str) -> None:
    assert valid_adapter_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "dot.",
        "a/b",
        "a\\b",
        "a b",
        "ä",
        "a\n",
        "A" * 65,
        "base",
        "BASE",
        "CON",
        "nul",
        "Aux.v1",
        "com1",
        "LPT9",
    ],
)
def test_bad_name_is_refused(name: str) -> None:
    with pytest.raises(EdgeLoraError, match="adapter name"):
        valid_adapter_name(name)
    with pytest.raises(EdgeLoraError, match="adapter name"):
        write(good_adapter(), name=name)


def test_names_that_differ_in_case_only_are_refused_together() -> None:
    valid_adapter_names(["pirate", "Sonnet", "pirates"])
    with pytest.raises(EdgeLoraError, match=r"'Pirate' and 'pirate': one folder"):
        valid_adapter_names(["Pirate", "sonnet", "pirate"])


@pytest.mark.parametrize("fingerprint", ["", "5" * 64, "sha256:" + "G" * 64, BASE + "0"])
def test_bad_base_fingerprint_is_refused(fingerprint: str) -> None:
    with pytest.raises(EdgeLoraError, match="fingerprint"):
        write(good_adapter(), base_fingerprint=fingerprint)


def damaged(path: Path, **changes: Any) -> Path:
    """The good file with changed metadata."""
    header, values = split(write(good_adapter()))
    header["__metadata__"] |= changes
    return with_header(path, header, values)


def with_header(path: Path, header: object, values: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    return path


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"format": "pt"}, "not an EdgeLoRA adapter"),
        ({"format_version": "2"}, "update edgelora"),
        ({"name": "../x"}, "adapter name"),
        ({"base_fingerprint": "sha256:"}, "fingerprint"),
        ({"scaling": "{"}, "scaling"),
        ({"scaling": "[" * 100_000}, "scaling"),
        ({"scaling": "{}"}, "scaling"),
        ({"scaling": json.dumps({Q: 1.0})}, f"{UP}.lora_a"),
        ({"scaling": json.dumps({Q: 1.0, UP: 1.0, "x": 1.0})}, "x.lora_a"),
        ({"scaling": json.dumps({Q: float("nan"), UP: 1.0})}, Q),
        ({"scaling": json.dumps({Q: True, UP: 1.0})}, Q),
        ({"scaling": f'{{"{Q}": 1, "{Q}": 2, "{UP}": 1}}'}, "occurs twice"),
        ({"scaling": f'{{"{Q}": {10**400}, "{UP}": 1}}'}, Q),
    ],
    ids=lambda each: str(each)[:40],
)
def test_bad_metadata_is_refused(tmp_path: Path, changes: dict[str, str], culprit: str) -> None:
    path = damaged(tmp_path / "bad.safetensors", **changes)
    with pytest.raises(EdgeLoraError) as caught:
        read_adapter_file(path)
    assert culprit in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "changes"),
    [
        (f"{Q}.lora_b", {"shape": [4, 16, 8]}),
        (f"{Q}.lora_b", {"shape": [64, 8]}),
        (f"{Q}.lora_a", {"shape": [16, 32]}),
        (f"{Q}.lora_a", {"dtype": "BF16"}),
        (f"{Q}.lora_a", {"dtype": "F32", "shape": [8, 32]}),
    ],
)
def test_bad_tensor_is_refused(tmp_path: Path, tensor: str, changes: dict[str, Any]) -> None:
    header, values = split(write(good_adapter()))
    header[tensor] |= changes
    with pytest.raises(EdgeLoraError, match=r"bad\.safetensors"):
        read_adapter_file(with_header(tmp_path / "bad.safetensors", header, values))


def with_row_factors() -> Adapter:
    row_factor = np.linspace(-1, 2, 37, dtype=np.float32)
    return adapter_of(
        up=Branch(*factors(37, 3), 0.75, row_factor=row_factor), q=Branch(*factors(64, 8), 2.0)
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_row_factors_are_float32_in_either_file(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(with_row_factors(), dtype=dtype))
    stored = read_adapter_file(path, TARGETS)
    assert stored.dtype == dtype
    assert stored.branches[Q].row_factor is None
    expected = with_row_factors().branches[UP].row_factor
    assert np.array_equal(load(path.read_bytes())[f"{UP}.row_factor"], expected)
    assert np.array_equal(stored.branches[UP].row_factor, expected)


@pytest.mark.parametrize(
    ("row_factor", "culprit"),
    [
        (np.ones(36, np.float32), "36 values, the base 37"),
        (np.ones((37, 1), np.float32), r"\[37, 1\]"),
        (np.ones(37, np.float16), "F16"),
        (np.full(37, np.nan, np.float32), "NaN"),
    ],
)
def test_bad_row_factors_are_refused(tmp_path: Path, row_factor: Any, culprit: str) -> None:
    branch = Branch(*factors(37, 3), 0.75, row_factor=row_factor)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(write(adapter_of(up=branch)))
    with pytest.raises(EdgeLoraError, match=culprit) as caught:
        read_adapter_file(path, TARGETS)
    assert f"{path}: {UP}" in str(caught.value)


def with_biases() -> Adapter:
    bias = np.linspace(-1, 2, 37, dtype=np.float32)
    alone = Branch(np.zeros((0, 64), np.float32), np.zeros((64, 0), np.float32), 1.0)
    return adapter_of(
        up=Branch(*factors(37, 3), 0.75, bias=bias),
        q=replace(alone, bias=np.arange(64, dtype=np.float32)),
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_biases_are_float32_with_or_without_factors(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(with_biases(), dtype=dtype))
    tensors = load(path.read_bytes())
    assert sorted(tensors) == [f"{UP}.bias", f"{UP}.lora_a", f"{UP}.lora_b", f"{Q}.bias"]
    for stored in (read_adapter_file(path, TARGETS), read_adapter_file(path)):
        assert stored.dtype == dtype
        for target, branch in with_biases().branches.items():
            assert np.array_equal(tensors[f"{target}.bias"], branch.bias)
            assert np.array_equal(stored.branches[target].bias, branch.bias)
    q = read_adapter_file(path, TARGETS).branches[Q]
    assert (q.rank, q.lora_a.shape, q.lora_b.shape) == (0, (0, 64), (64, 0))


@pytest.mark.parametrize(
    ("target", "bias", "culprit"),
    [
        (UP, np.ones(36, np.float32), "36 values, the base 37"),
        (UP, np.ones((37, 1), np.float32), r"\[37, 1\]"),
        (UP, np.ones(37, np.float16), "F16"),
        (Q, np.full(64, np.inf, np.float32), "infinity"),
        (Q, np.ones(16, np.float32), "16 values, the base 64"),
    ],
)
def test_bad_biases_are_refused(tmp_path: Path, target: str, bias: Any, culprit: str) -> None:
    branches = dict(with_biases().branches)
    branches[target] = replace(branches[target], bias=bias)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(write(replace(with_biases(), branches=branches)))
    with pytest.raises(EdgeLoraError, match=culprit) as caught:
        read_adapter_file(path, TARGETS)
    assert f"{path}: {target}.bias" in str(caught.value)


def test_nan_and_values_in_padding_are_refused(tmp_path: Path) -> None:
    header, values = split(write(good_adapter()))
    begin, end = header[f"{UP}.lora_b"]["data_offsets"]
    for position, value, culprit in [(begin, np.nan, "NaN"), (end - 2, 1.0, "padding")]:
        changed = bytearray(values)
        changed[position : position + 2] = struct.pack("<e", value)
        path = with_header(tmp_path / "bad.safetensors", header, bytes(changed))
        with pytest.raises(EdgeLoraError, match=culprit):
            read_adapter_file(path, TARGETS)


@pytest.mark.parametrize(
    "targets", [{Q: (64, 64)}, TARGETS | {Q: (80, 64)}, TARGETS | {Q: (64, 32)}]
)
def test_file_for_another_base_is_refused(
    tmp_path: Path, targets: dict[str, tuple[int, int]]
) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(write(good_adapter()))
    with pytest.raises(EdgeLoraError, match=r"adapter\.safetensors"):
        read_adapter_file(path, targets)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeLoraError, match="gone"):
        read_adapter_file(tmp_path / "gone")
