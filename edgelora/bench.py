"""Speed and memory of one bundle on this machine."""

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelora.device import read_cpuinfo
from edgelora.errors import EdgeLoraError
from edgelora.manifest import read_manifest
from edgelora.model import Adapter, Model, Session, load

SWITCHES = 1000
WARM_UP = 512  # tokens of the prompt that runs first, at most


@dataclass(frozen=True)
class BenchResult:
    """Medians over the repeats. Rates in tokens a second, `_ms` milliseconds, `_us` microseconds,
    `_mb` 10⁶ bytes.

    switch_us: from the call that changes a session's adapter to the handle being in place for the
    next step (kv_cache kept); None without adapters. resident_mb: the process's peak (VmHWM) up to
    the end of decode, None where the system does not tell.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_ms: float
    load_ms: float
    switch_us: float | None
    resident_mb: float | None
    weight_mb: float
    threads: int
    isa: str
    machine: str
    prompt_tokens: int
    new_tokens: int
    adapter: Adapter


def bench(
    bundle: Path,
    *,
    adapter: Adapter = None,
    loaded: Sequence[str] = (),
    threads: int = 0,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 5,
) -> BenchResult:
    """Loads the bundle, then measures prefill and decode `repeats` times after one warm-up.

    loaded: adapters that are in memory meanwhile, but not active. Raises EdgeLoraError if prompt
    and new tokens do not fit in the context.
    """
    started = time.perf_counter()
    with load(bundle, threads=threads) as model:
        load_ms = 1e3 * (time.perf_counter() - started)
        _check_length(bundle, model, prompt_tokens, new_tokens, _prefix_positions(bundle, adapter))
        for name in loaded:
            model.adapter_handle(name)
        prompt = [(7 * i + 11) % model.info.vocab_size for i in range(prompt_tokens)]
        with model.session(adapter=adapter) as session:
            _run(session, prompt[:WARM_UP], new_tokens=1)
            runs = [_run(session, prompt, new_tokens) for _ in range(repeats)]
        resident_mb = _peak_resident_mb()  # before switching loads the other adapters
        prefill, first, rate = (statistics.median(run[i] for run in runs) for i in range(3))
        return BenchResult(
            prefill_tokens_per_second=prompt_tokens / prefill,
            decode_tokens_per_second=rate,
            time_to_first_token_ms=1e3 * first,
            load_ms=load_ms,
            switch_us=_switch_us(bundle, model),
            resident_mb=resident_mb,
            weight_mb=model.info.weight_bytes / 1e6,
            threads=model.info.threads,
            isa=model.info.isa,
            machine=read_cpuinfo().name or platform.processor() or platform.machine(),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            adapter=adapter,
        )


def _prefix_positions(bundle: Path, adapter: Adapter) -> int:
    """What the adapter takes of the context."""
    names = [adapter] if isinstance(adapter, str) else [*(adapter or {})]
    entries = (read_manifest(bundle)["adapters"].get(name, {}) for name in names)
    return sum(entry.get("prefix", 0) for entry in entries)


def _check_length(
    bundle: Path, model: Model, prompt_tokens: int, new_tokens: int, prefix: int
) -> None:
    asked, held = prompt_tokens + 1 + new_tokens, model.info.context_length - prefix
    if asked > held:
        raise EdgeLoraError(
            f"{bundle}: {prompt_tokens} prompt tokens, the first token and {new_tokens} new tokens "
            f"are {asked} positions, the context holds {held}: ask for fewer"
        )


def _run(session: Session, prompt: list[int], new_tokens: int) -> tuple[float, float, float]:
    """Seconds of prefill, seconds until the first token, tokens a second of decode."""
    session.rewind(0)
    started = time.perf_counter()
    session.prefill(prompt)
    prefill = time.perf_counter() - started
    session.decode(1, ignore_eos=True)
    first = time.perf_counter() - started
    produced = len(session.decode(new_tokens, ignore_eos=True))
    return prefill, first, produced / (time.perf_counter() - started - first)


def _switch_us(bundle: Path, model: Model) -> float | None:
    """With a prefix the kv_cache cannot be kept; None without any other adapter."""
    kept = [name for name in model.adapters if not _prefix_positions(bundle, name)]
    names = [None, *kept]
    if not kept:
        return None
    with model.session() as session:
        session.prefill([0])
        return 1e6 * statistics.median(
            _timed_switch(session, names[i % len(names)]) for i in range(1, SWITCHES)
        )


def _timed_switch(session: Session, name: str | None) -> float:
    started = time.perf_counter()
    session.set_adapter(name, keep_cache=True)
    return time.perf_counter() - started


def _peak_resident_mb() -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    peaks = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(peaks[0].split()[1]) * 1024 / 1e6 if peaks else None
