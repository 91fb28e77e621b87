"""The README's tables of speed and quality, generated from the committed CSVs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.contestants import OURS, about_adapters
from benchmarks.figures import (
    Row,
    by_machine,
    latest,
    median,
    named_machine,
    of,
    spoken,
    stream_limits,
)
from benchmarks.losses import Loss, mean_kl, smallest_allowed

README = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- {}: ./dev bench table writes from here -->\n"
END = "<!-- to here -->\n"
# Rows of quality.csv, as the README names them.
FORMATS = {
    "float": "float",
    "int4 block 32": "int4, blocks of 32 (default)",
    "int4 block 32 zero points": "int4, blocks of 32, zero points",
    "int4 block 64": "int4, blocks of 64",
    "int4 block 128": "int4, blocks of 128",
    "nf4": "nf4, double-quantized",
    "int4 block 32, int4 head": "int4, blocks of 32, embedding and head in int4 too",
    "balanced": "**int4, `--quality balanced`**, embedding and head too",
    "balanced, block 128": "int4, `--quality balanced --block-size 128`: the fastest",
    "best": "**int4, `--quality best`**: some linears in int8",
    "best, int8 embedding": "int4, `--quality best --embedding-format int8`",
}
HEAD = ["tokens/s", "MB", "KL", "rounds"]
ABOUT = len(HEAD)  # cells before the rates
LIMIT = "limit: median, best stream ÷ weights of {}"
MIN_DECODED = 16  # fewer new tokens say nothing of decode
QUALITY_MODEL, LLAMA_CPP = "smollm2-135m", "llama.cpp"  # of the losses beside quality.csv
NAMES = {"smollm2-135m": "SmolLM2-135M", "llama-1.07b": "Llama shape of 1.07B parameters"}


def inserted(text: str, name: str, generated: str) -> str:
    """The text with what was generated between the two marks of this name."""
    mark = BEGIN.format(name)
    head, begin, rest = text.partition(mark)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text has lost a mark: {mark.strip()} … {END.strip()}")
    return head + begin + "\n" + generated + "\n" + end + tail


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], rule: str = "---:") -> str:
    """A table. rule: how all columns but the first are aligned."""
    rows = [head, ["---", *[rule] * (len(head) - 1)], *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def quality(
    rows: Sequence[dict[str, str]], on_code: Sequence[dict[str, str]], losses: Sequence[Loss]
) -> str:
    """What each format loses: of the rows of quality.csv those that the README names, and the mean
    KL on another kind of text; of the losses on the same windows, llama.cpp's.
    """
    found, other = ({row["format"]: row for row in each} for each in (rows, on_code))
    lines = [
        [label, *_quality(found[name]), _mean_kl(other[name]) if name in other else ""]
        for name, label in FORMATS.items()
        if name in found
    ]
    lines += [
        [each.contestant, *_quality(asdict(each) | {"weight_megabytes": each.megabytes}), ""]
        for each in losses
        if each.model == QUALITY_MODEL and each.contestant.startswith(LLAMA_CPP)
    ]
    head = [
        "format",
        "mean KL",
        "99 % KL",
        "same top token",
        "perplexity",
        "weights",
        "mean KL on code",
    ]
    return markdown(head, lines)


def _quality(row: Mapping[str, str | float]) -> Iterator[str]:
    megabytes = float(row["weight_megabytes"])
    yield _mean_kl(row)
    yield f"{float(row['kl_99_percent']):.2f}"
    yield f"{100 * float(row['same_top_token']):.1f} %"
    yield f"{float(row['perplexity']):.2f}"
    yield f"{megabytes:.1f} MB" if megabytes else "–"


def _mean_kl(row: Mapping[str, str | float]) -> str:
    return f"{float(row['mean_kl']):.3f}"


def tables(rows: Sequence[Row], losses: list[Loss], threads: int) -> str:
    """One table for each machine and model, of what ran with so many threads."""
    groups = (group for mine in by_machine(rows).values() for group in latest(mine).values())
    return "\n".join(_table(group, losses) for group in groups if group[0].threads == threads)


def _table(rows: Sequence[Row], losses: list[Loss]) -> str:
    loads = sorted({(row.prompt_tokens, row.new_tokens) for row in rows})
    prompts = [prompt for prompt, _ in loads]
    decoded = sorted({prompt for prompt, new in loads if new >= MIN_DECODED})
    columns = [f"prefill {prompt}" for prompt in dict.fromkeys(prompts)]
    columns += [f"decode at {prompt}" for prompt in decoded]
    kl = mean_kl(losses, rows[0].model)
    names = dict.fromkeys(row.contestant for row in rows if not _in_pairs(row.contestant))
    lines = [
        [name, *_about(rows, name, kl), *_rates(rows, name, prompts, decoded)] for name in names
    ]
    lines = _best_in_bold(lines)
    smallest = smallest_allowed(rows, kl)
    most = [stream_limits(rows, smallest, prompt) for prompt in decoded]
    if any(most):
        cells = [", ".join(map(_number, both or ())) for both in most]
        blank = [""] * (ABOUT - 1 + len(set(prompts)))
        lines.append([LIMIT.format(smallest), *blank, *cells])
    return f"{_caption(rows)}\n\n{markdown([*HEAD, *columns], lines)}"


def _in_pairs(name: str) -> bool:
    """Ours with adapters, whose cost `paired` tells."""
    return name.startswith(OURS) and about_adapters(name)


def _about(rows: Sequence[Row], name: str, kl: dict[str, float]) -> Iterator[str]:
    size = median(row.weight_bytes for row in rows if row.contestant == name)
    yield "" if size is None else f"{size / 1e6:.0f}"
    yield f"{kl[name]:.3f}" if name in kl else ""
    yield _from_to(len(of(rows, name, row.prompt_tokens)) for row in rows if row.contestant == name)


def _from_to(counts: Iterable[int]) -> str:
    ordered = sorted(set(counts))
    return " to ".join(dict.fromkeys((f"{ordered[0]}", f"{ordered[-1]}")))


def _rates(
    rows: Sequence[Row], name: str, prompts: Sequence[int], decoded: Sequence[int]
) -> Iterator[str]:
    mine = [row for row in rows if row.contestant == name]
    for prompt in dict.fromkeys(prompts):
        yield _number(median(row.prefill for row in of(mine, name, prompt)))
    for prompt in decoded:
        yield _number(median(row.decode for row in of(mine, name, prompt)))


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _best_in_bold(lines: list[list[str]]) -> list[list[str]]:
    bold = [list(line) for line in lines]
    for column in range(ABOUT, len(lines[0])):
        best = max((float(line[column]) for line in lines if line[column]), default=None)
        for line in bold:
            if line[column] and float(line[column]) == best:
                line[column] = f"**{line[column]}**"
    return bold


def _caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    times = _from_to(len(of(rows, row.contestant, row.prompt_tokens)) for row in rows)
    threads = f"{first.threads} thread" + ("s" if first.threads > 1 else "")
    machine = spoken(named_machine(first.machine, first.isa))
    parts = [f"**{NAMES.get(first.model, first.model)}**, {threads} of {machine}"]
    streams = sorted(row.bandwidth for row in rows if row.bandwidth)
    if streams:
        middle = median(streams)
        parts += [f"streams of {streams[0]:.1f} to {streams[-1]:.1f} GB/s (median {middle:.1f})"]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    parts += [f"medians of {times} interleaved rounds", f"commit {commits}"]
    return ", ".join(parts) + _versions(rows)


def _versions(rows: Sequence[Row]) -> str:
    found = {f"{row.contestant.split()[0]} {row.version}" for row in rows if row.version}
    return f" ({', '.join(sorted(found))})" if found else ""
