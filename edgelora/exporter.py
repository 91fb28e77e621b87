"""The orchestrator: base and adapters in, bundle out."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelora.adapter import (
    Adapter,
)
from edgelora.adapter_file import Dtype, write_adapter
from edgelora.bundle import (
    BUNDLE,
    WeightFile,
    adapter_entry,
    adapter_path,
    write_manifest,
)
from edgelora.changed_base import source_of
from edgelora.checkpoint.fingerprint import FingerprintBuilder, merged_fingerprint
from edgelora.config import ModelConfig
from edgelora.evaluation import StoredWeights, Subject
from edgelora.graph import Decoder, OwnOps, StockOps
from edgelora.layout import targets
from edgelora.manifest import SELFCHECK
from edgelora.onnx_adapter import write_onnx_adapter
from edgelora.plan import ExportOptions, Plan
from edgelora.repeated_base import layers_of
from edgelora.reporting import Report, subject_of, write_up
from edgelora.request import Progress, Request, prepare, silently
from edgelora.rounding import Rounding
from edgelora.selfcheck import selfcheck_json
from edgelora.tokenizer import TokenizerFiles
from edgelora.weights import WeightWriter
from edgelora.whole_folder import check_target, new_folder


@dataclass(frozen=True)
class ExportReport:
    """What an export did. Sizes in bytes; bits_per_weight over all matrices of the weight file.

    mean_kl: KL divergence from the float model on the report's text, by adapter, "" for the base;
    empty without a report.
    """

    bundle: Path
    plan: Plan
    source_bytes: int
    bundle_bytes: int
    bits_per_weight: float
    seconds: float
    mean_kl: Mapping[str, float]
    warnings: tuple[str, ...]


def export(
    base: Path | str,
    out: Path | str,
    *,
    adapters: Mapping[str, Path | str] | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> ExportReport:
    """Converts `base` and PEFT `adapters` (name → folder) into the bundle folder `out`.

    `options` are the fields of ExportOptions: mode, format, block_size, zero_points,
    embedding_format, head_format, quality, calibration, flavor, context_length, device,
    merge_base, report, report_text. The bundle appears whole or not at all. Raises EdgeLoraError on
    any bad input.
    """
    started = time.perf_counter()
    folders = {name: Path(path) for name, path in (adapters or {}).items()}
    check_target(Path(out), BUNDLE, force=force)
    progress = progress or silently
    request = prepare(Path(base), folders, ExportOptions(**options), progress)
    with new_folder(Path(out), BUNDLE, force=force) as folder:
        bits, report = write_bundle(folder, request, progress)
    return ExportReport(
        Path(out),
        request.plan,
        _folder_bytes([Path(base), *folders.values()]),
        _folder_bytes([Path(out)]),
        bits,
        time.perf_counter() - started,
        report.mean_kl if report else {},
        request.warnings + (report.warnings if report else ()),
    )


def _ops(plan: Plan) -> OwnOps | StockOps:
    if plan.flavor == "ort":
        return StockOps()
    return OwnOps(kv_format="float" if plan.format == "float" else "int8")


def write_bundle(folder: Path, request: Request, progress: Progress) -> tuple[float, Report | None]:
    """Fills the folder; returns bits a weight, and the report that was asked for."""
    writer, fingerprint = _write_weights(folder, request, partial(progress, "weights"))
    ops = _ops(request.plan)
    model = Decoder(request.checkpoint.config, writer.matrices, ops).build(writer.file.tensors)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    side = {} if request.plan.mode == "merge" else request.adapters
    merged = request.adapters if request.plan.mode == "merge" else {}
    for adapter in merged.values():
        fingerprint = merged_fingerprint(fingerprint, adapter.fingerprint)
    subject = subject_of(request.checkpoint, request.plan, request.adapters)
    for name in side:
        _write_adapter(folder, name, subject.bound[name], fingerprint, request.plan)
    request.tokenizer.write(folder)
    stored = StoredWeights(
        writer.file.path, writer.file.tensors, writer.matrices, request.plan.flavor
    )
    _write_selfcheck(folder, subject, stored)
    report = _write_report(folder, request, subject, stored, partial(progress, "report"))
    write_manifest(folder, _fields(request, fingerprint, side, merged))
    return _bits_per_weight(writer), report


def _write_selfcheck(folder: Path, subject: Subject, stored: StoredWeights) -> None:
    variants = sorted(subject.exported(), key=lambda variant: variant.adapter or "")
    (folder / SELFCHECK).write_bytes(selfcheck_json(subject, stored, variants))


def _write_report(
    folder: Path,
    request: Request,
    subject: Subject,
    stored: StoredWeights,
    progress: Callable[[int, int], None],
) -> Report | None:
    """report.json and report.html."""
    if request.report_text is None:
        return None
    report = write_up(subject, request.report_text, stored, progress)
    (folder / "report.json").write_bytes(report.json)
    (folder / "report.html").write_bytes(report.html)
    return report


def _write_adapter(folder: Path, name: str, adapter: Adapter, fingerprint: str, plan: Plan) -> None:
    """adapters/<name>/adapter.safetensors, or adapter.onnx_adapter for factors in flavor ort."""
    path = folder / _path(name, adapter, plan.flavor)
    path.parent.mkdir(parents=True)
    if path.suffix == ".onnx_adapter":
        write_onnx_adapter(adapter, path)
        return
    wide = plan.format == "float" or plan.flavor == "ort"
    dtype: Dtype = "float32" if wide else "float16"
    path.write_bytes(write_adapter(adapter, name=name, base_fingerprint=fingerprint, dtype=dtype))


def _path(name: str, adapter: Adapter, flavor: str) -> str:
    """A prefix goes into the kv_cache, of which no .onnx_adapter knows."""
    return adapter_path(name, "edgelora" if adapter.prefix else flavor)


def _write_weights(
    folder: Path, request: Request, progress: Callable[[int, int], None]
) -> tuple[WeightWriter, str]:
    checkpoint = request.checkpoint
    total = sum(_size(checkpoint.shape(name)) for name in checkpoint.names())
    done = 0

    def advance(weights: int) -> None:
        nonlocal done
        done += weights
        progress(done, total)

    branches = {}
    if request.plan.mode == "merge":
        (adapter,) = request.adapters.values()
        branches = dict(adapter.branches)
    windows = request.calibration.windows if request.calibration else None
    rounding = Rounding(checkpoint, request.plan, {}, windows)
    rounding.changed = {
        target
        for target, branch in branches.items()
        if branch.changes_weight and not rounding.keeps_codes(target, branch)
    }
    file, fingerprint = WeightFile(folder), FingerprintBuilder()
    writer = WeightWriter(checkpoint, request.plan, branches, rounding, file, fingerprint, advance)
    try:
        writer.write()
    finally:
        writer.file.close()
    return writer, writer.fingerprint.finish(request.base_tokenizer)


def _fields(
    request: Request,
    fingerprint: str,
    side: Mapping[str, Adapter],
    merged: Mapping[str, Adapter],
) -> dict[str, Any]:
    config, plan = request.checkpoint.config, request.plan
    shapes = targets(config)
    layers = layers_of(source_of(request.checkpoint))
    repeats = {"layers": list(layers)} if layers else {}
    return {
        "flavor": plan.flavor,
        "model": _model_fields(config, plan, request.tokenizer),
        "base": {"name": request.checkpoint.name, "fingerprint": fingerprint} | repeats,
        "targets": [
            {"name": name, "in_features": shape[1], "out_features": shape[0]}
            for name, shape in shapes.items()
        ],
        "plan": asdict(plan),
        "adapters": {
            name: entry | {"selfcheck": True} for name, entry in _entries(side, plan.flavor).items()
        },
        "merged": _entries(merged, plan.flavor),
        "tools": {name: version(name) for name in ("edgelora", "numpy", "onnx")},
    }


def _entries(adapters: Mapping[str, Adapter], flavor: str) -> dict[str, Any]:
    return {
        name: adapter_entry(
            _path(name, adapter, flavor),
            adapter.branches,
            adapter.invocation,
            adapter.fingerprint,
            adapter.base_model_name_or_path,
            prefix=adapter.prefix.positions if adapter.prefix else 0,
        )
        for name, adapter in adapters.items()
    }


def _model_fields(config: ModelConfig, plan: Plan, tokenizer: TokenizerFiles) -> dict[str, Any]:
    eos = dict.fromkeys([*config.eos_token_ids, *tokenizer.eos_token_ids])
    return {
        "architecture": config.architecture,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "context_length": plan.context_length,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(eos),
    }


def _bits_per_weight(writer: WeightWriter) -> float:
    matrices = {id(matrix): matrix for matrix in writer.matrices.values()}.values()
    weights = sum(matrix.in_features * matrix.out_features for matrix in matrices)
    stored = sum(
        writer.file.tensors[name].length
        for matrix in matrices
        for role, name in matrix.inputs.items()
        if role != "bias"
    )
    return 8 * stored / weights


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for dim in shape:
        size *= dim
    return size


def _folder_bytes(paths: Iterable[Path]) -> int:
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    ]
    return sum(file.stat().st_size for file in files)
