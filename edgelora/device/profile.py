"""Device profiles: what a device can do, read from `devices/<id>/profile.toml`."""

import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError

ISA_FAMILIES = (
    ("neon", "neon_dotprod", "neon_i8mm"),
    ("avx2", "avx_vnni", "avx512_vnni", "amx_bf16"),
)  # from the least to the most able

FIGURES = (
    "cores",
    "isa",
    "memory_bytes",
    "usable_memory_bytes",
    "bandwidth_bytes_per_second.peak",
    "bandwidth_bytes_per_second.sustained",
)  # each must have a source


@dataclass(frozen=True)
class Cluster:
    """Cores of one kind."""

    count: int
    microarchitecture: str
    max_ghz: float
    performance: bool

    def problems(self) -> Iterator[str]:
        if self.count < 1:
            yield f"cores: count {self.count} is below 1"
        if not 0 < self.max_ghz < 10:
            yield f"cores: max_ghz {self.max_ghz} is not between 0 and 10"


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second."""

    peak: int  # what the memory bus carries
    sustained: int  # what the CPU's cores together can read

    def problems(self) -> Iterator[str]:
        if not 0 < self.sustained <= self.peak:
            yield f"bandwidth: sustained {self.sustained} is not between 0 and peak {self.peak}"


@dataclass(frozen=True)
class Source:
    """Where a figure comes from: a publication, or the reasoning of an estimate."""

    figure: str
    title: str = ""
    url: str = ""
    estimate: str = ""

    def problems(self) -> Iterator[str]:
        if self.figure not in FIGURES:
            yield f"sources: unknown figure {self.figure!r}"
        if bool(self.title and self.url) == bool(self.estimate):
            yield f"sources: {self.figure} needs either title and url or estimate"


@dataclass(frozen=True)
class DeviceProfile:
    """What a plan may count on; every figure has a source."""

    id: str
    name: str
    isa: str
    memory_bytes: int
    usable_memory_bytes: int  # what one app may take
    bandwidth_bytes_per_second: Bandwidth
    cores: tuple[Cluster, ...]
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if problems := list(self.problems()):
            raise EdgeLoraError(f"device profile {self.id!r}: {'; '.join(problems)}")

    @property
    def performance_cores(self) -> int:
        return sum(cluster.count for cluster in self.cores if cluster.performance)

    def problems(self) -> Iterator[str]:
        if all(self.isa not in family for family in ISA_FAMILIES):
            yield f"unknown isa {self.isa!r}"
        if not 0 < self.usable_memory_bytes <= self.memory_bytes:
            yield f"usable_memory_bytes {self.usable_memory_bytes} is not in 1…memory_bytes"
        if not self.performance_cores:
            yield "no performance cores"
        yield from self.bandwidth_bytes_per_second.problems()
        for cluster in self.cores:
            yield from cluster.problems()
        for source in self.sources:
            yield from source.problems()
        sourced = {source.figure for source in self.sources}
        yield from (f"no source for {figure}" for figure in FIGURES if figure not in sourced)


_TOML_TYPES = {int: (int,), float: (int, float), str: (str,), bool: (bool,), Bandwidth: (dict,)}


def _table_problems(kind: Any, table: object, where: str) -> Iterator[str]:
    """Unknown, missing and mistyped keys of one TOML table, against the fields of a dataclass."""
    if not isinstance(table, dict):
        yield f"{where} is not a table"
        return
    declared = {field.name: field for field in fields(kind)}
    yield from (f"unknown key {key!r} in {where}" for key in table if key not in declared)
    for name, field in declared.items():
        types = _TOML_TYPES.get(field.type, (list,)) if isinstance(field.type, type) else (list,)
        if name not in table:
            if field.default is MISSING:
                yield f"missing key {name!r} in {where}"
        elif type(table[name]) not in types:
            yield f"{name!r} in {where} is not of type {types[-1].__name__}"


def _profile_problems(table: dict[str, Any]) -> Iterator[str]:
    yield from _table_problems(DeviceProfile, table, "the profile")
    if isinstance(bandwidth := table.get("bandwidth_bytes_per_second"), dict):
        yield from _table_problems(Bandwidth, bandwidth, "bandwidth_bytes_per_second")
    for kind, key in ((Cluster, "cores"), (Source, "sources")):
        parts = table.get(key)
        for part in parts if isinstance(parts, list) else []:
            yield from _table_problems(kind, part, key)


def _profile(table: dict[str, Any]) -> DeviceProfile:
    if problems := list(_profile_problems(table)):
        raise EdgeLoraError("; ".join(problems))
    parts = {
        "bandwidth_bytes_per_second": Bandwidth(**table["bandwidth_bytes_per_second"]),
        "cores": tuple(Cluster(**cluster) for cluster in table["cores"]),
        "sources": tuple(Source(**source) for source in table["sources"]),
    }
    return DeviceProfile(**{**table, **parts})


def devices_folder() -> Traversable:
    """The folder inside the installed package, or beside the package in a source tree."""
    packaged = files("edgelora") / "devices"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "devices"


def profile_ids(folder: Traversable | None = None) -> list[str]:
    """The ids of all profiles, sorted."""
    folder = folder or devices_folder()
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry.name for entry in entries if (entry / "profile.toml").is_file())


def load_profile(profile_id: str, folder: Traversable | None = None) -> DeviceProfile:
    """The profile of a device; an unknown id or a malformed file is refused."""
    folder = folder or devices_folder()
    known = profile_ids(folder)
    if profile_id not in known:
        raise EdgeLoraError(f"unknown device {profile_id!r}: choose one of {', '.join(known)}")
    path = folder / profile_id / "profile.toml"
    try:
        profile = _profile(tomllib.loads(path.read_text(encoding="utf-8")))
    except (EdgeLoraError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EdgeLoraError(f"{path}: {error}") from error
    if profile.id != profile_id:
        raise EdgeLoraError(f"{path}: id {profile.id!r} differs from the folder's name")
    return profile


def list_profiles(folder: Traversable | None = None) -> list[DeviceProfile]:
    """All profiles, sorted by id."""
    return [load_profile(profile_id, folder) for profile_id in profile_ids(folder)]


def predict_decode_tokens_per_second(profile: DeviceProfile, bytes_per_token: int) -> float:
    """The limit that memory sets: every token reads all weights once."""
    return profile.bandwidth_bytes_per_second.sustained / bytes_per_token


def max_context(
    profile: DeviceProfile, weight_bytes: int, kv_bytes_per_position: int, overhead_bytes: int
) -> int:
    """Positions whose kv_cache fits beside the weights; 0 when not even the weights fit."""
    free = profile.usable_memory_bytes - weight_bytes - overhead_bytes
    return max(0, free // kv_bytes_per_position)
