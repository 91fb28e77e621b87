"""report.json → the evaluation that it was made of, to four digits."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from edgelora.evaluation import (
    Evaluation,
    LinearResult,
    Score,
    Survival,
    TextDescription,
    Variant,
    VariantResult,
)
from edgelora.json_file import read_json_file, whole
from edgelora.report.record import FORMAT, FORMAT_VERSION, Bytes

Fields = dict[str, Any]


def read_report(path: Path) -> tuple[Evaluation, Bytes, tuple[str, ...]]:
    """With the sizes and warnings. Raises EdgeLoraError."""
    found = read_json_file(path, "report", FORMAT, FORMAT_VERSION)
    with whole(path):
        return _evaluation(found), _sizes(found), tuple(found["warnings"])


def _evaluation(found: Fields) -> Evaluation:
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
    return Evaluation(TextDescription(**found["text"]), results, effects, unapplied)


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
