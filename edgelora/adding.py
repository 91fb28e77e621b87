"""One more adapter for a bundle that is there already; the base is not needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.adapter import compare_base_name, read_adapter, valid_adapter_name
from edgelora.adapter_file import read_adapter_file, write_adapter
from edgelora.bundle import adapter_entry, adapter_path, add_files
from edgelora.errors import EdgeLoraError
from edgelora.manifest import read_manifest

BOUND = "adapter.safetensors"


@dataclass(frozen=True)
class AddedAdapter:
    """The adapter's line in the manifest, its size in bytes, and a warning about its base or
    None.
    """

    entry: dict[str, Any]
    size: int
    warning: str | None


def add_adapter(bundle: Path, name: str, path: Path, *, force: bool = False) -> AddedAdapter:
    """Binds a PEFT folder, or an adapter.safetensors made for the same base, to the bundle.

    Raises EdgeLoraError if the name is taken (unless `force`), if the base differs by
    fingerprint, or if the adapter does not fit. The bundle stays usable at every moment.
    """
    manifest = read_manifest(bundle)
    valid_adapter_name(name)
    _refuse(bundle, manifest, name, force=force)
    data, entry, warning = _read(bundle, manifest, name, path)
    fields = manifest | {"adapters": manifest["adapters"] | {name: entry}}
    add_files(bundle, {adapter_path(name): data}, fields)
    return AddedAdapter(entry, len(data), warning)


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


def _read(
    bundle: Path, manifest: dict[str, Any], name: str, path: Path
) -> tuple[bytes, dict[str, Any], str | None]:
    targets = {
        target["name"]: (target["out_features"], target["in_features"])
        for target in manifest["targets"]
    }
    file = path / BOUND if path.is_dir() else path
    if file.is_file():
        return _read_bound(bundle, manifest, name, file, targets)
    adapter = read_adapter(path, targets)
    data = write_adapter(
        adapter,
        name=name,
        base_fingerprint=manifest["base"]["fingerprint"],
        dtype="float32" if manifest["plan"]["format"] == "float" else "float16",
    )
    entry = adapter_entry(
        adapter_path(name), adapter.branches, adapter.fingerprint, adapter.base_model_name_or_path
    )
    return data, entry, compare_base_name(adapter, manifest["base"]["name"])


def _read_bound(
    bundle: Path,
    manifest: dict[str, Any],
    name: str,
    file: Path,
    targets: dict[str, tuple[int, int]],
) -> tuple[bytes, dict[str, Any], str | None]:
    """A file that names the fingerprint of its base."""
    stored = read_adapter_file(file)
    ours = manifest["base"]["fingerprint"]
    if stored.base_fingerprint != ours:
        raise EdgeLoraError(
            f"{file}: made for the base {stored.base_fingerprint}, but {bundle} holds {ours}"
        )
    branches = read_adapter_file(file, targets).branches
    return file.read_bytes(), adapter_entry(adapter_path(name), branches, None, None), None
