"""One more adapter for a bundle that is there already; only some kinds need the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.adapter import (
    Adapter,
    Branch,
    Prefix,
    PrefixFit,
    SoftPrompt,
    check_invocation,
    read_adapter,
    refuse_copies,
    refuse_input_factors,
    refuse_parts,
    refuse_prefix,
    refuse_ranges,
    refuse_replaced,
    valid_adapter_names,
    warning_about,
)
from edgelora.adapter_file import Dtype, as_stored, read_adapter_file, write_adapter
from edgelora.base_copies import compared
from edgelora.binding import bound, bound_without_base, check_biases, with_prefix
from edgelora.bundle import adapter_entry, adapter_path, exchange, free_path, locked
from edgelora.bundle_base import BundleBase, open_bundle_base
from edgelora.checkpoint import Checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import Subject
from edgelora.manifest import (
    REPORT,
    SELFCHECK,
    bound_adapter_file,
    check_content,
    read_manifest,
    report_paths,
    selfcheck_path,
)
from edgelora.plan import ExportOptions, Plan
from edgelora.reference import check_base, open_base
from edgelora.reporting import (
    Report,
    read_report_text,
    subject_of,
    with_adapter,
    without_adapters,
)
from edgelora.selfcheck import extended
from edgelora.tokenizer import from_folder


@dataclass(frozen=True)
class AddedAdapter:
    """The adapter's line in the manifest, its size in bytes, a warning about it or None.

    mean_kl: of the adapter in the report; None where the report tells nothing of it.
    """

    entry: dict[str, Any]
    size: int
    warning: str | None
    mean_kl: float | None = None


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
    trained: Adapter | None = None  # its factors as trained, where the base is given


def add_adapter(
    bundle: Path,
    name: str,
    path: Path,
    *,
    force: bool = False,
    base: Path | None = None,
    report_text: Path | None = None,
) -> AddedAdapter:
    """Binds a PEFT folder, or an adapter.safetensors made for the same base, to the bundle.

    With the base, which is recognised by its fingerprint, a PEFT folder may have DoRA, trained
    biases and soft prompts, and its losses go into the bundle's report, if it has one; they are
    measured on the report's text, which is given if it is not the built-in one.

    Raises EdgeLoraError if the name is taken (unless `force`), if the base differs by
    fingerprint, or if the adapter does not fit. The bundle stays usable at every moment.
    """
    read_manifest(bundle)
    with locked(bundle):
        manifest = read_manifest(bundle)
        valid_adapter_names([*manifest["adapters"], name])
        _refuse(bundle, manifest, name, force=force)
        _check_read(bundle, manifest)
        checkpoint = None if base is None else _recognised(bundle, manifest, base)
        held = open_bundle_base(bundle, manifest)
        new = _read(held, manifest, name, path, checkpoint)
        place = free_path(manifest, adapter_path(name), new.data)
        positions = new.prefix.positions if new.prefix else 0
        entry = adapter_entry(
            place, new.branches, new.invocation, new.source, new.base, prefix=positions
        )
        files = {adapter_path(name): (place, new.data)}
        changed: dict[str, Any] = {}
        if (known := selfcheck_path(manifest)) in manifest["files"]:
            data = _selfchecked(held, manifest, known, name, new)
            changed["selfcheck"] = free_path(manifest, SELFCHECK, data)
            files[SELFCHECK] = (changed["selfcheck"], data)
            entry |= {"selfcheck": True}
        mean_kl = None
        if paths := report_paths(manifest):
            report = _reported(held, manifest, checkpoint, name, new, report_text)
            data_of = {"json": report.json, "html": report.html}
            changed["report"] = {k: free_path(manifest, REPORT[k], data_of[k]) for k in paths}
            files |= {REPORT[k]: (changed["report"][k], data_of[k]) for k in paths}
            mean_kl = report.mean_kl.get(name)
            entry |= {} if name in report.mean_kl else {"report": False}
        changed["adapters"] = manifest["adapters"] | {name: entry}
        exchange(bundle, files, manifest | changed)
        return AddedAdapter(entry, len(new.data), new.warning, mean_kl)


def _recognised(bundle: Path, manifest: dict[str, Any], base: Path) -> Checkpoint:
    checkpoint = open_base(bundle, manifest, base)
    check_base(bundle, manifest, checkpoint)
    return checkpoint


def _reported(
    held: BundleBase,
    manifest: dict[str, Any],
    checkpoint: Checkpoint | None,
    name: str,
    new: _NewAdapter,
    text_file: Path | None,
) -> Report:
    """The bundle's report with the adapter; without the base it says that it leaves it out."""
    path, plan = held.path / report_paths(manifest)["json"], Plan(**manifest["plan"])
    entries = manifest["adapters"].items()
    left_out = [each for each, e in entries if e.get("report") is False and each != name]
    if checkpoint is None or new.trained is None:
        return without_adapters(path, Subject(held, plan), [*left_out, name])
    options = ExportOptions(report_text=None if text_file is None else str(text_file))
    text = read_report_text(options, checkpoint, from_folder(held.path))
    subject = subject_of(checkpoint, plan, {name: new.trained})
    return with_adapter(path, subject, text, held.stored, left_out)


