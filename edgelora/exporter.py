"""The orchestrator: base and adapters in, bundle out."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgelora.adapter import (
    PARTS,
    Adapter,
    compare_base_name,
    read_adapter,
    refuse_parts,
    refuse_replaced,
    valid_adapter_names,
)
from edgelora.adapter_file import Dtype, write_adapter
from edgelora.binding import bound, check_biases
from edgelora.bundle import (
    BUNDLE,
    WeightFile,
    adapter_entry,
    adapter_path,
    write_manifest,
)
from edgelora.calibration import CalibrationText, read_calibration
from edgelora.changed_base import changed_base
from edgelora.checkpoint import Checkpoint, open_checkpoint, read_tokenizer
from edgelora.checkpoint.fingerprint import FingerprintBuilder, merged_fingerprint
from edgelora.config import ModelConfig
from edgelora.device import load_profile
from edgelora.errors import EdgeLoraError
from edgelora.graph import Decoder, OwnOps, StockOps
from edgelora.inventory import take_inventory
from edgelora.layout import targets
from edgelora.manifest import is_unicode
from edgelora.onnx_adapter import write_onnx_adapter
from edgelora.plan import CALIBRATION_WINDOWS, ExportOptions, Plan, make_plan
from edgelora.rounding import Rounding
from edgelora.tokenizer import TokenizerFiles
from edgelora.weights import WeightWriter
from edgelora.whole_folder import check_target, new_folder

Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True)
class ExportReport:
    """What an export did. Sizes in bytes; bits_per_weight over all matrices of the weight file."""

    bundle: Path
    plan: Plan
    source_bytes: int
    bundle_bytes: int
    bits_per_weight: float
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A base and its adapters, read and checked against each other, not yet converted."""

    checkpoint: Checkpoint
    tokenizer: TokenizerFiles
    adapters: Mapping[str, Adapter]
    plan: Plan
    calibration: CalibrationText | None
    warnings: tuple[str, ...]


def prepare(base: Path, adapters: Mapping[str, Path], options: ExportOptions) -> Request:
    """Reads headers and adapters and decides the plan; writes nothing. Raises EdgeLoraError."""
    profile = load_profile(options.device) if options.device else None
    checkpoint = open_checkpoint(base)
    valid_adapter_names(adapters)
    shapes = targets(checkpoint.config)
    read = {name: read_adapter(path, shapes) for name, path in adapters.items()}
    if options.mode == "merge" and len(read) != 1:
        raise EdgeLoraError(f"--mode merge: takes exactly one adapter, {len(read)} given")
    for name, adapter in read.items():
        _check_mode(adapter, adapters[name], options)
        check_biases(adapter, adapters[name], checkpoint.config)
        if options.mode == "merge":
            checkpoint = changed_base(checkpoint, adapter, adapters[name])
    warnings = (compare_base_name(adapter, checkpoint.name) for adapter in read.values())
    tokenizer = read_tokenizer(base)
    _check_end_tokens(tokenizer, checkpoint)
    _check_texts(
        base, [checkpoint.name, json.dumps(tokenizer.tokenizer_config, ensure_ascii=False)]
    )
    for path, adapter in zip(adapters.values(), read.values(), strict=True):
        _check_texts(path, [adapter.base_model_name_or_path or ""])
    calibration = _read_calibration(checkpoint, tokenizer, options)
    plan = make_plan(
        checkpoint.config,
        options,
        take_inventory(checkpoint, read),
        profile=profile,
        calibration=str(calibration) if calibration else None,
    )
    return Request(
        checkpoint,
        tokenizer,
        read,
        plan,
        calibration,
        tuple(warning for warning in warnings if warning),
    )


def _check_mode(adapter: Adapter, path: Path, options: ExportOptions) -> None:
    """Raises EdgeLoraError for what a side branch of that flavor cannot do."""
    if options.mode == "merge":
        return
    refuse_replaced(adapter, path)
    if options.flavor == "ort":
        why = "flavor ort cannot do that in a side branch: use --mode merge or flavor edgelora"
        refuse_parts(adapter, path, PARTS, why)


def _read_calibration(
    checkpoint: Checkpoint, tokenizer: TokenizerFiles, options: ExportOptions
) -> CalibrationText | None:
    if options.calibration is None:
        return None
    return read_calibration(
        Path(options.calibration),
        tokenizer,
        checkpoint.config,
        windows=CALIBRATION_WINDOWS[options.quality],
    )


def _check_texts(source: Path, texts: Iterable[str]) -> None:
    """What goes into the manifest or a tokenizer file must be text that UTF-8 can say."""
    for text in texts:
        if not is_unicode(text):
            where, shown = (
                t.encode("utf-8", "backslashreplace").decode() for t in (str(source), text)
            )
            raise EdgeLoraError(f"{where}: {shown:.80} is not valid Unicode: rename it")


