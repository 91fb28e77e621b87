"""The figures of the CSV, as SVG: bars against the bandwidth's limit, speed over the length of the
prompt, what a side branch costs over its rank.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contestants import MERGED, OURS, OURS_INT4, about_adapters
from benchmarks.figures import (
    Row,
    by_machine,
    latest,
    machine_folder,
    median,
    named_machine,
    of,
    ratio_in_turn,
    spoken,
    stream_limits,
)

OUR_COLOR, PEER_COLOR = "#1b6ca8", "#9aa5b1"
STYLES = ("-", "--", ":", "-.")

matplotlib.use("svg")
# The same rows give the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "edgelora", "svg.fonttype": "none", "font.size": 9})


def draw(rows: Sequence[Row], folder: Path, in_turn: Sequence[Row] = ()) -> Iterator[Path]:
    """Writes every figure that the rows suffice for, a folder for each machine. in_turn: ours
    beside ours (`paired`), for what a side branch costs.
    """
    pairs_of = by_machine(in_turn)
    for machine, mine in by_machine(rows).items():
        yield from _of_machine(mine, folder / machine_folder(machine), pairs_of.get(machine, ()))


def _of_machine(rows: Sequence[Row], folder: Path, in_turn: Sequence[Row]) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = latest(in_turn)
    for (model, threads), group in latest(rows).items():
        name = f"{model}-{threads}t"
        yield _save(_bars(group), folder / f"bars-{name}.svg")
        if len({row.prompt_tokens for row in group}) > 1:
            yield _save(_over_context(group), folder / f"context-{name}.svg")
        ours = pairs.get((model, threads), group)
        if any(rank_of(row.contestant) for row in (*group, *ours)):
            yield _save(_over_rank(group, ours), folder / f"rank-{name}.svg")


def rank_of(contestant: str) -> int | None:
    """16 for "EdgeLoRA int4 + rank 16"."""
    found = re.fullmatch(r".* \+ rank (\d+)", contestant)
    return int(found[1]) if found else None


def _bars(rows: Sequence[Row]) -> Figure:
    """Prefill and decode of the shortest prompt; a line across each bar of decode is its limit."""
    prompt = min(row.prompt_tokens for row in rows)
    names = list(dict.fromkeys(row.contestant for row in rows))[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.28 * len(names)), sharey=True)
    for axis, what in zip(axes, ("prefill", "decode"), strict=True):
        values = [median(getattr(r, what) for r in of(rows, name, prompt)) or 0 for name in names]
        colors = [OUR_COLOR if name.startswith(OURS) else PEER_COLOR for name in names]
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt="%.0f" if max(values) >= 100 else "%.1f", padding=3)
        axis.margins(x=0.15)  # room for the labels
        axis.set_title(f"{what}, {prompt} tokens of prompt")
        axis.set_xlabel("tokens a second")
    _mark_limits(axes[1], rows, names, prompt)
    return _titled(figure, rows)


def _mark_limits(axis: Axes, rows: Sequence[Row], names: Sequence[str], prompt: int) -> None:
    found = [stream_limits(rows, name, prompt) for name in names]
    known = [(i, both[1]) for i, both in enumerate(found) if both]
    for i, most in known:
        axis.plot([most, most], [i - 0.4, i + 0.4], color="black", linewidth=1.5)
    if known:
        axis.set_xlabel("tokens a second; line: best stream ÷ weights")
        axis.set_xlim(right=1.1 * max(axis.get_xlim()[1], *(most for _, most in known)))


def _over_context(rows: Sequence[Row]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    prompts = sorted({row.prompt_tokens for row in rows})
    for axis, what in zip(axes, ("prefill", "decode"), strict=True):
        names = [n for n in dict.fromkeys(r.contestant for r in rows) if not about_adapters(n)]
        for number, name in enumerate(names):
            medians = {p: median(getattr(r, what) for r in of(rows, name, p)) for p in prompts}
            points = [(prompt, rate) for prompt, rate in medians.items() if rate]
            style = STYLES[number // 4 % len(STYLES)]
            axis.plot(*zip(*points, strict=True), style, marker=".", label=name)
        axis.set_title(f"{what} over the length of the prompt")
        axis.set_xlabel("tokens of prompt")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    axes[0].set_ylabel("tokens a second")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7
    )
    return _titled(figure, rows)


def _over_rank(rows: Sequence[Row], ours: Sequence[Row]) -> Figure:
    """Per cent slower than ours with merged weights, or than a peer's base by the same tool."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
    prompt = min(row.prompt_tokens for row in rows)
    for axis, what in zip(axes, ("prefill", "decode"), strict=True):
        for base in dict.fromkeys(
            row.contestant.partition(" + ")[0] for row in (*ours, *rows) if rank_of(row.contestant)
        ):
            group = ours if base.startswith(OURS) else rows
            points = sorted(_costs(group, base, prompt, what))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=base)
        axis.set_title(f"side branch: {what}, {prompt} tokens of prompt")
        axis.set_xlabel("rank, on all linears")
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0].set_ylabel("% slower than without a side branch")
    axes[0].legend(fontsize=8)
    return _titled(figure, rows)


def _costs(rows: Sequence[Row], base: str, prompt: int, what: str) -> Iterator[tuple[int, float]]:
    wanted = MERGED if base == OURS_INT4 else f"{base} + rank 0"
    plain = wanted if of(rows, wanted, prompt) else base
    for name in dict.fromkeys(row.contestant for row in rows):
        rank = rank_of(name)
        if rank and name.partition(" + ")[0] == base:
            ratio = ratio_in_turn(rows, plain, name, prompt, what)
            if ratio:
                yield rank, 100 * (ratio - 1)


def _titled(figure: Figure, rows: Sequence[Row]) -> Figure:
    first = rows[0]
    bandwidth = median(row.bandwidth for row in rows)
    streamed = f", {bandwidth:.1f} GB/s" if bandwidth else ""
    machine = spoken(named_machine(first.machine, first.isa))
    about = f"{machine}{streamed}, commit {first.commit}"
    figure.suptitle(f"{first.model}, threads: {first.threads} ({about})", fontsize=9)
    figure.set_layout_engine("constrained")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
