"""`Adapter` ↔ the bytes of a bundle's `adapter.safetensors` (layout: ARCHITECTURE.md)."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, Branch
from edgelora.adapter.tensors import Factor, StoredTensor, parse_safetensors, unique_object
from edgelora.errors import EdgeLoraError

FORMAT = "edgelora-adapter"
FORMAT_VERSION = "1"
PANEL = 16  # rows of lora_b that lie side by side
MAX_RELATIVE_ERROR = (
    1e-3  # of a whole factor's norm; float16 rounding of normal values makes about 2e-4
)

Dtype = Literal["float16", "float32"]


def valid_adapter_name(name: str) -> str:
    """The name itself; it becomes a folder of the bundle. Raises EdgeLoraError saying which names are allowed."""
    if name.casefold() == "base":
        raise EdgeLoraError(f"adapter name {name!r}: reserved for the model without an adapter")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) or name.endswith("."):
        rule = "use 1 to 64 of A-Z a-z 0-9 . _ -, and no dot at either end"
        raise EdgeLoraError(f"adapter name {name!r}: {rule}")
    return name


def write_adapter(adapter: Adapter, *, name: str, base_fingerprint: str, dtype: Dtype) -> bytes:
    """The file's bytes; the same adapter, name and fingerprint always give the same bytes.

    Raises EdgeLoraError for a bad name or fingerprint, and for values that float16 cannot hold.
    """
    _check_fingerprint(base_fingerprint, f"adapter {name}")
    tensors: dict[str, Factor] = {}
    for target, branch in adapter.branches.items():
        lora_a, lora_b = _as_dtype(branch, dtype, f"adapter {name}: {target}")
        tensors |= {f"{target}.lora_a": lora_a, f"{target}.lora_b": pack_panels(lora_b)}
    scaling = {target: branch.scaling for target, branch in sorted(adapter.branches.items())}
    metadata = {
        "base_fingerprint": base_fingerprint,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": valid_adapter_name(name),
        "scaling": json.dumps(scaling),
    }
    return _serialize(tensors, metadata)


def _check_fingerprint(fingerprint: str, source: str) -> None:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", fingerprint):
        raise EdgeLoraError(
            f"{source}: base fingerprint {fingerprint!r} is not sha256: and 64 hex digits"
        )


def pack_panels(lora_b: Factor) -> Factor:
    """[N, rank] → [ceil(N/16), rank, 16]: panel p, factor column r, row 16p+i; rows beyond N are zero."""
    rows, rank = lora_b.shape
    padded = np.zeros((math.ceil(rows / PANEL) * PANEL, rank), lora_b.dtype)
    padded[:rows] = lora_b
    return np.ascontiguousarray(padded.reshape(-1, PANEL, rank).transpose(0, 2, 1))


def unpack_panels(panels: Factor) -> Factor:
    """[P, rank, 16] → [16·P, rank], the padding rows included."""
    return np.ascontiguousarray(panels.transpose(0, 2, 1).reshape(-1, panels.shape[1]))


def _as_dtype(branch: Branch, dtype: Dtype, target: str) -> tuple[Factor, Factor]:
    """Both factors in the file's dtype; float16 may move a power of two from one factor to the other."""
    lora_a, lora_b = branch.lora_a.astype(np.float32), branch.lora_b.astype(np.float32)
    if dtype == "float32":
        return lora_a, lora_b
    if not _fits(lora_a) or not _fits(lora_b):
        exponent = _balancing_exponent(lora_a, lora_b)
        lora_a, lora_b = np.ldexp(lora_a, exponent), np.ldexp(lora_b, -exponent)
    return _to_half(lora_a, f"{target}.lora_a"), _to_half(lora_b, f"{target}.lora_b")


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float16)


def _fits(values: NDArray[np.float32]) -> bool:
    half = _half(values)
    return bool(np.isfinite(half).all()) and _relative_error(values, half) <= MAX_RELATIVE_ERROR


def _relative_error(values: NDArray[np.float32], half: NDArray[np.float16]) -> float:
    """|half − values| / |values|, Frobenius norms in float64; 0 for all zeros."""
    exact = values.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(half.astype(np.float64) - exact)) / norm if norm else 0.0


def _balancing_exponent(lora_a: NDArray[np.float32], lora_b: NDArray[np.float32]) -> int:
    """e such that A·2ᵉ and B·2⁻ᵉ have about the same largest value; the product A·B does not change."""
    largest_a, largest_b = float(np.abs(lora_a).max()), float(np.abs(lora_b).max())
    if not largest_a or not largest_b:
        return 0
    return round((math.log2(largest_b) - math.log2(largest_a)) / 2)


