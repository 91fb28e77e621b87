"""One more adapter for a bundle that is there already; the base is not needed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgelora.adapter import (
    Adapter,
    Branch,
    Prefix,
    PrefixFit,
    SoftPrompt,
    check_invocation,
    compare_base_name,
    read_adapter,
    refuse_input_factors,
    refuse_parts,
    refuse_prefix,
    refuse_ranges,
    refuse_replaced,
    valid_adapter_names,
)
from edgelora.adapter_file import Dtype, as_stored, read_adapter_file, write_adapter
from edgelora.binding import bound_without_base
from edgelora.bundle import adapter_entry, adapter_path, exchange, free_path, locked
from edgelora.bundle_base import open_bundle_base
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import Subject
from edgelora.manifest import SELFCHECK, bound_adapter_file, read_manifest, selfcheck_path
from edgelora.plan import Plan
from edgelora.selfcheck import extended


@dataclass(frozen=True)
class AddedAdapter:
    """The adapter's line in the manifest, its size in bytes, and a warning about its base or
    None.
    """

    entry: dict[str, Any]
    size: int
    warning: str | None


@dataclass(frozen=True)
class _NewAdapter:
    data: bytes  # of adapter.safetensors
    branches: Mapping[str, Branch]
    stored: Mapping[str, Branch]  # as the file holds them
    invocation: tuple[int, ...]
    prefix: Prefix | SoftPrompt | None  # likewise
    source: str | None = None  # fingerprint of its PEFT folder
    base: str | None = None  # the name it gave
    warning: str | None = None


def add_adapter(bundle: Path, name: str, path: Path, *, force: bool = False) -> AddedAdapter:
    """Binds a PEFT folder, or an adapter.safetensors made for the same base, to the bundle.

    Raises EdgeLoraError if the name is taken (unless `force`), if the base differs by
    fingerprint, or if the adapter does not fit. The bundle stays usable at every moment.
    """
    read_manifest(bundle)
    with locked(bundle):
        manifest = read_manifest(bundle)
        valid_adapter_names([*manifest["adapters"], name])
        _refuse(bundle, manifest, name, force=force)
        new = _read(bundle, manifest, name, path)
        place = free_path(manifest, adapter_path(name), new.data)
        positions = new.prefix.positions if new.prefix else 0
        entry = adapter_entry(
            place, new.branches, new.invocation, new.source, new.base, prefix=positions
        )
        files = {adapter_path(name): (place, new.data)}
        changed: dict[str, Any] = {}
        if (known := selfcheck_path(manifest)) in manifest["files"]:
            data = _selfchecked(bundle, manifest, known, name, new)
            changed["selfcheck"] = free_path(manifest, SELFCHECK, data)
            files[SELFCHECK] = (changed["selfcheck"], data)
            entry |= {"selfcheck": True}
        changed["adapters"] = manifest["adapters"] | {name: entry}
        exchange(bundle, files, manifest | changed)
        return AddedAdapter(entry, len(new.data), new.warning)


def _selfchecked(
    bundle: Path, manifest: dict[str, Any], known: str, name: str, new: _NewAdapter
) -> bytes:
    """The self-check with the adapter's logits, computed from the bundle's own weights as the
    export did.
    """
    base = open_bundle_base(bundle, manifest)
    fingerprint = manifest["base"]["fingerprint"]
    adapter = Adapter(name, None, new.stored, fingerprint, prefix=new.prefix)
    subject = Subject(base, Plan(**manifest["plan"]), bound={name: adapter})
    return extended(bundle / known, subject, base.stored, name)


def _refuse(bundle: Path, manifest: dict[str, Any], name: str, *, force: bool) -> None:
    if manifest["flavor"] != "edgelora":
        raise EdgeLoraError(
            f"{bundle}: flavor {manifest['flavor']}: export it again with the adapter"
        )
    if manifest["merged"]:
        merged = ", ".join(manifest["merged"])
        raise EdgeLoraError(f"{bundle}: {merged} is merged into its weights: it takes no adapters")
    if name in manifest["adapters"] and not force:
        raise EdgeLoraError(f"{bundle}: has an adapter {name!r} already: choose a name or --force")


def _read(bundle: Path, manifest: dict[str, Any], name: str, path: Path) -> _NewAdapter:
    targets = {
        target["name"]: (target["out_features"], target["in_features"])
        for target in manifest["targets"]
    }
    file = bound_adapter_file(path)
    if file.is_file():
        return _read_bound(bundle, manifest, file, targets)
    again = "export a bundle of its own with the base"
    if "layers" in manifest["base"]:
        raise EdgeLoraError(f"{bundle}: its base repeats layers (layer_replication): {again}")
    refuse_ranges(path, f"repeated layers make another base: {again}")
    adapter = read_adapter(path, targets)
    refuse_replaced(adapter, path)
    refuse_input_factors(adapter, path)
    check_invocation(adapter, path, manifest["model"]["vocab_size"])
    why = "that takes the base: export the bundle again with it"
    refuse_parts(adapter, path, ("magnitude", "trained_bias"), why)
    if isinstance(adapter.prefix, SoftPrompt):
        refuse_prefix(adapter, path, f"embeddings become keys and values: {why}")
    _check_prefix(adapter.prefix, path, manifest)
    adapter = bound_without_base(adapter, path, _biased(bundle, targets))
    fingerprint = manifest["base"]["fingerprint"]
    dtype: Dtype = "float32" if manifest["plan"]["format"] == "float" else "float16"
    data = write_adapter(adapter, name=name, base_fingerprint=fingerprint, dtype=dtype)
    stored = as_stored(adapter, name=name, dtype=dtype)
    warning = compare_base_name(adapter, manifest["base"]["name"])
    base = adapter.base_model_name_or_path
    found = (adapter.branches, stored.branches, adapter.invocation, stored.prefix)
    return _NewAdapter(data, *found, adapter.fingerprint, base, warning)


def _check_prefix(prefix: Prefix | SoftPrompt | None, path: Path, manifest: dict[str, Any]) -> None:
    """Raises EdgeLoraError for one that does not fit the bundle."""
    names = ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size")
    sizes = (int(manifest["model"][name]) for name in (*names, "context_length"))
    if prefix is not None:
        PrefixFit(*sizes).check(prefix, path)


def _biased(bundle: Path, targets: Iterable[str]) -> set[str]:
    """The targets whose outputs get a bias, by the names of the graph's constants."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    names = {each.name for each in graph.initializer}
    return {t for t in targets if names & {f"{t}.bias", f"{_packed(t)}.bias"}}


def _packed(target: str) -> str:
    """The projection that a linear may share with others (`layout.projections`)."""
    path, _, name = target.rpartition(".")
    shared = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
    shared |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
    return f"{path}.{shared.get(name, name)}"


def _read_bound(
    bundle: Path, manifest: dict[str, Any], file: Path, targets: dict[str, tuple[int, int]]
) -> _NewAdapter:
    """A file that names the fingerprint of its base."""
    stored, ours = read_adapter_file(file), manifest["base"]["fingerprint"]
    if stored.base_fingerprint != ours:
        raise EdgeLoraError(
            f"{file}: made for the base {_short(stored.base_fingerprint)}, but {bundle} holds "
            f"{_short(ours)}: add it to a bundle of its own base, or give its PEFT folder"
        )
    fitting = read_adapter_file(file, targets)
    _check_prefix(fitting.prefix, file, manifest)
    branches = fitting.branches
    found = (branches, branches, fitting.invocation, fitting.prefix)
    return _NewAdapter(file.read_bytes(), *found)


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
