"""An aarch64 machine on this one: Debian's cross compiler builds the wheel, qemu's user emulation
runs what is in it, with the aarch64 library of the onnxruntime version that is installed here.

Everything lies in the folder `arm` of the Python environment and is made only once.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent.parent
TOOLCHAINS = ROOT / "runtime" / "cmake" / "toolchains"
CACHE = Path(sys.prefix) / "arm"
BUILD = Path(sys.prefix) / "native-arm64"  # of tests/run.sh, which tests the kernels there
TOOLS = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
}
LIBRARIES = Path("/usr/aarch64-linux-gnu/lib")  # of the cross compiler: libc, libstdc++, libgcc
CPUINFO = ROOT / "tests" / "golden" / "cpuinfo"
# ONNX Runtime asks /proc/cpuinfo what the CPU is and crashes on one that it cannot name, such as
# qemu's "max": it then reads of a Neoverse V1, whose instructions "max" has.
NAMED = {"CPU implementer\t: 0x00": "CPU implementer\t: 0x41", "0x051": "0xd40"}
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64")


def skip_without_tools() -> None:
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"ARM is tested where {' and '.join(missing)} can be had")


def run(*command: object, **environment: str) -> str:
    arguments = list(map(str, command))
    done = subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, f"{arguments[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def build_wheel() -> Path:
    """The wheel for linux_aarch64; its build folder has the tests too."""
    settings = {
        "build-dir": BUILD,
        "cmake.define.CMAKE_TOOLCHAIN_FILE": TOOLCHAINS / "linux-arm64.cmake",
        "cmake.define.EDGELORA_BUILD_TESTS": "ON",
    }
    headers = Path(sys.prefix) / "headers"  # of ./dev
    if headers.is_dir():
        settings["cmake.define.EDGELORA_HEADER_CACHE"] = headers
    return pip_wheel(CACHE / "wheel", "linux-aarch64", settings)


def pip_wheel(folder: Path, platform: str, settings: dict[str, object]) -> Path:
    """A wheel of this tree in `folder`, alone there."""
    shutil.rmtree(folder, ignore_errors=True)
    options = [f"--config-settings={name}={value}" for name, value in settings.items()]
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"_PYTHON_HOST_PLATFORM": platform, "CMAKE_GENERATOR": "Ninja", "PATH": tools}
    run(*pip, "-w", folder, *options, ROOT, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path) -> Path:
    """The library in the wheel, unpacked beside it."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("edgelora/libedgelora.so", wheel.parent))


def onnxruntime_library() -> Path:
    """Its aarch64 library, from the wheel for this Python."""
    name = version("onnxruntime")
    library = CACHE / f"onnxruntime-{name}" / "libonnxruntime.so"
    if not library.is_file():
        download = CACHE / "download"
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:")
        run(*pip, *platforms, "-d", download, f"onnxruntime=={name}")
        (wheel,) = download.glob(f"onnxruntime-{name}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = f"onnxruntime/capi/libonnxruntime.so.{name}"
            archive.extract(member, download)
        library.parent.mkdir(exist_ok=True)
        (download / member).rename(library)
        shutil.rmtree(download)
    return library


@dataclass(frozen=True)
class Spoken:
    """What the program `greedy` did: tests/native/greedy.c."""

    isa: str
    token_ids: list[int]
    logits: NDArray[np.float32]  # [prompt and answer, vocab_size]


@dataclass(frozen=True)
class Machine:
    """An aarch64 Linux with our library and ONNX Runtime's."""

    library: Path
    onnxruntime: Path

    def run(self, cpu: str, *command: object) -> str:
        qemu = ("qemu-aarch64-static", "-cpu", cpu, "-L", _root(cpu))
        return run(*qemu, "-E", f"LD_LIBRARY_PATH={self.library.parent}", *command)

    def speak(
        self, cpu: str, bundle: Path, adapter: str | None, accuracy: str,
        prompt: list[int], answer: list[int],
    ) -> Spoken:  # fmt: skip
        """Logits of the prompt and the given answer, and an answer of its own of that length."""
        logits = CACHE / "logits"
        output = self.run(
            cpu, BUILD / "tests" / "greedy", bundle, self.onnxruntime, adapter or "-", accuracy,
            logits, len(prompt), *prompt, *answer,
        )  # fmt: skip
        isa, _, tokens = output.partition(":")
        rows = np.fromfile(logits, np.float32).reshape(len(prompt) + len(answer), -1)
        logits.unlink()
        return Spoken(isa, [int(token) for token in tokens.split()], rows)

    def selfcheck(self, cpu: str, bundle: Path) -> list[str]:
        """The lines of its results; fails if the check does."""
        greedy = BUILD / "tests" / "greedy"
        return self.run(cpu, greedy, "--selfcheck", bundle, self.onnxruntime).splitlines()


def _root(cpu: str) -> Path:
    """What qemu shows in place of this machine's files: the libraries and /proc/cpuinfo."""
    root = CACHE / f"root-{cpu}"
    (root / "proc").mkdir(parents=True, exist_ok=True)
    if not (root / "lib").is_symlink():
        (root / "lib").symlink_to(LIBRARIES)
    text = (CPUINFO / f"qemu-{cpu}.txt").read_text()
    for recorded, named in NAMED.items():
        text = text.replace(recorded, named)
    (root / "proc" / "cpuinfo").write_text(text)
    return root
