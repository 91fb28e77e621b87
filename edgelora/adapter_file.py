"""`Adapter` ↔ the bytes of a bundle's `adapter.safetensors` (layout: ARCHITECTURE.md)."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgelora.adapter import Adapter, Branch, Prefix, SoftPrompt, valid_adapter_name
from edgelora.adapter.half import half_factors
from edgelora.adapter.prefix import as_float32, as_half
from edgelora.adapter.tensors import (
    Factor,
    StoredTensor,
    parse_safetensors,
    safetensors_bytes,
    unique_object,
)
from edgelora.errors import EdgeLoraError

FORMAT = "edgelora-adapter"
FORMAT_VERSION = "1"
PREFIX_KEYS, PREFIX_VALUES = "prefix.keys", "prefix.values"
PREFIX = {PREFIX_KEYS, PREFIX_VALUES}
PANEL = 16  # rows of lora_b that lie side by side

Dtype = Literal["float16", "float32"]


def write_adapter(adapter: Adapter, *, name: str, base_fingerprint: str, dtype: Dtype) -> bytes:
    """The file's bytes; the same adapter, name and fingerprint always give the same bytes.

    It must be bound to its base (binding.py): row factors for magnitudes, changes for biases.

    Raises EdgeLoraError for a bad name or fingerprint, and for values that float16 cannot hold.
    """
    _check_fingerprint(base_fingerprint, f"adapter {name}")
    if not adapter.branches and adapter.prefix is None:
        raise EdgeLoraError(f"adapter {name}: has no targets")
    tensors: dict[str, Factor] = {}
    if (prefix := _stored_form(adapter, name, dtype)) is not None:
        tensors |= {PREFIX_KEYS: prefix.keys, PREFIX_VALUES: prefix.values}
    for target, branch in adapter.branches.items():
        tensors |= _tensors(target, branch, dtype, f"adapter {name}: {target}")
    scaling = {target: branch.scaling for target, branch in sorted(adapter.branches.items())}
    metadata = {
        "base_fingerprint": base_fingerprint,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": valid_adapter_name(name),
        "scaling": json.dumps(scaling),
    }
    if adapter.invocation:
        metadata["activation"] = json.dumps({"invocation_tokens": adapter.invocation})
    return safetensors_bytes(tensors, metadata)


def _tensors(target: str, branch: Branch, dtype: Dtype, source: str) -> dict[str, Factor]:
    """Of one target, by name."""
    tensors: dict[str, Factor] = {}
    if branch.rank:
        lora_a, lora_b = _as_dtype(branch, dtype, source)
        tensors |= {f"{target}.lora_a": lora_a, f"{target}.lora_b": pack_panels(lora_b)}
    if branch.row_factor is not None:
        tensors[f"{target}.row_factor"] = branch.row_factor
    if branch.bias is not None:
        tensors[f"{target}.bias"] = branch.bias
    return tensors


def _stored_form(adapter: Adapter, name: str, dtype: Dtype) -> Prefix | None:
    assert not isinstance(adapter.prefix, SoftPrompt), "bound to its base before"
    if adapter.prefix is None:
        return None
    is_half = dtype == "float16"
    return as_half(adapter.prefix, f"adapter {name}") if is_half else as_float32(adapter.prefix)


def as_stored(adapter: Adapter, *, name: str, dtype: Dtype) -> Adapter:
    """The adapter as `write_adapter` writes it, its factors rounded to `dtype`.

    Raises EdgeLoraError for values that float16 cannot hold.
    """
    branches = {}
    for target, branch in adapter.branches.items():
        if branch.rank:
            lora_a, lora_b = _as_dtype(branch, dtype, f"adapter {name}: {target}")
            branch = replace(branch, lora_a=lora_a, lora_b=lora_b)
        branches[target] = branch
    return replace(adapter, branches=branches, prefix=_stored_form(adapter, name, dtype))


def _check_fingerprint(fingerprint: str, source: str) -> None:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", fingerprint):
        raise EdgeLoraError(
            f"{source}: base fingerprint {fingerprint!r} is not sha256: and 64 hex digits"
        )


def _check_scaling(scaling: Any, target: str) -> None:
    """The runtime keeps it as float32. Infinity, NaN and huge integers fail the comparison."""
    if type(scaling) not in (int, float) or not -1e38 < scaling < 1e38:
        raise EdgeLoraError(f"{target}: scaling is {scaling!r}, not a finite float32 number")


def pack_panels(lora_b: Factor) -> Factor:
    """[N, rank] → [ceil(N/16), rank, 16]: panel p, column r, row 16p+i; rows beyond N are zero."""
    rows, rank = lora_b.shape
    padded = np.pad(lora_b, ((0, -rows % PANEL), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, PANEL, rank).transpose(0, 2, 1))


def unpack_panels(panels: Factor) -> Factor:
    """[P, rank, 16] → [16·P, rank], the padding rows included."""
    return np.ascontiguousarray(panels.transpose(0, 2, 1).reshape(-1, panels.shape[1]))


def _as_dtype(branch: Branch, dtype: Dtype, target: str) -> tuple[Factor, Factor]:
    _check_scaling(branch.scaling, target)
    if not np.isfinite(branch.lora_a).all() or not np.isfinite(branch.lora_b).all():
        raise EdgeLoraError(f"{target}: lora_a or lora_b holds NaN or infinity")
    if dtype == "float16":
        return half_factors(branch, target)
    return branch.lora_a.astype(np.float32), branch.lora_b.astype(np.float32)


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """What the file says; read without `targets`, lora_b keeps its padding: [16·P, rank]."""

    name: str
    base_fingerprint: str
    dtype: Dtype
    branches: Mapping[str, Branch]
    invocation: tuple[int, ...]  # token ids from which on it acts; empty: everywhere
    prefix: Prefix | None = None


def read_adapter_file(
    path: Path, targets: Mapping[str, tuple[int, int]] | None = None
) -> StoredAdapter:
    """Read a bundle's adapter; with `targets` (module path → (out, in)), check it against the base.

    Raises EdgeLoraError naming the file and the field or tensor that breaks the documented layout.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error.strerror})") from error
    tensors, metadata = parse_safetensors(data, str(path))
    prefix = _read_prefix(tensors, str(path))
    scaling = _check_metadata(metadata, str(path), empty=prefix is not None)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in PREFIX}
    _check_names(tensors, scaling, str(path))
    branches = {
        target: _stored_branch(tensors, target, number, str(path))
        for target, number in scaling.items()
    }
    if targets is not None:
        branches = {
            target: _fit(target, branch, targets, str(path)) for target, branch in branches.items()
        }
    is_half = any(tensor.dtype == "F16" for tensor in tensors.values())
    is_half = is_half or (prefix is not None and prefix.keys.dtype == np.float16)
    return StoredAdapter(
        metadata["name"],
        metadata["base_fingerprint"],
        "float16" if is_half else "float32",
        branches,
        _invocation(metadata, prefix, str(path)),
        prefix,
    )


