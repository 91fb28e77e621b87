"""Builds that cannot run here, or only in part: Android's target, and wheels for every glibc."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from emulated import CACHE, ROOT, TOOLCHAINS, Machine, pip_wheel, run, skip_without_tools, unpack

import edgelora
import oracle
import tiny
from elf import MACHINES, check_release
from test_smollm2 import SHARE

pytestmark = pytest.mark.slow
RUNTIME = ROOT / "runtime"
STAND_IN = Path(__file__).parent / "android.toolchain.cmake"


@pytest.fixture(scope="module")
def android() -> Path:
    """The folder of the objects that the preset compiles, with clang's warnings as errors."""
    skip_without_tools()
    if shutil.which("clang++") is None:
        pytest.skip("Android's target is tested where clang can be had")
    folder = CACHE / "android"
    headers = Path(sys.prefix) / "headers"
    options = [f"-DEDGELORA_HEADER_CACHE={headers}"] if headers.is_dir() else []
    options += ["-DCMAKE_BUILD_TYPE=Debug", "-G", "Ninja"]  # half the time of Release
    preset = ("--preset", "android-arm64", "-S", RUNTIME, "-B", folder)
    ndk = CACHE / "ndk"
    (ndk / "build" / "cmake").mkdir(parents=True, exist_ok=True)
    shutil.copy(STAND_IN, ndk / "build" / "cmake")
    run("cmake", *preset, *options, ANDROID_NDK=str(ndk))
    run("cmake", "--build", folder, "--target", "edgelora_objects", "edgelora_kernels")
    return folder


def test_android_objects_are_for_arm64_and_its_thread_locals(android: Path) -> None:
    """Before API 29 Android has no thread-local storage in ELF: the compiler emulates it."""
    objects = sorted(android.rglob("*.cc.o"))
    assert len(objects) > 30
    for each in objects:
        header = run("readelf", "-W", "-h", "-S", each)
        assert re.search(r"Machine: +AArch64", header)
        assert ".tbss" not in header and ".tdata" not in header
    capi = next(each for each in objects if each.name == "capi.cc.o")
    assert "__emutls_get_address" in run("readelf", "-W", "-s", capi)


def test_android_objects_compute_the_same(android: Path, machine: Machine, tmp_path: Path) -> None:
    """Linked with glibc in bionic's place."""
    library = tmp_path / "libedgelora.so"
    objects = [*android.rglob("*.cc.o")]
    run("aarch64-linux-gnu-g++", "-shared", "-o", library, *objects)
    base = tiny.tiny_llama(tmp_path / "base")
    edgelora.export(base, tmp_path / "bundle")
    machines = (machine, Machine(library, machine.onnxruntime))
    ours, theirs = (
        each.speak("max", tmp_path / "bundle", None, "float", [5, 9, 12], [7, 8, 9])
        for each in machines
    )
    oracle.assert_close(theirs.logits, ours.logits, SHARE)
    assert theirs.token_ids == ours.token_ids


@pytest.mark.parametrize("arch", MACHINES)
def test_wheel_of_zig_runs_on_old_systems(arch: str) -> None:
    """glibc 2.17 is enough, and no C++ library is needed."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        pytest.skip("wheels for old systems are tested where ziglang is installed")
    settings = {
        "build-dir": CACHE / f"zig-{arch}",
        "cmake.define.CMAKE_TOOLCHAIN_FILE": TOOLCHAINS / "zig.cmake",
        "cmake.define.EDGELORA_ARCH": arch,
        "cmake.define.EDGELORA_ZIG": Path(spec.origin).parent / "zig",
        "cmake.define.EDGELORA_HEADER_CACHE": Path(sys.prefix) / "headers",
    }
    wheel = pip_wheel(CACHE / f"wheel-{arch}", f"manylinux_2_17-{arch}", settings)
    assert wheel.stem.endswith(f"-py3-none-manylinux_2_17_{arch}")
    library = check_release(unpack(wheel), MACHINES[arch])
    assert library.glibc <= (2, 17)
    assert not {name for name in library.needed if "c++" in name or "gcc" in name}


def test_presets_name_every_target() -> None:
    presets = json.loads((RUNTIME / "CMakePresets.json").read_text())["configurePresets"]
    assert {"linux-arm64", "android-arm64", "ios-arm64"} <= {each["name"] for each in presets}
    for each in presets:
        file = each.get("toolchainFile", "").replace("${sourceDir}", str(RUNTIME))
        assert "$env{ANDROID_NDK}" in file or not file or Path(file).is_file()
