"""Profiles of devices; detection on recorded dumps and on a made-up /proc and /sys."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from edgelora.device import (
    Bandwidth,
    Cluster,
    CpuInfo,
    DetectedDevice,
    DeviceProfile,
    Source,
    detect,
    devices_folder,
    list_profiles,
    load_profile,
    max_context,
    nearest_profile,
    parse_cpuinfo,
    predict_decode_tokens_per_second,
    profile_ids,
    select_isa,
)
from edgelora.device.detection import _describe
from edgelora.device.profile import FIGURES
from edgelora.errors import EdgeLoraError

GOLDEN = Path(__file__).parent / "golden" / "cpuinfo"
AVX512 = {
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni",
}  # fmt: skip
AMX = {"avx512_bf16", "amx_tile", "amx_bf16"}


def profile(**changes: object) -> DeviceProfile:
    values: dict[str, object] = {
        "id": "board",
        "name": "Board",
        "isa": "neon",
        "memory_bytes": 1000,
        "usable_memory_bytes": 600,
        "bandwidth_bytes_per_second": Bandwidth(peak=200, sustained=100),
        "cores": (Cluster(4, "Cortex-A53", 1.0, True),),
        "sources": tuple(Source(figure, estimate="made up") for figure in FIGURES),
    }
    return DeviceProfile(**{**values, **changes})  # type: ignore[arg-type]


def write_profile(folder: Path, text: str) -> Path:
    (folder / "board").mkdir()
    (folder / "board" / "profile.toml").write_text(text, encoding="utf-8")
    return folder


def recorded(name: str) -> CpuInfo:
    """A recorded dump without its first line, which says where it was recorded."""
    return parse_cpuinfo((GOLDEN / f"{name}.txt").read_text(encoding="utf-8").split("\n", 1)[1])


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


# ---- profiles --------------------------------------------------------------------------------


def test_profiles_are_the_seven_devices() -> None:
    assert profile_ids() == [
        "generic-x86-avx2",
        "generic-x86-avx512",
        "iphone-15",
        "jetson-orin-nano",
        "pixel-8",
        "raspberry-pi-5",
        "raspberry-pi-zero-2w",
    ]


@pytest.mark.parametrize("profile_id", profile_ids())
def test_profile_loads_under_its_folders_name_with_a_source_for_each_figure(
    profile_id: str,
) -> None:
    loaded = load_profile(profile_id)
    assert loaded.id == profile_id
    assert {source.figure for source in loaded.sources} == set(FIGURES)
    assert all(source.estimate or source.url.startswith("http") for source in loaded.sources)


@pytest.mark.parametrize("profile_id", profile_ids())
def test_profile_figures_are_plausible(profile_id: str) -> None:
    loaded = load_profile(profile_id)
    bandwidth = loaded.bandwidth_bytes_per_second
    assert 1e9 < bandwidth.sustained < bandwidth.peak < 1e12
    assert 256 << 20 <= loaded.usable_memory_bytes < loaded.memory_bytes <= 64 << 30
    assert 1 <= loaded.performance_cores <= sum(cluster.count for cluster in loaded.cores)


def test_unknown_device_is_refused_with_the_known_ids() -> None:
    with pytest.raises(EdgeLoraError, match=r"unknown device 'toaster': choose one of .*pixel-8"):
        load_profile("toaster")


def test_path_as_id_is_refused() -> None:
    with pytest.raises(EdgeLoraError, match="unknown device"):
        load_profile("../devices/pixel-8")


def test_malformed_toml_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EdgeLoraError, match=r"board.profile\.toml: ") as caught:
        load_profile("board", write_profile(tmp_path, "id = "))
    assert "\n" not in str(caught.value)


def test_all_bad_keys_are_named_at_once(tmp_path: Path) -> None:
    text = 'id = "board"\ncolour = "red"\nmemory_bytes = true\n[[cores]]\ncount = 1.5\n'
    with pytest.raises(EdgeLoraError) as caught:
        load_profile("board", write_profile(tmp_path, text))
    for part in (
        "unknown key 'colour'",
        "missing key 'isa'",
        "'memory_bytes' in the profile is not of type int",
        "'count' in cores is not of type int",
        "missing key 'max_ghz' in cores",
    ):
        assert part in str(caught.value)


def test_id_that_differs_from_the_folder_is_refused(tmp_path: Path) -> None:
    text = (Path(str(devices_folder())) / "pixel-8" / "profile.toml").read_text(encoding="utf-8")
    with pytest.raises(EdgeLoraError, match="id 'pixel-8' differs"):
        load_profile("board", write_profile(tmp_path, text))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"isa": "sse2"}, "unknown isa 'sse2'"),
        ({"usable_memory_bytes": 1001}, "usable_memory_bytes 1001"),
        ({"bandwidth_bytes_per_second": Bandwidth(peak=1, sustained=2)}, "sustained 2"),
        ({"cores": ()}, "no performance cores"),
        ({"cores": (Cluster(4, "A53", float("nan"), True),)}, "max_ghz nan"),
        ({"cores": (Cluster(0, "A53", 1.0, True),)}, "count 0"),
        ({"sources": ()}, "no source for isa"),
        ({"sources": (Source("isa"),)}, "isa needs either title and url or estimate"),
        ({"sources": (Source("colour", estimate="red"),)}, "unknown figure 'colour'"),
    ],
)
def test_profile_refuses_figures_that_cannot_be(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(EdgeLoraError, match=problem):
        profile(**changes)


# ---- predictions -----------------------------------------------------------------------------


def test_decode_rate_is_sustained_bandwidth_over_bytes() -> None:
    assert predict_decode_tokens_per_second(profile(), 40) == 2.5


def test_context_is_what_fits_beside_weights_and_overhead() -> None:
    assert max_context(profile(), 400, 30, 100) == 3


def test_context_is_zero_when_the_weights_do_not_fit() -> None:
    assert max_context(profile(), 601, 30, 0) == 0


# ---- detection -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cpu_name", "isa"),
    [
        ("amd-epyc-zen3", "AMD EPYC", "avx2"),
        ("amd-epyc-zen5", "AMD EPYC", "avx512_vnni"),
        ("xeon-emerald-rapids", "Intel(R) Xeon(R) Processor", "amx_bf16"),
        ("xeon-ice-lake", "Intel(R) Xeon(R) Processor @ 2.80GHz", "avx512_vnni"),
        ("core-i7-13700hx", "13th Gen Intel(R) Core(TM) i7-13700HX", "avx_vnni"),
        ("raspberry-pi-3", "Cortex-A53", "neon"),
        ("raspberry-pi-4", "Cortex-A72", "neon"),
        ("raspberry-pi-5", "Cortex-A76", "neon_dotprod"),
        ("agilex-5", "Cortex-A55", "neon_dotprod"),
        ("neoverse-n1", "Neoverse-N1", "neon_dotprod"),
        ("snapdragon-8-gen-3", "Cortex-A520", "neon_i8mm"),
        ("qemu-cortex-a53", "Cortex-A53", "neon"),
        ("qemu-cortex-a76", "Cortex-A76", "neon_dotprod"),
        ("qemu-max", "implementer 0x00 part 0x051", "neon_i8mm"),
    ],
)
def test_recorded_cpuinfo_gives_name_and_isa(name: str, cpu_name: str, isa: str) -> None:
    cpu = recorded(name)
    assert (cpu.name, select_isa(cpu.features)) == (cpu_name, isa)


def test_cpuinfo_of_unlike_cores_keeps_the_features_of_all() -> None:
    texts = [
        (GOLDEN / f"qemu-cortex-{core}.txt").read_text(encoding="utf-8").split("\n", 1)[1]
        for core in ("a53", "a76")
    ]
    cpu = parse_cpuinfo("\n".join([*texts, "Hardware\t: Board\n"]))
    assert cpu.kinds == ("Cortex-A53", "Cortex-A76")
    assert select_isa(cpu.features) == "neon"


def test_empty_cpuinfo_is_unknown() -> None:
    assert parse_cpuinfo("") == CpuInfo((), frozenset())
    assert parse_cpuinfo("").name is None


@pytest.mark.parametrize(
    ("features", "isa"),
    [
        (AVX512, "avx512_vnni"),
        (AVX512 | AMX, "amx_bf16"),
        (AMX, None),
        (AVX512 - {"avx512_vnni"}, "avx2"),
        (AVX512 - {"avx512bw"}, "avx2"),
        ({"avx2", "fma", "f16c", "avx_vnni"}, "avx_vnni"),
        ({"avx2"}, None),
        ({"neon", "vfpv4"}, None),  # 32-bit Arm
        ({"asimd", "i8mm"}, "neon"),
        ({"asimd", "asimddp", "i8mm"}, "neon_i8mm"),
        (set(), None),
    ],
)
def test_isa_is_the_best_whose_features_are_all_there(features: set[str], isa: str | None) -> None:
    assert select_isa(features) == isa


def test_smt_siblings_count_as_one_core(tmp_path: Path) -> None:
    files = {
        f"sys/devices/system/cpu/cpu{n}/topology/core_cpus_list": f"{n % 2},{n % 2 + 2}\n"
        for n in range(4)
    }
    files["proc/cpuinfo"] = "\n".join(
        f"processor: {n}\nmodel name: X\nflags: avx2\n" for n in range(4)
    )
    device = _describe(machine(tmp_path, files), {0, 1, 2, 3})
    assert (device.processors, device.cores, device.performance_cores) == (4, 2, 2)


def test_small_cores_are_no_performance_cores(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu"
    capacities = [250] * 4 + [700] * 4 + [1024]  # shaped like a 4 + 4 + 1 phone
    files = {f"{cpus}/cpu{n}/cpu_capacity": str(c) for n, c in enumerate(capacities)}
    files |= {f"{cpus}/cpu{n}/topology/core_cpus_list": str(n) for n in range(9)}
    device = _describe(machine(tmp_path, files), set(range(9)))
    assert (device.cores, device.performance_cores) == (9, 5)


def test_intel_hybrid_names_its_performance_cores(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu"
    siblings = ["0-1", "0-1", "2", "3"]
    files = {f"{cpus}/cpu{n}/topology/core_cpus_list": s for n, s in enumerate(siblings)}
    files["sys/devices/cpu_core/cpus"] = "0-1\n"
    device = _describe(machine(tmp_path, files), {0, 1, 2, 3})
    assert (device.cores, device.performance_cores) == (3, 1)


def test_performance_cores_are_unknown_when_unlike_cores_have_no_capacity(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu"
    files = {f"{cpus}/cpu{n}/topology/core_cpus_list": str(n) for n in range(2)}
    files["proc/cpuinfo"] = "processor: 0\nCPU part: 0xd03\n\nprocessor: 1\nCPU part: 0xd0b\n"
    assert _describe(machine(tmp_path, files), {0, 1}).performance_cores is None


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": "3000", "a/b/memory.max": "max"}, 3000),
        ("0::/a\n", {"memory.max": "max"}, 8192),
        ("0::/../..\n", {"memory.max": "4000"}, 4000),
        ("4:memory:/a\n2:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "5000"}, 5000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, 8192),
        ("", {}, 8192),
    ],
)
def test_memory_is_the_least_of_machine_and_control_groups(
    tmp_path: Path, groups: str, limits: dict[str, str], expected: int
) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}
    files |= {"proc/meminfo": "MemTotal:  8 kB\nMemFree: 1 kB\n", "proc/self/cgroup": groups}
    assert _describe(machine(tmp_path, files), {0}).memory_bytes == expected


def test_machine_without_proc_leaves_cores_and_isa_unknown(tmp_path: Path) -> None:
    device = _describe(tmp_path, {0, 1})
    assert (device.processors, device.cores, device.performance_cores) == (2, None, None)
    assert device.isa is None


UNKNOWN = DetectedDevice(*[None] * len(fields(DetectedDevice)))


def test_nearest_profile_has_the_best_isa_and_the_most_similar_figures() -> None:
    board = replace(UNKNOWN, isa="neon_dotprod", performance_cores=4, memory_bytes=4 << 30)
    assert nearest_profile(board, list_profiles()) == "raspberry-pi-5"
    fast = replace(board, performance_cores=6, bandwidth_bytes_per_second=30_000_000_000)
    assert nearest_profile(fast, list_profiles()) == "jetson-orin-nano"


def test_nearest_profile_never_asks_for_more_than_the_device_has() -> None:
    assert nearest_profile(replace(UNKNOWN, isa="avx_vnni"), list_profiles()) == "generic-x86-avx2"
    assert nearest_profile(UNKNOWN, list_profiles()) is None


def test_detect_measures_this_machine() -> None:
    device = detect()
    assert device.processors
    assert device.memory_bytes
    assert (device.bandwidth_bytes_per_second or 0) > 100_000_000  # slower than any memory
    assert (device.nearest_profile is None) == (device.isa is None)