def _invocation(metadata: Mapping[str, str], prefix: Prefix | None, source: str) -> tuple[int, ...]:
    if (text := metadata.get("activation")) is None:
        return ()
    if prefix is not None:
        raise EdgeLoraError(f"{source}: its prefix cannot wait for invocation tokens")
    try:
        tokens = json.loads(text, object_pairs_hook=unique_object)["invocation_tokens"]
        if not tokens or not all(type(each) is int and 0 <= each < 2**31 for each in tokens):
            raise ValueError(tokens)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise EdgeLoraError(
            f"{source}: activation must be a JSON object with invocation_tokens, a list of ids"
        ) from error
    return tuple(tokens)


def _read_prefix(tensors: Mapping[str, StoredTensor], source: str) -> Prefix | None:
    """None if the file has neither of its tensors."""
    if not PREFIX & tensors.keys():
        return None
    if missing := sorted(PREFIX - tensors.keys()):
        raise EdgeLoraError(f"{source}: missing or unexpected tensors: {', '.join(missing)}")
    keys, values = tensors[PREFIX_KEYS], tensors[PREFIX_VALUES]
    same = keys.shape == values.shape and keys.dtype == values.dtype
    if not same or len(keys.shape) != 4 or 0 in keys.shape or keys.dtype not in ("F16", "F32"):
        shapes = f"{keys.dtype} {list(keys.shape)} and {values.dtype} {list(values.shape)}"
        raise EdgeLoraError(f"{source}: its prefix has keys and values {shapes}")
    prefix = Prefix(keys.values(), values.values())
    if not np.isfinite(prefix.keys).all() or not np.isfinite(prefix.values).all():
        raise EdgeLoraError(f"{source}: its prefix holds NaN or infinity")
    return prefix


