"""The CSV of the speed figures: one line for every contestant, load and round."""

import csv
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.contestants import place

GENERATIONS = {
    "2 × AMD EPYC, avx2": "Zen 3",
    "2 × AMD EPYC, avx512_vnni": "Zen 4",
    "2 × Intel(R) Xeon(R) Processor @ 2.80GHz, avx512_vnni": "Ice Lake",
}
SPEED = Path(__file__).parent / "results" / "speed.csv"


@dataclass(frozen=True)
class Row:
    """prefill, decode: tokens a second. weight_bytes: of the files that decode streams.
    bandwidth: GB/s that a plain read of those files reached just before. isa: what our runtime
    chooses on this machine. run: one start of the benchmark. None: not measured.
    """

    run: str
    round: int
    model: str
    contestant: str
    version: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float
    weight_bytes: int | None
    bandwidth: float | None
    machine: str
    isa: str
    commit: str


NAMES = [field.name for field in fields(Row)]


def append(path: Path, row: Row) -> None:
    """Adds one line at once, so that a run that is stopped keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, NAMES, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({name: _written(value) for name, value in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """All lines. Raises ValueError if the columns are others, or a round has a contestant twice."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != NAMES:
            raise ValueError(f"{path}: columns {reader.fieldnames}, expected {NAMES}")
        rows = [_row(line) for line in reader]
    seen = Counter(
        (row.run, row.round, row.model, row.contestant, row.threads, row.prompt_tokens)
        for row in rows
    )
    if twice := [key for key, count in seen.items() if count > 1]:
        raise ValueError(f"{path}: {len(twice)} rounds have a contestant twice: {twice[0]}")
    return rows


def read_quality(name: str = "quality.csv") -> list[dict[str, str]]:
    """quality.csv's rows, or those of quality-code.csv: of each format that of the first ISA."""
    with SPEED.with_name(name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return list({row["format"]: row for row in reversed(rows)}.values())


def by_machine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each machine, by what tells it from others, in the file's order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(named_machine(row.machine, row.isa), []).append(row)
    return groups


def named_machine(machine: str, isa: str) -> str:
    """Its name, and what ours chooses there: AMD's hosts call four generations "AMD EPYC"."""
    return ", ".join(part for part in (machine, isa) if part)


def spoken(machine: str) -> str:
    """The same for people: with the generation, where the name leaves it open."""
    name, comma, isa = machine.partition(", ")
    generation = GENERATIONS.get(machine)
    return f"{name} ({generation}){comma}{isa}" if generation else machine


def machine_folder(machine: str) -> str:
    """A name for its folder: 2-intel-xeon-2-80ghz-avx512-vnni."""
    bare = re.sub(r"\(\w+\)|Processor", "", machine)
    return "-".join(re.findall(r"[a-z0-9]+", bare.lower()))


def latest(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """(model, threads) → the rows of the last run in the file that measured them, by contestant."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        group = groups.setdefault((row.model, row.threads), [])
        if group and group[-1].run != row.run:
            group.clear()
        group.append(row)
    return {
        key: sorted(group, key=lambda row: place(row.contestant)) for key, group in groups.items()
    }


def ratios_in_turn(
    rows: Sequence[Row], ours: str, other: str, prompt_tokens: int, what: str
) -> list[float]:
    """ours ÷ other, of "decode" or "prefill", of each round that has both."""
    mine, beside = ({r.round: r for r in of(rows, name, prompt_tokens)} for name in (ours, other))
    return [
        getattr(mine[number], what) / getattr(beside[number], what)
        for number in mine.keys() & beside.keys()
    ]


def ratio_in_turn(
    rows: Sequence[Row], ours: str, other: str, prompt_tokens: int, what: str
) -> float | None:
    """The median of these."""
    return median(ratios_in_turn(rows, ours, other, prompt_tokens, what))


def median(values: Iterable[float | None]) -> float | None:
    """Of those that were measured."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def of(rows: Sequence[Row], contestant: str, prompt_tokens: int) -> list[Row]:
    """The rounds of one contestant with one length of prompt."""
    return [
        row for row in rows if row.contestant == contestant and row.prompt_tokens == prompt_tokens
    ]


def stream_limits(
    rows: Sequence[Row], contestant: str, prompt_tokens: int
) -> tuple[float, float] | None:
    """Tokens a second at which its weights alone take all of the bandwidth: the median of what all
    rounds saw, and the best, since on a shared machine one stream says little.
    """
    found = (row.bandwidth for row in rows if row.prompt_tokens == prompt_tokens)
    streams = [stream for stream in found if stream]
    size = median(row.weight_bytes for row in of(rows, contestant, prompt_tokens))
    if not streams or not size:
        return None
    return 1e9 * statistics.median(streams) / size, 1e9 * max(streams) / size


def _written(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _row(line: dict[str, str]) -> Row:
    return Row(
        run=line["run"],
        round=int(line["round"]),
        model=line["model"],
        contestant=line["contestant"],
        version=line["version"],
        threads=int(line["threads"]),
        prompt_tokens=int(line["prompt_tokens"]),
        new_tokens=int(line["new_tokens"]),
        prefill=float(line["prefill"]),
        decode=float(line["decode"]),
        weight_bytes=int(line["weight_bytes"]) if line["weight_bytes"] else None,
        bandwidth=float(line["bandwidth"]) if line["bandwidth"] else None,
        machine=line["machine"],
        isa=line["isa"],
        commit=line["commit"],
    )
