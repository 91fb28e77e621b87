"""report.json → the evaluation that it was made of, to four digits."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError
from edgelora.evaluation import (
    Evaluation,
    EvaluationText,
    LinearResult,
    Score,
    Survival,
    Variant,
    VariantResult,
)
from edgelora.report.record import FORMAT_VERSION, Bytes

Fields = dict[str, Any]


def read_report(path: Path, text: EvaluationText) -> tuple[Evaluation, Bytes, tuple[str, ...]]:
    """With the sizes and warnings. Raises EdgeLoraError unless it was measured on that text."""
    try:
        found: Fields = json.loads(path.read_bytes())
        known = (found["format"], found["format_version"]) == ("edgelora-report", FORMAT_VERSION)
        if not known:
            raise EdgeLoraError(f"{path}: not a report of this version: export the bundle again")
        if found["text"] != text.description():
            raise EdgeLoraError(
                f"{path}: was measured on the text {found['text']['name']}, not on {text.name}: "
                "give that file with --report-text"
            )
        return _evaluation(found, text), _sizes(found), tuple(found["warnings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error}): export the bundle again") from error


def _evaluation(found: Fields, text: EvaluationText) -> Evaluation:
    results = tuple(
        VariantResult(
            Variant(each["adapter"], each["kind"]),
            each["exported"],
            _score(each),
            {target: _linear(linear) for target, linear in each["linears"].items()},
        )
        for each in found["variants"]
    )
    effects, unapplied = (
        {name: _score(each) for name, each in found[key].items()}
        for key in ("effects", "unapplied")
    )
    return Evaluation(text, results, effects, unapplied)


def _score(found: Fields) -> Score:
    return Score(**{each.name: found[each.name] for each in fields(Score)})


def _linear(found: Fields) -> LinearResult:
    merged = Survival(found["changed"], found["correlation"]) if "changed" in found else None
    return LinearResult(found["error"], merged)


def _sizes(found: Fields) -> Bytes:
    return {
        (each["adapter"], each["kind"]): (each["weight_bytes"], each["adapter_bytes"])
        for each in found["variants"]
        if each["weight_bytes"] is not None
    }
