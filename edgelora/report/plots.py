"""The report's figures, as SVG to stand in the page."""

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from edgelora.evaluation import Evaluation, Kind, Score, Variant, VariantResult

COLORS = {"side": "#2a6f97", "merged": "#e09f3e", "merged_nf4": "#9e2a2b", "none": "#adb5bd"}
LABELS = {
    "side": "side branch",
    "merged": "merged into the float base",
    "merged_nf4": "merged into the nf4 base",
    "none": "adapter not applied",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def divergence_bars(evaluation: Evaluation) -> str:
    """Mean KL of the base and of each adapter in each variant, the 99th percentile as a whisker."""
    groups: list[str | None] = [None, *evaluation.effects]
    figure, axes = _figure(1.6 + 1.8 * len(groups), 3.4)
    for place, adapter in enumerate(groups):
        bars = [each for each in evaluation.results if _is_bar(each, adapter)]
        values: list[tuple[str, Score]] = [(each.variant.kind, each.score) for each in bars]
        if adapter is not None:
            values.append(("none", evaluation.unapplied[adapter]))
        for index, (kind, score) in enumerate(values):
            x = place + 0.19 * (index - (len(values) - 1) / 2)
            axes.bar(x, score.mean_kl, 0.17, color=COLORS[kind])
            axes.text(x, score.mean_kl, f"{score.mean_kl:.3f}", ha="center", va="bottom", size=7)
    axes.set_xticks(range(len(groups)), [name or "base alone" for name in groups])
    axes.set_ylabel("mean KL to the float model, nats")
    handles = [matplotlib.patches.Patch(color=COLORS[kind], label=LABELS[kind]) for kind in COLORS]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return _svg(figure)


def survival_lines(evaluation: Evaluation, adapter: str) -> str:
    """Correlation of the merged delta with the wanted one, by layer; "" if nothing was merged."""
    figure, axes = _figure(7.0, 2.6)
    kinds: tuple[Kind, ...] = ("merged", "merged_nf4")
    for kind in kinds:
        result = evaluation.result(Variant(adapter, kind))
        points = _by_layer(result) if result else {}
        if points:
            axes.plot(list(points), list(points.values()), "o-", color=COLORS[kind], ms=3,
                      label=LABELS[kind])  # fmt: skip
    if not axes.lines:
        return ""
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("layer")
    axes.set_ylabel("delta kept (correlation)")
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return _svg(figure)


def error_map(result: VariantResult) -> str:
    """Relative error of each linear's output, layers × linears; "" where there is none."""
    found = {target: each.error for target, each in result.linears.items() if LAYER.match(target)}
    if not any(found.values()):
        return ""
    layers = 1 + max(int(_layer(target)[0]) for target in found)
    grid = np.full((len(LINEARS), layers), np.nan)
    for target, error in found.items():
        layer, name = _layer(target)
        grid[LINEARS.index(name), int(layer)] = error
    figure, axes = _figure(7.6, 2.4)
    mesh = axes.pcolormesh(grid, cmap="YlOrRd", vmin=0)
    axes.set_yticks(np.arange(len(LINEARS)) + 0.5, LINEARS, size=8)
    axes.set_xlabel("layer")
    axes.invert_yaxis()
    figure.colorbar(mesh, ax=axes, label="relative error of the output")
    return _svg(figure)


def _is_bar(result: VariantResult, adapter: str | None) -> bool:
    return result.variant.adapter == adapter and result.variant.kind != "float"


def _layer(target: str) -> tuple[str, ...]:
    match = LAYER.match(target)
    assert match is not None
    return match.groups()


def _by_layer(result: VariantResult) -> dict[int, float]:
    """Layer → mean correlation over its targets."""
    found: dict[int, list[float]] = {}
    for target, each in result.linears.items():
        if each.survival is not None and LAYER.match(target):
            found.setdefault(int(_layer(target)[0]), []).append(each.survival.correlation)
    return {layer: _mean(values) for layer, values in sorted(found.items())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The same figure gives the same text; letters stay letters."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "edgelora", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
