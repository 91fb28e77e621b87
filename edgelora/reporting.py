"""What an export loses: measured on a text, and written down."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgelora.adapter import Adapter
from edgelora.adapter_file import Dtype, as_stored
from edgelora.binding import bound
from edgelora.checkpoint import Checkpoint
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import (
    Evaluation,
    EvaluationText,
    StoredWeights,
    Subject,
    TextDescription,
    Variant,
    Walk,
    evaluate,
    read_evaluation_text,
)
from edgelora.inventory import take_inventory
from edgelora.plan import ExportOptions, Plan, plan_sizes
from edgelora.report import Bytes, read_report, report_html, report_json
from edgelora.tokenizer import TokenizerFiles

WINDOWS, POSITIONS = 4, 128  # of the text
LOST = (
    "adapter {}: little of it is left after merging: {} its mean KL is {:.4f}, that of a side "
    "branch {:.4f}, without it {:.4f}: export with --mode side"
)
UNMEASURED = (
    "adapter {}: merged, and without a report it is not measured what 4 bits leave of it: leave "
    "out --no-report, or use --mode auto"
)

Progress = Callable[[int, int], None]
_KINDS = {"side": ("side", None), "merged": ("merge", "float"), "merged_nf4": ("merge", "nf4")}


@dataclass(frozen=True)
class Report:
    """The two files, and what has to be said besides."""

    json: bytes
    html: bytes
    mean_kl: Mapping[str, float]  # of what the bundle holds, by adapter; "" for the base
    warnings: tuple[str, ...]


def read_report_text(
    options: ExportOptions, checkpoint: Checkpoint, tokenizer: TokenizerFiles
) -> EvaluationText:
    """Raises EdgeLoraError."""
    file = Path(options.report_text) if options.report_text else None
    config = checkpoint.config
    positions = min(POSITIONS, config.max_position_embeddings)
    return read_evaluation_text(
        file, tokenizer, config.vocab_size, windows=WINDOWS, positions=positions
    )


def subject_of(checkpoint: Checkpoint, plan: Plan, adapters: Mapping[str, Adapter]) -> Subject:
    """With the adapters as their files hold them; merged they have none. Raises EdgeLoraError."""
    wide = plan.format == "float" or plan.flavor == "ort" or plan.mode == "merge"
    dtype: Dtype = "float32" if wide else "float16"
    stored = {
        name: as_stored(bound(adapter, checkpoint), name=name, dtype=dtype)
        for name, adapter in adapters.items()
    }
    return Subject(checkpoint, plan, adapters, stored)


def measure_choices(subject: Subject, text: EvaluationText, progress: Progress) -> Evaluation:
    """Every variant, each weight rounded for itself; nothing is written."""
    return evaluate(Walk(subject, text, subject.variants(), progress=progress))


def unreported(subject: Subject, measured: Evaluation | None) -> tuple[str, ...]:
    """The warnings of an export without a report; measured: for its choices, if any was open."""
    if measured is not None:
        return _warnings(measured, subject.exported())
    plan = subject.plan
    if plan.mode != "merge" or plan.format == "float":
        return ()
    return tuple(
        UNMEASURED.format(name)
        for name, adapter in subject.adapters.items()
        if any(branch.changes_weight for branch in adapter.branches.values())
    )


def write_up(
    subject: Subject, text: EvaluationText, stored: StoredWeights, progress: Progress
) -> Report:
    """Measures every variant, those that the bundle holds with its own weights."""
    exported = subject.exported()
    evaluation = evaluate(Walk(subject, text, subject.variants(), stored, exported, progress))
    return _report(subject, evaluation, _sizes(subject), _warnings(evaluation, exported))


def with_adapter(
    path: Path,
    subject: Subject,
    text: EvaluationText,
    stored: StoredWeights,
    left_out: Sequence[str] = (),
) -> Report:
    """The report at `path` with the one adapter of the subject, or with it anew; left_out: others
    of the bundle, which it tells nothing of.

    Raises EdgeLoraError unless it was measured on that text.
    """
    known, sizes, warnings = read_report(path)
    _check_text(path, known.text, text)
    walk = Walk(subject, text, subject.variants(), stored, subject.exported())
    evaluation = _joined(known, evaluate(walk), *subject.adapters)
    return _report(subject, evaluation, {**sizes, **_sizes(subject)}, warnings, left_out)


def without_adapters(path: Path, subject: Subject, left_out: Sequence[str]) -> Report:
    """The report at `path`, which now tells nothing of these adapters and says so.

    Raises EdgeLoraError.
    """
    known, sizes, warnings = read_report(path)
    results = tuple(each for each in known.results if each.variant.adapter not in left_out)
    effects, unapplied = (
        {name: score for name, score in scores.items() if name not in left_out}
        for scores in (known.effects, known.unapplied)
    )
    evaluation = Evaluation(known.text, results, effects, unapplied)
    return _report(subject, evaluation, sizes, warnings, left_out)


def _check_text(path: Path, known: TextDescription, text: EvaluationText) -> None:
    if known != text.description:
        raise EdgeLoraError(
            f"{path}: was measured on the text {known.name}, not on {text.name}: "
            "give that file with --report-text"
        )


def _joined(known: Evaluation, new: Evaluation, adapter: str) -> Evaluation:
    """All of the one, and the adapter of the other."""
    others = [each for each in known.results if each.variant.adapter != adapter]
    own = [each for each in new.results if each.variant.adapter == adapter]
    effects, unapplied = ({**known.effects, **new.effects}, {**known.unapplied, **new.unapplied})
    return Evaluation(known.text, (*others, *own), effects, unapplied)


def _report(
    subject: Subject,
    evaluation: Evaluation,
    sizes: Bytes,
    warnings: tuple[str, ...],
    left_out: Sequence[str] = (),
) -> Report:
    plan = subject.plan
    title = f"{subject.checkpoint.name}, {plan.format}"
    said = (evaluation, sizes, warnings, left_out)
    page = report_html(*said, title=title, summary=_summary(plan))
    held = [each for each in evaluation.results if each.exported]
    mean_kl = {each.variant.adapter or "": each.score.mean_kl for each in held}
    return Report(report_json(*said), page, mean_kl, warnings)


def _warnings(evaluation: Evaluation, exported: Iterable[Variant]) -> tuple[str, ...]:
    """What must not be shipped unseen."""
    lost = [each for each in exported if evaluation.lost_by_merging(each)]
    return tuple(_lost(evaluation, each) for each in sorted(lost, key=str))


def _lost(evaluation: Evaluation, variant: Variant) -> str:
    merged, side = (evaluation.result(each) for each in (variant, replace(variant, kind="side")))
    assert merged and side and variant.adapter
    kept = merged.mean_correlation
    delta = "" if kept is None else f"its delta correlates {kept:.2f} with the one trained;"
    without = evaluation.unapplied[variant.adapter].mean_kl
    scores = (merged.score.mean_kl, side.score.mean_kl, without)
    return LOST.format(variant.adapter, delta, *scores)


def _summary(plan: Plan) -> str:
    said = [f"mode {plan.mode}: {plan.reasons['mode']}"]
    if plan.merge_base:
        said.append(f"merge base {plan.merge_base}: {plan.reasons['merge_base']}")
    said.append(f"quality {plan.quality}: {plan.reasons['quality']}")
    return "; ".join(said) + "."


def _sizes(subject: Subject) -> Bytes:
    """Bytes of weights and of the adapter, as planned."""
    checkpoint, plan = subject.checkpoint, subject.plan
    sizes: dict[tuple[str | None, str], tuple[int, int]] = {}
    for name in (None, *subject.adapters):
        adapters = {} if name is None else {name: subject.adapters[name]}
        inventory = take_inventory(checkpoint, adapters)
        for kind, (mode, base) in _KINDS.items():
            as_kind = replace(plan, mode=mode, merge_base=base)
            found = plan_sizes(checkpoint.config, as_kind, inventory)
            sizes[name, kind] = (found.weights, found.adapters)
    return sizes
