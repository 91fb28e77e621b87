"""Rounds: every contestant once in each, in another order each time, so that a machine that slows
down slows all of them.
"""

import fnmatch
import itertools
import json
import platform
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import bandwidth
from benchmarks.contestants import Contestant, Load, about_adapters, contestants, output
from benchmarks.figures import Row, append, read
from benchmarks.folder import OURSELVES, Peers
from edgelora.device import read_cpuinfo

# One contestant that fails, or says what nobody understands, does not end the others' rounds.
FAILURES = (RuntimeError, ValueError, LookupError, OSError, subprocess.SubprocessError)
MAX_ADAPTER_PROMPT = 512  # longer prompts say nothing new of a side branch and take minutes


@dataclass(frozen=True)
class Setting:
    """One start of the benchmark: what stays the same in all of its rows."""

    run: str
    machine: str
    isa: str
    commit: str

    @staticmethod
    def here(run: str | None) -> "Setting":
        now = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
        return Setting(run or now, machine(), isa(), commit())


@dataclass(frozen=True)
class Turn:
    """One contestant with one load."""

    model: str
    contestant: Contestant
    load: Load


def turns(
    peers: Peers, models: Sequence[str], loads: Sequence[Load], patterns: Sequence[str]
) -> Iterator[Turn]:
    """One round. Only contestants whose files are there, and whose name fits a pattern."""
    for model in models:
        chosen = [each for each in contestants(peers, model) if each.ready and fits(each, patterns)]
        for load in loads:
            for contestant in chosen:
                if load.prompt_tokens <= MAX_ADAPTER_PROMPT or not about_adapters(contestant.name):
                    yield Turn(model, contestant, load)


def shuffled(round_of_turns: Sequence[Turn], number: int) -> Iterator[Turn]:
    """The contestants of a load in another order in each round: none always follows another."""
    order = random.Random(number)
    for _, group in itertools.groupby(round_of_turns, key=lambda turn: (turn.model, turn.load)):
        turns_of_load = list(group)
        order.shuffle(turns_of_load)
        yield from turns_of_load


def fits(contestant: Contestant, patterns: Sequence[str]) -> bool:
    name = contestant.name.lower()
    return not patterns or any(fnmatch.fnmatch(name, f"*{each.lower()}*") for each in patterns)


def measure(
    peers: Peers, round_of_turns: Sequence[Turn], rounds: int, setting: Setting, csv: Path
) -> list[str]:
    """Appends a row for each turn of each round. Returns what failed, a line each."""
    program, done = bandwidth.build(peers.root), rounds_of(csv, setting.run)
    versions, failures = {}, []
    for number in range(done, done + rounds):
        for turn in shuffled(round_of_turns, number):
            contestant, load = turn.contestant, turn.load
            about = f"round {number + 1} {turn.model} {contestant.name} {load}"
            try:
                if contestant.name not in versions:
                    versions[contestant.name] = contestant.version()
                streamed = bandwidth.streamed(program, contestant.weights[0], load.threads)
                prefill, decode = contestant.measure(load)
            except FAILURES as error:
                failures.append(f"{about}: {error}")
                click.echo(failures[-1], err=True)
                continue
            row = Row(
                setting.run, number, turn.model, contestant.name, versions[contestant.name],
                load.threads, load.prompt_tokens, load.new_tokens, prefill, decode,
                contestant.weight_bytes, streamed, setting.machine, setting.isa, setting.commit,
            )  # fmt: skip
            append(csv, row)
            click.echo(f"{about}: {prefill:.1f} {decode:.1f}, {streamed:.1f} GB/s", err=True)
    return failures


def rounds_of(csv: Path, run: str) -> int:
    """How many a run has that is gone on with: a number stands for one round."""
    found = [row.round for row in read(csv) if row.run == run] if csv.exists() else []
    return max(found, default=-1) + 1


def machine() -> str:
    """The CPU's name and the number of its cores."""
    cpu = read_cpuinfo()
    return f"{len(cpu.kinds)} × {cpu.name}" if cpu.kinds else platform.machine()


def isa() -> str:
    """What our runtime chooses here."""
    said = output([*OURSELVES, "devices", "detect", "--json"])
    return str(json.loads(said[said.index("{") :])["isa"])


def commit() -> str:
    """EdgeLoRA's, with a + if files differ from it."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=7"]
    return subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
