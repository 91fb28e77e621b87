"""The README's tables of speed, generated from the committed CSV."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.contestants import OURS_INT4
from benchmarks.figures import Row, latest, median, of

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- ./dev bench table writes from here -->\n"
END = "<!-- to here -->\n"
MIN_DECODED = 16  # fewer new tokens say nothing of decode
NAMES = {"smollm2-135m": "SmolLM2-135M", "llama-1.07b": "Llama shape of 1.07B parameters"}


def inserted(text: str, rows: Sequence[Row]) -> str:
    """The text with the tables between the two marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has lost a mark: {BEGIN.strip()} … {END.strip()}")
    return head + begin + "\n" + tables(rows) + "\n" + end + tail


def tables(rows: Sequence[Row]) -> str:
    """One table for each model and number of threads."""
    return "\n".join(_table(group) for group in latest(rows).values())


def _table(rows: Sequence[Row]) -> str:
    loads = sorted({(row.prompt_tokens, row.new_tokens) for row in rows})
    prompts = [prompt for prompt, _ in loads]
    decoded = sorted({prompt for prompt, new in loads if new >= MIN_DECODED})
    columns = [f"prefill {prompt}" for prompt in dict.fromkeys(prompts)]
    columns += [f"decode at {prompt}" for prompt in decoded]
    lines = [[name, *_cells(rows, name, prompts, decoded)] for name in _contestants(rows)]
    lines = _best_in_bold(lines)
    limits = [_limit(of(rows, OURS_INT4, prompt)) for prompt in decoded]
    if any(limits):
        lines.append(
            [
                "limit: bandwidth ÷ weights of EdgeLoRA int4",
                "",
                *([""] * len(set(prompts))),
                *limits,
            ]
        )
    head = ["tokens/s", "MB", *columns]
    text = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1)), *map(_line, lines)]
    return "\n".join([_caption(rows), "", *text, ""])


def _contestants(rows: Sequence[Row]) -> Iterator[str]:
    yield from dict.fromkeys(row.contestant for row in rows)


def _cells(
    rows: Sequence[Row], name: str, prompts: Sequence[int], decoded: Sequence[int]
) -> Iterator[str]:
    mine = [row for row in rows if row.contestant == name]
    size = median(row.weight_bytes for row in mine)
    yield "" if size is None else f"{size / 1e6:.0f}"
    for prompt in dict.fromkeys(prompts):
        yield _number(median(row.prefill for row in of(mine, name, prompt)))
    for prompt in decoded:
        yield _number(median(row.decode for row in of(mine, name, prompt)))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _limit(rows: Sequence[Row]) -> str:
    return _number(median(row.limit for row in rows))


def _best_in_bold(lines: list[list[str]]) -> list[list[str]]:
    bold = [list(line) for line in lines]
    for column in range(2, len(lines[0])):
        best = max((float(line[column]) for line in lines if line[column]), default=None)
        for line in bold:
            if line[column] and float(line[column]) == best:
                line[column] = f"**{line[column]}**"
    return bold


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    rounds = sorted({len(of(rows, row.contestant, row.prompt_tokens)) for row in rows})
    times = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    threads = f"{first.threads} thread" + ("s" if first.threads > 1 else "")
    parts = [f"**{NAMES.get(first.model, first.model)}**, {threads} of {first.machine}"]
    parts += [first.isa] if first.isa else []
    bandwidth = median(row.bandwidth for row in rows)
    parts += [f"{bandwidth:.1f} GB/s streamed"] if bandwidth else []
    parts += [f"medians of {times} interleaved rounds", f"commit {first.commit}"]
    return ", ".join(parts) + _versions(rows)


def _versions(rows: Sequence[Row]) -> str:
    found = {f"{row.contestant.split()[0]} {row.version}" for row in rows if row.version}
    return f" ({', '.join(sorted(found))})" if found else ""
