"""The targets that are no token rates: load time, adapter switch, check of a fingerprint, resident
memory, library size.
"""

import atexit
import csv
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from benchmarks.contestants import output
from benchmarks.figures import named_machine, spoken
from benchmarks.folder import Peers
from benchmarks.rounds import commit, isa, machine
from benchmarks.table import markdown
from edgelora import load, native
from edgelora.errors import EdgeLoraError
from edgelora.manifest import read_manifest
from edgelora.model import Model, Session

CSV = Path(__file__).parent / "results" / "limits.csv"
ROOT = Path(__file__).parents[2]
BUNDLES = ("int4", "int4-128", "nf4")
LOADS = 5  # processes that load, each once
SWITCHES = 1000
CHECKS = 200  # of a fingerprint
BURSTS, STEPS = 200, 4  # switches between decode steps, and steps from one to the next
PROMPT_AND_NEW = ((128, 64), (1000, 24))  # contexts whose memory is measured
OVERHEAD = 60  # MB beside weights and kv_cache
LOADING = """
import sys, time, edgelora
started = time.perf_counter()
with edgelora.load(sys.argv[1]):
    print(1e3 * (time.perf_counter() - started))
"""


@dataclass(frozen=True)
class Limit:
    """One figure. MB: 10⁶ bytes. target: the most that it may be, None: it only explains others."""

    model: str
    what: str
    value: float
    unit: str
    target: float | None = None

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "missed" if self.value > self.target else "met"

    @property
    def line(self) -> str:
        """For the terminal."""
        line = f"{self.model} {self.what}: {self.value:.5g} {self.unit}".strip()
        return f"{line} (target {self.target:.5g}: {self.verdict})" if self.verdict else line


Measure = Callable[[], Iterable[Limit]]
COLUMNS = ["when", "machine", "isa", "commit", "versions", *(field.name for field in fields(Limit))]


