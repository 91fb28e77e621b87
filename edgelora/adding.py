"""One more adapter for a bundle that is there already; the base is not needed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from edgelora.adapter import (
    Branch,
    check_invocation,
    compare_base_name,
    read_adapter,
    refuse_input_factors,
    refuse_parts,
    refuse_replaced,
    valid_adapter_names,
)
from edgelora.adapter_file import read_adapter_file, write_adapter
from edgelora.binding import bound_without_base
from edgelora.bundle import adapter_entry, exchange_adapter, free_adapter_path, locked
from edgelora.errors import EdgeLoraError
from edgelora.manifest import bound_adapter_file, read_manifest


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
    invocation: tuple[int, ...]
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
        place = free_adapter_path(manifest, name, new.data)
        entry = adapter_entry(place, new.branches, new.invocation, new.source, new.base)
        adapters = manifest["adapters"] | {name: entry}
        exchange_adapter(bundle, place, new.data, manifest | {"adapters": adapters})
        return AddedAdapter(entry, len(new.data), new.warning)


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
    adapter = read_adapter(path, targets)
    refuse_replaced(adapter, path)
    refuse_input_factors(adapter, path)
    check_invocation(adapter, path, manifest["model"]["vocab_size"])
    why = "that takes the base: export the bundle again with it"
    refuse_parts(adapter, path, ("magnitude", "trained_bias"), why)
    adapter = bound_without_base(adapter, path, _biased(bundle, targets))
    data = write_adapter(
        adapter,
        name=name,
        base_fingerprint=manifest["base"]["fingerprint"],
        dtype="float32" if manifest["plan"]["format"] == "float" else "float16",
    )
    warning = compare_base_name(adapter, manifest["base"]["name"])
    base = adapter.base_model_name_or_path
    found = (adapter.branches, adapter.invocation)
    return _NewAdapter(data, *found, adapter.fingerprint, base, warning)


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
    return _NewAdapter(file.read_bytes(), fitting.branches, fitting.invocation)


def _short(fingerprint: str) -> str:
    return fingerprint.removeprefix("sha256:")[:12]
