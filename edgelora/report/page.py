"""report.html: one file, nothing loaded from elsewhere, no scripts."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from edgelora.evaluation import Evaluation, Score, VariantResult
from edgelora.report import plots
from edgelora.report.record import Bytes

WORST = 8  # linears that are named


@dataclass(frozen=True)
class Row:
    """Of the table."""

    exported: bool
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """The rows of the base, or of an adapter."""

    name: str
    rows: list[Row]


def report_html(
    evaluation: Evaluation,
    sizes: Bytes,
    warnings: tuple[str, ...],
    left_out: Sequence[str],
    *,
    title: str,
    summary: str,
) -> bytes:
    """The page, UTF-8. left_out: adapters of the bundle that were not measured."""
    text = evaluation.text
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_template())
    html = page.render(
        title=title,
        summary=summary,
        warnings=warnings,
        groups=_groups(evaluation, sizes),
        left_out=", ".join(left_out),
        text=f"{text.name}, {text.windows} windows of {text.positions} tokens, the second half "
        "scored",
        bars=plots.divergence_bars(evaluation),
        survival=_survival(evaluation),
        maps=_maps(evaluation),
    )
    return html.encode()


def _template() -> str:
    return (files("edgelora.report") / "page.html.jinja").read_text("utf-8")


def _groups(evaluation: Evaluation, sizes: Bytes) -> list[Group]:
    names: list[str | None] = [None, *evaluation.effects]
    return [Group(name or "base, no adapter", _rows(evaluation, name, sizes)) for name in names]


def _rows(evaluation: Evaluation, adapter: str | None, sizes: Bytes) -> list[Row]:
    rows = [
        _row(result, sizes) for result in evaluation.results if result.variant.adapter == adapter
    ]
    if adapter is not None:
        score = evaluation.unapplied[adapter]
        rows.append(Row(False, (plots.LABELS["none"], *_figures(score), "–", "–", "–")))
    return rows


def _row(result: VariantResult, sizes: Bytes) -> Row:
    variant = result.variant
    label = {"float": "float model"} | plots.LABELS
    name = label[variant.kind] if variant.adapter or variant.kind == "float" else "rounded"
    found = sizes.get((variant.adapter, variant.kind))
    size = f"{sum(found) / 1e6:.1f}" if found else "–"
    changed, kept = result.mean_changed, result.mean_correlation
    cells = (
        name,
        *_figures(result.score),
        "–" if changed is None else f"{changed:.1%}",
        "–" if kept is None else f"{kept:.2f}",
        size,
    )
    return Row(result.exported, cells)


def _figures(score: Score) -> tuple[str, ...]:
    return (
        f"{score.mean_kl:.4f}",
        f"{score.kl_99_percent:.3f}",
        f"{score.same_top_token:.1%}",
        f"{score.perplexity:.2f}",
    )


def _survival(evaluation: Evaluation) -> list[tuple[str, str]]:
    figures = [(name, plots.survival_lines(evaluation, name)) for name in evaluation.effects]
    return [(name, figure) for name, figure in figures if figure]


def _maps(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Of what the bundle holds: the base, or the merged weights."""
    shown = [
        each
        for each in evaluation.results
        if each.exported and (each.variant.adapter is None or each.variant.kind != "side")
    ]
    return [(_shown_name(each), plots.error_map(each), _worst(each)) for each in shown]


def _shown_name(result: VariantResult) -> str:
    return f"the merged {result.variant.adapter}" if result.variant.adapter else "the rounded base"


def _worst(result: VariantResult) -> str:
    """Those with the largest error, with it."""
    worst = [(target, error) for target, error in result.worst(WORST) if error]
    if not worst:
        return "Nowhere: its weights are those of the float model."
    return ", ".join(f"{target} {error:.1%}" for target, error in worst)
