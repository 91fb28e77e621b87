"""report.json (fields: ARCHITECTURE.md)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgelora.evaluation import Evaluation, LinearResult, Score, VariantResult

FORMAT, FORMAT_VERSION = "edgelora-report", 1
Bytes = Mapping[tuple[str | None, str], tuple[int, int]]  # (adapter, kind) → weights, adapter


def report_json(
    evaluation: Evaluation, sizes: Bytes, warnings: tuple[str, ...], left_out: Sequence[str]
) -> bytes:
    """Numbers with four digits."""
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "text": asdict(evaluation.text),
        "warnings": list(warnings),
        "left_out": list(left_out),
        "unapplied": {name: _score(score) for name, score in evaluation.unapplied.items()},
        "effects": {name: _score(score) for name, score in evaluation.effects.items()},
        "variants": [_variant(result, sizes) for result in evaluation.results],
    }
    return (json.dumps(fields, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _variant(result: VariantResult, sizes: Bytes) -> dict[str, Any]:
    variant = result.variant
    weights, adapter = sizes.get((variant.adapter, variant.kind), (None, None))
    return {
        "adapter": variant.adapter,
        "kind": variant.kind,
        "exported": result.exported,
        "weight_bytes": weights,
        "adapter_bytes": adapter,
        **_score(result.score),
        "delta_changed": _digits(result.mean_changed),
        "delta_correlation": _digits(result.mean_correlation),
        "linears": {target: _linear(each) for target, each in result.linears.items()},
    }


def _score(score: Score) -> dict[str, Any]:
    return {name: _digits(value) for name, value in asdict(score).items()}


def _linear(result: LinearResult) -> dict[str, Any]:
    fields = {"error": _digits(result.error)}
    if result.survival is not None:
        fields["changed"] = _digits(result.survival.changed)
        fields["correlation"] = _digits(result.survival.correlation)
    return fields


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