def _to_half(values: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    half = _half(values)
    if not np.isfinite(half).all():
        largest = float(values.flat[int(np.abs(values).argmax())])
        raise EdgeLoraError(f"{name}: {largest:g} does not fit float16; export with --format float")
    error = _relative_error(values, half)
    if error > MAX_RELATIVE_ERROR:
        advice = "scale the factors up and alpha down, or export with --format float"
        raise EdgeLoraError(
            f"{name}: values are too small for float16 (relative error {error:.1e}); {advice}"
        )
    return half


def _serialize(tensors: Mapping[str, Factor], metadata: Mapping[str, str]) -> bytes:
    """safetensors with sorted names and metadata (the safetensors package orders metadata by chance)."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks, position = [], 0
    for name in sorted(tensors):
        values = tensors[name]
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
        offsets = [position, position + len(data)]
        header[name] = {
            "dtype": _DTYPES[values.dtype.name],
            "shape": list(values.shape),
            "data_offsets": offsets,
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


_DTYPES = {"float16": "F16", "float32": "F32"}


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """What adapter.safetensors says. Without the base's sizes, lora_b keeps its padding rows: [16·P, rank]."""

    name: str
    base_fingerprint: str
    dtype: Dtype
    branches: Mapping[str, Branch]


def read_adapter_file(
    path: Path, targets: Mapping[str, tuple[int, int]] | None = None
) -> StoredAdapter:
    """Read a bundle's adapter; with `targets` (module path → (out, in)) also check it against the base.

    Raises EdgeLoraError naming the file and the field or tensor that breaks the documented layout.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error.strerror})") from error
    tensors, metadata = parse_safetensors(data, str(path))
    scaling = _check_metadata(metadata, str(path))
    _check_names(tensors, scaling, str(path))
    branches = {
        target: _stored_branch(tensors, target, number, str(path))
        for target, number in scaling.items()
    }
    if targets is not None:
        branches = {
            target: _fit(target, branch, targets, str(path)) for target, branch in branches.items()
        }
    dtypes: dict[str, Dtype] = {"F16": "float16", "F32": "float32"}
    dtype = dtypes[next(iter(tensors.values())).dtype]
    return StoredAdapter(metadata["name"], metadata["base_fingerprint"], dtype, branches)


def _check_metadata(metadata: Mapping[str, str], source: str) -> dict[str, float]:
    """The scaling by target, sorted, after checking all other fields."""
    if metadata.get("format") != FORMAT:
        raise EdgeLoraError(
            f"{source}: not an EdgeLoRA adapter (format is {metadata.get('format')!r})"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise EdgeLoraError(
            f"{source}: format version {version!r} is not {FORMAT_VERSION}; update edgelora"
        )
    valid_adapter_name(metadata.get("name", ""))
    _check_fingerprint(metadata.get("base_fingerprint", ""), source)
    try:
        scaling = json.loads(metadata.get("scaling", ""), object_pairs_hook=unique_object)
    except ValueError as error:
        raise EdgeLoraError(f"{source}: scaling is not valid JSON ({error})") from error
    if not isinstance(scaling, dict) or not scaling:
        raise EdgeLoraError(f"{source}: scaling must map targets to numbers")
    for target, number in scaling.items():
        if type(number) not in (int, float) or not math.isfinite(number):
            raise EdgeLoraError(f"{source}: scaling of {target} is {number!r}, not a finite number")
    return {target: float(number) for target, number in sorted(scaling.items())}


def _check_names(
    tensors: Mapping[str, StoredTensor], scaling: Mapping[str, float], source: str
) -> None:
    expected = {f"{target}.{factor}" for target in scaling for factor in ("lora_a", "lora_b")}
    if wrong := sorted(expected ^ tensors.keys()):
        raise EdgeLoraError(f"{source}: missing or unexpected tensors: {', '.join(wrong)}")
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {"F16", "F32"}:
        raise EdgeLoraError(
            f"{source}: tensors are {', '.join(sorted(dtypes))}; must all be F16 or all F32"
        )


def _stored_branch(
    tensors: Mapping[str, StoredTensor], target: str, scaling: float, source: str
) -> Branch:
    a, b = tensors[f"{target}.lora_a"], tensors[f"{target}.lora_b"]
    if (
        len(a.shape) != 2
        or len(b.shape) != 3
        or b.shape[1:] != (a.shape[0], PANEL)
        or 0 in a.shape + b.shape
    ):
        raise EdgeLoraError(
            f"{source}: {target} has lora_a {list(a.shape)} and lora_b {list(b.shape)}"
        )
    branch = Branch(a.values(), unpack_panels(b.values()), scaling)
    if not np.isfinite(branch.lora_a).all() or not np.isfinite(branch.lora_b).all():
        raise EdgeLoraError(f"{source}: {target} holds NaN or infinity")
    return branch


def _fit(
    target: str, branch: Branch, targets: Mapping[str, tuple[int, int]], source: str
) -> Branch:
    """The branch without its padding rows, which must be zero."""
    if target not in targets:
        raise EdgeLoraError(f"{source}: the base has no linear {target}")
    rows, columns = targets[target]
    if branch.lora_a.shape[1] != columns or len(branch.lora_b) != math.ceil(rows / PANEL) * PANEL:
        found = f"[{len(branch.lora_b)}, {branch.lora_a.shape[1]}]"
        raise EdgeLoraError(f"{source}: {target} is for {found}, the base has [{rows}, {columns}]")
    if branch.lora_b[rows:].any():
        raise EdgeLoraError(f"{source}: {target}.lora_b has values in its padding rows")
    return Branch(branch.lora_a, branch.lora_b[:rows], branch.scaling)