def _selfchecked(
    held: BundleBase, manifest: dict[str, Any], known: str, name: str, new: _NewAdapter
) -> bytes:
    """The self-check with the adapter's logits, computed from the bundle's own weights as the
    export did.
    """
    fingerprint = manifest["base"]["fingerprint"]
    adapter = Adapter(name, None, new.stored, fingerprint, prefix=new.prefix)
    subject = Subject(held, Plan(**manifest["plan"]), bound={name: adapter})
    return extended(held.path / known, subject, held.stored, name)


def _refuse(bundle: Path, manifest: dict[str, Any], name: str, *, force: bool) -> None:
    if manifest["flavor"] != "edgelora":
        raise EdgeLoraError(
            f"{bundle}: flavor {manifest['flavor']}: its weights are not read back for the new "
            "self-check, as those of flavor edgelora are: export it again with the adapter"
        )
    if manifest["merged"]:
        merged = ", ".join(manifest["merged"])
        raise EdgeLoraError(f"{bundle}: {merged} is merged into its weights: it takes no adapters")
    if name in manifest["adapters"] and not force:
        raise EdgeLoraError(f"{bundle}: has an adapter {name!r} already: choose a name or --force")


def _check_read(bundle: Path, manifest: dict[str, Any]) -> None:
    """Raises EdgeLoraError if a file that is parsed here, the adapter's own aside, is damaged."""
    for name in ("model.onnx", selfcheck_path(manifest), *report_paths(manifest).values()):
        if name in manifest["files"]:
            check_content(bundle, manifest, name)


def _read(
    held: BundleBase, manifest: dict[str, Any], name: str, path: Path, checkpoint: Checkpoint | None
) -> _NewAdapter:
    bundle = held.path
    targets = {
        target["name"]: (target["out_features"], target["in_features"])
        for target in manifest["targets"]
    }
    file = bound_adapter_file(path)
    if file.is_file() and checkpoint is not None:
        raise EdgeLoraError(f"{file}: is bound already: give its PEFT folder, or no --base")
    if file.is_file():
        return _read_bound(bundle, manifest, file, targets)
    again = "export a bundle of its own with the base"
    if "layers" in manifest["base"]:
        raise EdgeLoraError(f"{bundle}: its base repeats layers (layer_replication): {again}")
    refuse_ranges(path, f"repeated layers make another base: {again}")
    adapter = read_adapter(path, targets)
    refuse_replaced(adapter, path, manifest["model"]["vocab_size"])
    refuse_input_factors(adapter, path)
    check_invocation(adapter, path, manifest["model"]["vocab_size"])
    _check_prefix(adapter.prefix, path, manifest)
    trained = None if checkpoint is None else _with_base(adapter, path, checkpoint)
    if checkpoint is None or trained is None:
        adapter = _without_base(adapter, path, held.biased())
    else:
        adapter = bound(trained, checkpoint)
    fingerprint = manifest["base"]["fingerprint"]
    dtype: Dtype = "float32" if manifest["plan"]["format"] == "float" else "float16"
    data = write_adapter(adapter, name=name, base_fingerprint=fingerprint, dtype=dtype)
    stored = as_stored(adapter, name=name, dtype=dtype)
    warning = warning_about(adapter, manifest["base"]["name"])
    base = adapter.base_model_name_or_path
    found = (adapter.branches, stored.branches, adapter.invocation, stored.prefix)
    return _NewAdapter(data, *found, adapter.fingerprint, base, warning, trained)


def _with_base(adapter: Adapter, path: Path, checkpoint: Checkpoint) -> Adapter:
    """As trained, soft embeddings as the base's keys and values."""
    check_biases(adapter, path, checkpoint.config)
    return with_prefix(compared(adapter, path, checkpoint), checkpoint)


def _without_base(adapter: Adapter, path: Path, biased: set[str]) -> Adapter:
    why = "that takes the base: add it with --base"
    refuse_copies(adapter, path, f"{why}, or save with save_embedding_layers=False")
    refuse_parts(adapter, path, ("magnitude", "trained_bias"), why)
    if isinstance(adapter.prefix, SoftPrompt):
        refuse_prefix(adapter, path, f"embeddings become keys and values: {why}")
    return bound_without_base(adapter, path, biased)


def _check_prefix(prefix: Prefix | SoftPrompt | None, path: Path, manifest: dict[str, Any]) -> None:
    """Raises EdgeLoraError for one that does not fit the bundle."""
    names = ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size")
    sizes = (int(manifest["model"][name]) for name in (*names, "context_length"))
    if prefix is not None:
        PrefixFit(*sizes).check(prefix, path)


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
