"""A roofline of the kernels, from what kernels_bench says: the rate of each over the multiply-adds
that it does for a byte of weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "edgelora", "svg.fonttype": "none", "font.size": 9})

# Bytes of weights for one of their blocks' values, without the scales that the block shares.
CODE_BYTES = {"int4": 0.5, "int4+zp": 0.5, "int4+off": 0.5, "int8": 1.0, "nf4": 0.5}
SCALE_BYTES = {"int4": 2.0, "int4+zp": 2.5, "int4+off": 4.0, "int8": 2.0, "nf4": 2.0}
MARKERS = {"int4": "o", "int4+zp": "s", "int4+off": "^", "int8": "D", "nf4": "v"}


@dataclass(frozen=True)
class Point:
    """One kernel with one shape and number of threads. bandwidth: GB/s, of decode only."""

    isa: str
    kind: str
    threads: int
    macs_per_byte: float
    rate: float  # GMAC/s
    bandwidth: float | None


def points(said: str) -> Iterator[Point]:
    """Everything that kernels_bench measured."""
    line_start = r"(decode|prefill) +(\S+) +(\S+) +b(\d+) +\S+(?: +M=(\d+))?"
    for line in said.splitlines():
        found = re.match(line_start, line)
        if found is None or found[3] not in CODE_BYTES:
            continue
        _, isa, kind, block, rows = found.groups()
        macs = int(rows or 1) / (CODE_BYTES[kind] + SCALE_BYTES[kind] / int(block))
        for threads, rate, plain in re.findall(r"(\d)t +([\d.]+) GB/s of +([\d.]+)", line):
            yield Point(isa, kind, int(threads), macs, float(rate) * macs, float(plain))
        for threads, rate in re.findall(r"(\d)t +([\d.]+) GMAC/s", line):
            yield Point(isa, kind, int(threads), macs, float(rate), None)


def draw_roofline(said: str, path: Path, peak: float | None) -> Path:
    """One panel for each number of threads. Raises ValueError if nothing was measured."""
    found = list(points(said))
    if not found:
        raise ValueError("no line of kernels_bench in the input")
    counts = sorted({point.threads for point in found})
    figure, axes = plt.subplots(1, len(counts), figsize=(5 * len(counts), 4), squeeze=False)
    for axis, threads in zip(axes[0], counts, strict=True):
        mine = [point for point in found if point.threads == threads]
        for kind, isa in dict.fromkeys((point.kind, point.isa) for point in mine):
            chosen = [point for point in mine if (point.kind, point.isa) == (kind, isa)]
            values = ([p.macs_per_byte for p in chosen], [p.rate for p in chosen])
            axis.plot(*values, MARKERS[kind], label=f"{kind} {isa}", alpha=0.7)
        streamed = max((point.bandwidth or 0 for point in mine), default=0)
        ends = [min(p.macs_per_byte for p in mine) / 2, max(p.macs_per_byte for p in mine) * 2]
        top = peak * threads / max(counts) if peak else None
        roof = [min(streamed * end, top or streamed * end) for end in _edges(ends, streamed, top)]
        if streamed:
            label = f"{streamed:.0f} GB/s" + (f", {top:.0f} GMAC/s" if top else "")
            axis.plot(_edges(ends, streamed, top), roof, "k-", linewidth=1, label=label)
        axis.set(xscale="log", yscale="log", xlabel="multiply-adds for a byte of weights")
        axis.set(ylabel="GMAC/s", title=f"threads: {threads}")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _edges(ends: list[float], streamed: float, top: float | None) -> list[float]:
    """Where the roof begins, bends and ends."""
    bend = [top / streamed] if top and streamed and ends[0] < top / streamed < ends[1] else []
    return [ends[0], *bend, ends[1]]
