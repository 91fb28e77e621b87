"""What of the targets of speed is met: ARCHITECTURE's tables, generated from the committed CSVs.

One bundle stands for a model: of those that lose no more than llama.cpp's Q4_0 the one that
streams the fewest bytes for a token (which is fastest would change with the machine's mood).
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contestants import LOADED, MERGED, OURS, OURS_INT4, SMALLEST
from benchmarks.figures import (
    Row,
    by_machine,
    latest,
    of,
    ratio_in_turn,
    ratios_in_turn,
    spoken,
)
from benchmarks.folder import LLAMA_1B, SMOLLM2
from benchmarks.losses import Loss, mean_kl, smallest_allowed
from benchmarks.paired import UNLOADED
from benchmarks.table import markdown

ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
COUNTS = (2, 1)  # threads


@dataclass(frozen=True)
class Target:
    """A rate at a length of prompt, and how many times the best peer's it must be, by model."""

    what: str
    prompt_tokens: int
    least: dict[str, float]


TARGETS = (
    Target("decode", 128, {SMOLLM2: 2.0, LLAMA_1B: 1.3}),
    Target("decode", 2000, {SMOLLM2: 1.7, LLAMA_1B: 1.7}),
    Target("prefill", 128, {SMOLLM2: 1.5, LLAMA_1B: 1.5}),
    Target("prefill", 512, {SMOLLM2: 1.5, LLAMA_1B: 1.5}),
)
# Ours beside another of ours: (what, contestant, beside, least share of its rate)
PAIRS = (
    ("nf4 beside int4", f"{OURS} nf4", OURS_INT4, 0.95),
    ("merged beside int4: the same bytes, so all noise", MERGED, OURS_INT4, None),
    ("rank 16 beside merged", f"{OURS_INT4} + rank 16", MERGED, 0.95),
    ("rank 64 beside merged", f"{OURS_INT4} + rank 64", MERGED, 0.88),
    ("rank 16, balanced in blocks of 128", f"{SMALLEST} + rank 16", SMALLEST, 0.95),
    ("rank 64, balanced in blocks of 128", f"{SMALLEST} + rank 64", SMALLEST, 0.88),
    ("rank 16 beside the base of its bundle", f"{OURS_INT4} + rank 16", UNLOADED, 0.95),
    ("rank 64 beside the base of its bundle", f"{OURS_INT4} + rank 64", UNLOADED, 0.88),
    ("adapters loaded beside none, same bundle", LOADED, UNLOADED, None),
    ("adapters loaded beside a bundle without", LOADED, OURS_INT4, None),
)


def tables(rows: Sequence[Row], losses: list[Loss], in_turn: Sequence[Row]) -> str:
    """For each machine: beside the peers, then ours beside ours, of rows measured in turn
    (`paired`).
    """
    pairs = by_machine(in_turn)
    return "\n".join(
        f"**{spoken(machine)}**\n\n{_of_machine(mine, losses, pairs.get(machine, []))}"
        for machine, mine in by_machine(rows).items()
    )


def _of_machine(rows: Sequence[Row], losses: list[Loss], in_turn: Sequence[Row]) -> str:
    groups, pairs_of = latest(rows), latest(in_turn)
    models = list(dict.fromkeys(model for model, _ in groups))
    chosen = {
        model: smallest_allowed(
            [row for row in itertools.chain(*groups.values()) if row.model == model],
            mean_kl(losses, model),
        )
        for model in models
    }
    head = ["× the best peer", "target", *(f"{model}: {chosen[model]}" for model in models)]
    beside_peers = [[_named(target), _least(target, models), *(
        _verdict(_least_of(groups, model, chosen[model], target), target.least[model])
        for model in models)] for target in TARGETS]  # fmt: skip
    most = [groups.get((model, COUNTS[0]), []) for model in models]
    beside_stream = [_of_stream(*pair) for pair in zip(most, chosen.values(), strict=True)]
    beside_peers.insert(1, ["the same ÷ the stream just before", "", *beside_stream])
    settings = [(model, count) for model in models for count in COUNTS]
    named = [f"{model}, {count} thread{'s' if count > 1 else ''}" for model, count in settings]
    head_of_pairs = ["decode, prefill at 128; at 512", "target", *named]
    pairs = [[what, "" if least is None else f"≥ {least:.2f}", *(
        _pair(pairs_of.get(setting, []), ours, other, least) for setting in settings)]
        for what, ours, other, least in PAIRS]  # fmt: skip
    measured = [line for line in pairs if any(line[2:])]
    return f"{markdown(head, beside_peers, '---')}\n{markdown(head_of_pairs, measured, '---')}"


@dataclass(frozen=True)
class Least:
    """Of ours ÷ a peer's the least, each the median over the rounds that have both."""

    ratio: float
    peer: str
    rounds: int


def _least_of(
    groups: dict[tuple[str, int], list[Row]], model: str, ours: str, target: Target
) -> Iterator[Least | None]:
    """For each number of threads; None: not measured."""
    for threads in COUNTS:
        rows = groups.get((model, threads), [])
        peers = {row.contestant for row in rows if not row.contestant.startswith(OURS)}
        ratios = {
            peer: ratios_in_turn(rows, ours, peer, target.prompt_tokens, target.what)
            for peer in sorted(peers)
        }
        beside = [
            Least(statistics.median(each), peer, len(each)) for peer, each in ratios.items() if each
        ]
        yield min(beside, key=lambda each: each.ratio, default=None)


def _of_stream(rows: Sequence[Row], name: str) -> str:
    """Decode at 128 beside what the bandwidth measured just before would allow, round by round."""
    found = [
        row.decode * row.weight_bytes / (1e9 * row.bandwidth)
        for row in of(rows, name, 128)
        if row.bandwidth and row.weight_bytes
    ]
    return f"{statistics.median(found):.2f}" if found else ""


def _verdict(found: Iterator[Least | None], least: float) -> str:
    """Met if every number of threads that was measured meets it; the peer of the first."""
    first, *others = found
    known = [each for each in (first, *others) if each]
    if not known:
        return ""
    said = f"{first.ratio:.2f}" if first else "–"
    said += "".join(f" ({each.ratio:.2f})" for each in others if each)
    said += " met" if min(each.ratio for each in known) >= least else " missed"
    return f"{said}: {first.peer}, {first.rounds} rounds" if first else said


def _pair(rows: Sequence[Row], ours: str, other: str, least: float | None) -> str:
    found = [
        ratio_in_turn(rows, ours, other, prompt, what)
        for prompt in (128, 512)
        for what in ("decode", "prefill")
    ]
    ratios = [ratio for ratio in found if ratio]
    said = ", ".join(f"{ratio:.2f}" for ratio in ratios[:2])
    said += f"; {', '.join(f'{ratio:.2f}' for ratio in ratios[2:])}" if ratios[2:] else ""
    if least is None or not ratios:
        return said
    return f"{said} {'met' if min(ratios) >= least else 'missed'}"


def _named(target: Target) -> str:
    threads = f"{COUNTS[0]} threads ({COUNTS[1]})"
    return (
        f"{target.what} {'at ' if target.what == 'decode' else ''}{target.prompt_tokens}, {threads}"
    )


def _least(target: Target, models: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(f"{target.least[model]:.1f}" for model in models))
