"""The machine that this runs on: cores, ISA, memory and streamed bandwidth."""

import math
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelora.device.cpuinfo import read_cpuinfo, select_isa
from edgelora.device.profile import ISA_FAMILIES, DeviceProfile, list_profiles


@dataclass(frozen=True)
class DetectedDevice:
    """The machine this runs on; None is what could not be learnt."""

    cpu_name: str | None
    processors: int | None  # logical, as many as this process may use
    cores: int | None  # of those, without SMT siblings
    performance_cores: int | None
    isa: str | None  # None also when the CPU has none of ours
    memory_bytes: int | None  # of the machine, or of the container's limit if that is less
    bandwidth_bytes_per_second: int | None  # read by all cores together, a brief measurement
    nearest_profile: str | None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _numbers(ranges: str) -> set[int]:
    """`0-3,8` as a set."""
    spans = (span.partition("-") for span in ranges.split(",") if span)
    return {n for low, _, high in spans for n in range(int(low), int(high or low) + 1)}


def _core_leaders(root: Path, processors: Iterable[int]) -> list[int] | None:
    """One processor of each core, so that SMT siblings count once."""
    leaders: dict[str, int] = {}
    for n in sorted(processors):
        topology = root / f"sys/devices/system/cpu/cpu{n}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        if siblings is None:
            return None
        leaders.setdefault(siblings, n)
    return list(leaders.values())


def _performance_cores(root: Path, leaders: Sequence[int], kinds: Sequence[str]) -> int | None:
    """Cores with at least half the capacity of the largest; Intel's hybrids name theirs."""
    if named := _read(root / "sys/devices/cpu_core/cpus"):
        return len(_numbers(named) & set(leaders))
    texts = [_read(root / f"sys/devices/system/cpu/cpu{n}/cpu_capacity") for n in leaders]
    capacities = [int(text) for text in texts if text]
    if capacities and len(capacities) == len(leaders):
        return sum(2 * capacity >= max(capacities) for capacity in capacities)
    return len(leaders) if len(set(kinds)) == 1 else None


def _memory_limits(root: Path) -> Iterator[int]:
    """Limits of this process's control group and its parents, versions 1 and 2."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            text = _read(mount.joinpath(*parts[:depth]) / file)
            if text and text.isdigit():  # "max" is no limit
                yield int(text)


def _memory_bytes(root: Path) -> int | None:
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return min([int(line.split()[1]) * 1024, *_memory_limits(root)])
    return None


def _system_memory_bytes() -> int | None:
    """Where there is no /proc: POSIX's answer, if the system gives one."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _largest_cache_bytes(root: Path) -> int:
    sizes = (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = (_read(size) or "" for size in sizes)
    return max((int(text[:-1]) << 10 for text in texts if text.endswith("K")), default=0)


def streamed_bandwidth(threads: int, bytes_per_thread: int, seconds: float = 0.25) -> int:
    """Bytes a second that the threads together read, each from its own buffer."""
    start = threading.Barrier(threads)

    def stream(_: int) -> float:
        buffer = np.ones(bytes_per_thread // 8, np.int64)  # written here, so its pages are near
        passes = 0
        start.wait()
        begin = time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds:
            np.bitwise_or.reduce(buffer)  # releases the GIL; cheaper than any memory
            passes += 1
        return passes * buffer.nbytes / elapsed

    with ThreadPoolExecutor(threads) as pool:
        return round(sum(pool.map(stream, range(threads))))


def _measure(root: Path, threads: int, memory_bytes: int) -> int:
    """Streams four times the cache, at least 16 MiB a thread, at most a quarter of memory."""
    wanted = max(16 << 20, 4 * _largest_cache_bytes(root) // threads)
    return streamed_bandwidth(threads, min(wanted, memory_bytes // 4 // threads))


def _distance(profile: DeviceProfile, device: DetectedDevice) -> float:
    pairs = (
        (profile.performance_cores, device.performance_cores),
        (profile.memory_bytes, device.memory_bytes),
        (profile.bandwidth_bytes_per_second.sustained, device.bandwidth_bytes_per_second),
    )
    return sum(abs(math.log(ours / theirs)) for ours, theirs in pairs if theirs)


def nearest_profile(device: DetectedDevice, profiles: Iterable[DeviceProfile]) -> str | None:
    """Of the profiles with the best ISA that the device also has, the one most like it."""
    if device.isa is None:
        return None
    family = next(isas for isas in ISA_FAMILIES if device.isa in isas)
    runnable = family[: family.index(device.isa) + 1]
    candidates = [profile for profile in profiles if profile.isa in runnable]
    ranked = sorted(candidates, key=lambda p: (-runnable.index(p.isa), _distance(p, device)))
    return ranked[0].id if ranked else None


def _describe(root: Path, processors: set[int]) -> DetectedDevice:
    """All that files tell, without measuring."""
    cpu = read_cpuinfo(root)
    leaders = _core_leaders(root, processors)
    performance = None if leaders is None else _performance_cores(root, leaders, cpu.kinds)
    return DetectedDevice(
        cpu_name=cpu.name or platform.processor() or None,
        processors=len(processors) or None,
        cores=None if leaders is None else len(leaders),
        performance_cores=performance,
        isa=select_isa(cpu.features),
        memory_bytes=_memory_bytes(root) or _system_memory_bytes(),
        bandwidth_bytes_per_second=None,
        nearest_profile=None,
    )


def _usable_processors() -> set[int]:
    """Linux tells which processors this process may use; elsewhere all are counted."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 0))


def detect() -> DetectedDevice:
    """This machine; takes about half a second, spent on streaming memory."""
    root = Path("/")
    device = _describe(root, _usable_processors())
    threads = device.cores or device.processors
    if threads and device.memory_bytes:
        bandwidth = _measure(root, threads, device.memory_bytes)
        device = replace(device, bandwidth_bytes_per_second=bandwidth)
    return replace(device, nearest_profile=nearest_profile(device, list_profiles()))