def _check_metadata(
    metadata: Mapping[str, str], source: str, *, empty: bool = False
) -> dict[str, float]:
    """The scaling by target, sorted, after checking all other fields. empty: there must be none."""
    if metadata.get("format") != FORMAT:
        raise EdgeLoraError(
            f"{source}: not an EdgeLoRA adapter (format is {metadata.get('format')!r})"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        version = metadata.get("format_version")
        raise EdgeLoraError(
            f"{source}: format version {version!r} is not {FORMAT_VERSION}; update edgelora"
        )
    try:
        valid_adapter_name(metadata.get("name", ""))
    except EdgeLoraError as error:
        raise EdgeLoraError(f"{source}: {error}") from error
    _check_fingerprint(metadata.get("base_fingerprint", ""), source)
    try:
        scaling = json.loads(metadata.get("scaling", ""), object_pairs_hook=unique_object)
    except (ValueError, RecursionError) as error:
        raise EdgeLoraError(f"{source}: scaling is not valid JSON ({error})") from error
    if not isinstance(scaling, dict) or bool(scaling) == empty:
        wanted = "be {} beside a prefix" if empty else "map targets to numbers"
        raise EdgeLoraError(f"{source}: scaling must {wanted}")
    for target, number in scaling.items():
        _check_scaling(number, f"{source}: {target}")
    return {target: float(number) for target, number in sorted(scaling.items())}


def _check_names(
    tensors: Mapping[str, StoredTensor], scaling: Mapping[str, float], source: str
) -> None:
    factored = [target for target in scaling if not _has_no_factors(tensors, target)]
    expected = {f"{target}.{factor}" for target in factored for factor in ("lora_a", "lora_b")}
    optional = {f"{target}.{rows}" for target in scaling for rows in ("row_factor", "bias")}
    if wrong := sorted(expected ^ (tensors.keys() - optional)):
        raise EdgeLoraError(f"{source}: missing or unexpected tensors: {', '.join(wrong)}")
    dtypes = {tensors[name].dtype for name in expected}
    if len(dtypes) > 1 or not dtypes <= {"F16", "F32"}:
        raise EdgeLoraError(
            f"{source}: tensors are {', '.join(sorted(dtypes))}; must all be F16 or all F32"
        )


def _has_no_factors(tensors: Mapping[str, StoredTensor], target: str) -> bool:
    """A target needs both, unless it has a float for each row and neither."""
    has_factor = any(f"{target}.{factor}" in tensors for factor in ("lora_a", "lora_b"))
    has_rows = any(f"{target}.{rows}" in tensors for rows in ("row_factor", "bias"))
    return has_rows and not has_factor


def _stored_branch(
    tensors: Mapping[str, StoredTensor], target: str, scaling: float, source: str
) -> Branch:
    bias = _stored_rows(tensors, f"{target}.bias", source)
    row_factor = _stored_rows(tensors, f"{target}.row_factor", source)
    if _has_no_factors(tensors, target):
        rows = len(next(each for each in (row_factor, bias) if each is not None))
        return Branch.of_rank_0((rows, 0), row_factor=row_factor, bias=bias)
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
    branch = Branch(
        a.values(), unpack_panels(b.values()), scaling, row_factor=row_factor, bias=bias
    )
    if not np.isfinite(branch.lora_a).all() or not np.isfinite(branch.lora_b).all():
        raise EdgeLoraError(f"{source}: {target} holds NaN or infinity")
    return branch


def _stored_rows(
    tensors: Mapping[str, StoredTensor], name: str, source: str
) -> NDArray[np.float32] | None:
    """A float32 for each row; None if there is no such tensor."""
    if name not in tensors:
        return None
    tensor = tensors[name]
    if tensor.dtype != "F32" or len(tensor.shape) != 1:
        raise EdgeLoraError(f"{source}: {name} is {tensor.dtype} {list(tensor.shape)}, not F32 [N]")
    values = np.asarray(tensor.values(), np.float32)
    if not np.isfinite(values).all():
        raise EdgeLoraError(f"{source}: {name} holds NaN or infinity")
    return values


def _fit(
    target: str, branch: Branch, targets: Mapping[str, tuple[int, int]], source: str
) -> Branch:
    """The branch without its padding rows, which must be zero."""
    if target not in targets:
        raise EdgeLoraError(f"{source}: the base has no linear {target}")
    rows, columns = targets[target]
    for name, values in (("row_factor", branch.row_factor), ("bias", branch.bias)):
        if values is not None and len(values) != rows:
            raise EdgeLoraError(
                f"{source}: {target}.{name} has {len(values)} values, the base {rows}"
            )
    if branch.rank == 0:
        size = (rows, columns)
        return Branch.of_rank_0(size, row_factor=branch.row_factor, bias=branch.bias)
    if branch.lora_a.shape[1] != columns or len(branch.lora_b) != math.ceil(rows / PANEL) * PANEL:
        found = f"[{len(branch.lora_b)}, {branch.lora_a.shape[1]}]"
        raise EdgeLoraError(f"{source}: {target} is for {found}, the base has [{rows}, {columns}]")
    if branch.lora_b[rows:].any():
        raise EdgeLoraError(f"{source}: {target}.lora_b has values in its padding rows")
    return replace(branch, lora_b=branch.lora_b[:rows])
