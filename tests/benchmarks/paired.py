"""EdgeLoRA beside itself, in one process and in turn: the bandwidth of a shared machine swings by a
factor of two within minutes, and so do ratios of what was measured minutes apart.
"""

import itertools
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from benchmarks.contestants import (
    LOADED,
    OURS,
    OURS_INT4,
    SMALLEST,
    Load,
    about_adapters,
    contestants,
)
from benchmarks.figures import SPEED, Row
from benchmarks.folder import Peers
from benchmarks.rounds import Setting
from edgelora import load
from edgelora.model import Model, Session

CSV = SPEED.with_name("paired.csv")
PLAIN = (OURS_INT4, f"{OURS} nf4", SMALLEST)
UNLOADED = f"{OURS_INT4}, adapters not loaded"  # of the bundle of LOADED, opened once more
Side = tuple[Path, str | None]  # bundle, active adapter


def sides(peers: Peers, model: str) -> dict[str, Side]:
    """By name, the contestants that are about adapters or nf4, and what they stand beside; those
    whose bundle is there. Its adapters are loaded as soon as one side has one.
    """
    found = {}
    for each in contestants(peers, model):
        bundle, *adapter = (path.parent for path in each.weights)
        if each.name in PLAIN or (each.name.startswith(OURS) and about_adapters(each.name)):
            found[each.name] = bundle, adapter[0].name if adapter else None
    if LOADED in found:
        found[UNLOADED] = found[LOADED]
    return {name: side for name, side in found.items() if side[0].is_dir()}


def measure(peers: Peers, model: str, each: Load, rounds: int, setting: Setting) -> Iterator[Row]:
    """A row for each side in each round, in another order each time, after a round of warm-up."""
    chosen = sides(peers, model)
    with ExitStack() as stack:
        sessions = _opened(stack, chosen, each.threads)
        order, names = random.Random(0), list(sessions)
        for number in range(-1, rounds):
            order.shuffle(names)
            for name in names:
                prefill, decode = _rates(sessions[name], each)
                row = Row(
                    setting.run, number, model, name, version("edgelora"), each.threads,
                    each.prompt_tokens, each.new_tokens, prefill, decode, None, None,
                    setting.machine, setting.isa, setting.commit,
                )  # fmt: skip
                if number >= 0:
                    yield row


def _opened(stack: ExitStack, chosen: dict[str, Side], threads: int) -> dict[str, Session]:
    models: dict[tuple[Path, bool], Model] = {}
    sessions = {}
    for name, (bundle, adapter) in chosen.items():
        key = bundle, name == UNLOADED
        if key not in models:
            models[key] = stack.enter_context(load(bundle, threads=threads))
        sessions[name] = stack.enter_context(models[key].session(adapter=adapter))
    return sessions


def _rates(session: Session, each: Load) -> tuple[float, float]:
    """Tokens a second: prefill, decode."""
    session.rewind(0)
    moments = [time.perf_counter()]
    session.prefill([7 * i % 1000 for i in range(each.prompt_tokens)])
    moments.append(time.perf_counter())
    session.decode(1, ignore_eos=True)
    moments.append(time.perf_counter())
    session.decode(each.new_tokens, ignore_eos=True)
    moments.append(time.perf_counter())
    prefill, _, decode = (end - begin for begin, end in itertools.pairwise(moments))
    return each.prompt_tokens / prefill, each.new_tokens / decode