def percentile(values: Iterable[float], percent: int) -> float:
    """The least of the values that at least so many percent of them do not exceed."""
    ordered = sorted(values)
    return ordered[-(-percent * len(ordered) // 100) - 1]


def memory(said: str) -> dict[str, int]:
    """Bytes by name: the lines of greedy --memory."""
    parts = [line.split() for line in said.splitlines()]
    units = {"B": 1, "kB": 1024}
    return {name.rstrip(":"): int(number) * units[unit] for name, number, unit in parts}


def measures(peers: Peers, models: Sequence[str], threads: int) -> Iterator[Measure]:
    """All that can be measured with the bundles that are there; each yields rows when called."""
    yield _library
    for model in models:
        for kind in BUNDLES:
            bundle = peers.model(model) / f"edgelora-{kind}"
            if bundle.is_dir():
                yield partial(_load, f"{model} {kind}", bundle)
                yield partial(_memory, f"{model} {kind}", bundle, threads)
        bundle = peers.model(model) / "edgelora-adapters"
        if bundle.is_dir():
            yield partial(_switch, f"{model} int4", bundle, threads)
            yield partial(fingerprint, f"{model} int4", bundle)


def append(path: Path, limits: Iterable[Limit]) -> None:
    """Adds lines that say when, where and of which commit."""
    new = not path.exists()
    here = {
        "when": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "machine": machine(),
        "isa": isa(),
        "commit": commit(),
        "versions": f"edgelora {version('edgelora')}, onnxruntime {version('onnxruntime')}",
    }
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for limit in limits:
            target = "" if limit.target is None else f"{limit.target:.6g}"
            writer.writerow(
                here | asdict(limit) | {"value": f"{limit.value:.5g}", "target": target}
            )


def read(path: Path = CSV) -> dict[str, list[Limit]]:
    """By machine the figures of its newest commit, the newest of each. The first rows, which do
    not say which machine they are of, are left out.
    """
    newest: dict[str, tuple[str, dict[tuple[str, str], Limit]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["isa"]:
                continue
            name, of_commit = named_machine(row["machine"], row["isa"]), row["commit"]
            if newest.get(name, ("",))[0] != of_commit:
                newest[name] = of_commit, {}
            limit = _limit(row)
            newest[name][1][limit.model, limit.what] = limit
    return {
        f"{spoken(name)}, commit {one}": [*found.values()] for name, (one, found) in newest.items()
    }


def _limit(row: Mapping[str, str]) -> Limit:
    target = float(row["target"]) if row["target"] else None
    return Limit(row["model"], row["what"], float(row["value"]), row["unit"], target)


def tables(found: Mapping[str, Sequence[Limit]]) -> str:
    """Of each machine what has a target, by bundle."""
    return "\n".join(f"**{machine}**\n\n{_table(mine)}" for machine, mine in found.items())


def _table(mine: Sequence[Limit]) -> str:
    with_target = [limit for limit in mine if limit.verdict]
    models = list(dict.fromkeys(limit.model for limit in with_target if limit.model))
    cells = {(limit.what, limit.model or models[0]): limit for limit in with_target}
    lines = [
        [what, f"{target:.4g} {unit}", *(_cell(cells.get((what, model))) for model in models)]
        for what, target, unit in dict.fromkeys((x.what, x.target, x.unit) for x in with_target)
    ]
    return markdown(["what", "target", *models], lines, "---")


def _cell(limit: Limit | None) -> str:
    return f"{limit.value:.3g} {limit.verdict}" if limit else ""


def _library() -> Iterator[Limit]:
    with tempfile.TemporaryDirectory() as folder:
        stripped = Path(folder) / "stripped.so"
        subprocess.run(["strip", "-o", stripped, native.library_path()], check=True)
        yield Limit("", "stripped library", stripped.stat().st_size / 1e6, "MB", 1.5)


def _load(name: str, bundle: Path) -> Iterator[Limit]:
    """Each process imports, then loads; one more before them warms the page cache."""
    command = [sys.executable, "-P", "-c", LOADING, bundle]
    times = [float(output(command)) for _ in range(1 + LOADS)][1:]
    yield Limit(name, "load", statistics.median(times), "ms", 100)


def _memory(name: str, bundle: Path, threads: int) -> Iterator[Limit]:
    for prompt, new in PROMPT_AND_NEW:
        start = [_greedy(), "--memory", bundle, native.onnxruntime_path(), "-"]
        found = memory(output([*start, threads, prompt, new]))
        needed = (found["weights"] + found["kv_cache"]) / 1e6
        about = f"context {prompt + new}"
        yield Limit(name, f"VmHWM beside weights and kv_cache, {about}",
                    found["VmHWM"] / 1e6 - needed, "MB", OVERHEAD)  # fmt: skip
        for kind in ("VmHWM", "VmRSS", "RssAnon", "RssFile"):
            yield Limit(name, f"{kind}, {about}", found[kind] / 1e6, "MB")


@cache
def _greedy() -> Path:
    """tests/native/greedy.c beside the library that this Python uses, compiled once."""
    folder = Path(tempfile.mkdtemp(prefix="edgelora-greedy-"))
    atexit.register(shutil.rmtree, folder)
    program, library = folder / "greedy", native.library_path()
    source, headers = ROOT / "tests" / "native" / "greedy.c", ROOT / "runtime" / "include"
    options = ["-O2", "-std=c11", f"-I{headers}", f"-Wl,-rpath,{library.parent}"]
    subprocess.run(["cc", *options, source, library, "-o", program], check=True)
    return program


def _switch(name: str, bundle: Path, threads: int) -> Iterator[Limit]:
    """Among loaded adapters: alone, one after the other; then between steps of decode."""
    with load(bundle, threads=threads) as model:
        for adapter in model.adapters:
            model.adapter_handle(adapter)
        names = [model.adapters[i % len(model.adapters)] for i in range(SWITCHES)]
        with model.session(adapter=names[-1]) as session:
            session.prefill(range(64))
            alone = [1e6 * _switched(session, adapter) for adapter in names]
            bursts = [_burst(session, adapter) for adapter in [*names[:4], *names[:BURSTS]]][4:]
    yield Limit(name, "switch, p99", percentile(alone, 99), "µs", 100)
    yield Limit(name, "switch, median", statistics.median(alone), "µs")
    between = [switch for switch, _ in bursts]
    yield Limit(name, "switch between steps, Python, p99", percentile(between, 99), "µs", 100)
    yield Limit(name, "switch between steps, Python, median", statistics.median(between), "µs")
    in_c = _switches_in_c(bundle, threads, sorted(set(names)))
    yield Limit(name, "switch between steps, C, p99", percentile(in_c, 99), "µs", 100)
    yield Limit(name, "switch between steps, C, median", statistics.median(in_c), "µs")
    rest = [statistics.median(steps[1:]) for _, steps in bursts]
    later = [steps[0] - middle for (_, steps), middle in zip(bursts, rest, strict=True)]
    yield Limit(name, "first step after a switch − median step", statistics.median(later), "µs")
    yield Limit(name, "median step", statistics.median(rest), "µs")


def _switches_in_c(bundle: Path, threads: int, adapters: Sequence[str]) -> list[float]:
    start = [_greedy(), "--switch", bundle, native.onnxruntime_path()]
    said = output([*start, threads, SWITCHES, *adapters])
    return [float(line) for line in said.split()]


def fingerprint(name: str, bundle: Path) -> Iterator[Limit]:
    """From the call to the refusal of an adapter of another base: mapping the file and reading its
    header are in it, its factors are not looked at.
    """
    with tempfile.TemporaryDirectory() as folder, load(bundle) as model:
        entry = read_manifest(bundle)["adapters"][model.adapters[0]]
        ours = read_manifest(bundle)["base"]["fingerprint"].encode()
        other = Path(folder) / "adapter.safetensors"
        theirs = ours[:-1] + (b"1" if ours.endswith(b"0") else b"0")
        other.write_bytes((bundle / entry["path"]).read_bytes().replace(ours, theirs, 1))
        times = [1e3 * _refused(model, other) for _ in range(CHECKS)]
    yield Limit(name, "fingerprint check, median", statistics.median(times), "ms", 1)
    yield Limit(name, "fingerprint check, p99", percentile(times, 99), "ms")


def _refused(model: Model, adapter: Path) -> float:
    started = time.perf_counter()
    try:
        model.load_adapter("other", adapter)
    except EdgeLoraError as error:
        seconds = time.perf_counter() - started
        if "made for the base" in str(error):
            return seconds
        raise
    raise RuntimeError(f"{adapter}: taken, though it is of another base")


def _burst(session: Session, adapter: str) -> tuple[float, list[float]]:
    """Microseconds of the switch and of each step after it."""
    return 1e6 * _switched(session, adapter), [1e6 * _step(session) for _ in range(STEPS)]


def _switched(session: Session, adapter: str) -> float:
    started = time.perf_counter()
    session.set_adapter(adapter, keep_cache=True)
    return time.perf_counter() - started


def _step(session: Session) -> float:
    started = time.perf_counter()
    session.decode(1, ignore_eos=True)
    return time.perf_counter() - started