def _check_end_tokens(tokenizer: TokenizerFiles, checkpoint: Checkpoint) -> None:
    """The config's own ids have been checked where it was read."""
    rows = checkpoint.config.vocab_size
    beyond = [str(token) for token in tokenizer.eos_token_ids if token >= rows]
    if beyond:
        raise EdgeLoraError(
            f"{checkpoint.path}: end tokens {', '.join(beyond)} of the tokenizer: not below "
            f"vocab_size {rows}"
        )


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
    embedding_format, head_format, quality, calibration, flavor, context_length, device. The
    bundle appears whole or not at all. Raises EdgeLoraError on any bad input.
    """
    started = time.perf_counter()
    folders = {name: Path(path) for name, path in (adapters or {}).items()}
    check_target(Path(out), BUNDLE, force=force)
    request = prepare(Path(base), folders, ExportOptions(**options))
    with new_folder(Path(out), BUNDLE, force=force) as folder:
        bits = write_bundle(folder, request, progress or (lambda done, total: None))
    return ExportReport(
        Path(out),
        request.plan,
        _folder_bytes([Path(base), *folders.values()]),
        _folder_bytes([Path(out)]),
        bits,
        time.perf_counter() - started,
        request.warnings,
    )


def _ops(plan: Plan) -> OwnOps | StockOps:
    if plan.flavor == "ort":
        return StockOps()
    return OwnOps(kv_format="float" if plan.format == "float" else "int8")


def write_bundle(folder: Path, request: Request, progress: Progress) -> float:
    """Fills the folder; returns bits a weight."""
    writer, fingerprint = _write_weights(folder, request, progress)
    ops = _ops(request.plan)
    model = Decoder(request.checkpoint.config, writer.matrices, ops).build(writer.file.tensors)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    side = {} if request.plan.mode == "merge" else request.adapters
    merged = request.adapters if request.plan.mode == "merge" else {}
    for adapter in merged.values():
        fingerprint = merged_fingerprint(fingerprint, adapter.fingerprint)
    for name, adapter in side.items():
        adapter_of_base = bound(adapter, request.checkpoint)
        _write_adapter(folder, name, adapter_of_base, fingerprint, request.plan)
    request.tokenizer.write(folder)
    write_manifest(folder, _fields(request, fingerprint, side, merged))
    return _bits_per_weight(writer)


def _write_adapter(folder: Path, name: str, adapter: Adapter, fingerprint: str, plan: Plan) -> None:
    """adapters/<name>/adapter.safetensors, or adapter.onnx_adapter for the ort flavor."""
    path = folder / adapter_path(name, plan.flavor)
    path.parent.mkdir(parents=True)
    if plan.flavor == "ort":
        write_onnx_adapter(adapter, path)
        return
    dtype: Dtype = "float32" if plan.format == "float" else "float16"
    path.write_bytes(write_adapter(adapter, name=name, base_fingerprint=fingerprint, dtype=dtype))


def _write_weights(folder: Path, request: Request, progress: Progress) -> tuple[WeightWriter, str]:
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
    changed = {target for target, branch in branches.items() if branch.rank}
    rounding = Rounding(checkpoint, request.plan, changed, windows)
    file, fingerprint = WeightFile(folder), FingerprintBuilder()
    writer = WeightWriter(checkpoint, request.plan, branches, rounding, file, fingerprint, advance)
    try:
        writer.write()
    finally:
        writer.file.close()
    return writer, writer.fingerprint.finish(request.tokenizer)


def _fields(
    request: Request,
    fingerprint: str,
    side: Mapping[str, Adapter],
    merged: Mapping[str, Adapter],
) -> dict[str, Any]:
    config, plan = request.checkpoint.config, request.plan
    shapes = targets(config)
    return {
        "flavor": plan.flavor,
        "model": _model_fields(config, plan, request.tokenizer),
        "base": {"name": request.checkpoint.name, "fingerprint": fingerprint},
        "targets": [
            {"name": name, "in_features": shape[1], "out_features": shape[0]}
            for name, shape in shapes.items()
        ],
        "plan": asdict(plan),
        "adapters": _entries(side, plan.flavor),
        "merged": _entries(merged, plan.flavor),
        "tools": {name: version(name) for name in ("edgelora", "numpy", "onnx")},
    }


def _entries(adapters: Mapping[str, Adapter], flavor: str) -> dict[str, Any]:
    return {
        name: adapter_entry(
            adapter_path(name, flavor),
            adapter.branches,
            adapter.fingerprint,
            adapter.base_model_name_or_path,
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
