"""What a shared library says of itself, read by binutils' readelf."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

MOST_BYTES = 1_500_000
MACHINES = {"aarch64": "AArch64", "x86_64": "Advanced Micro Devices X86-64"}
HEADER = Path(__file__).parent.parent / "runtime" / "include" / "edgelora.h"
DEFINED = re.compile(r" (?:GLOBAL|WEAK) +\w+ +(?!UND)\w+ (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class SharedLibrary:
    machine: str  # as readelf names it
    needed: frozenset[str]  # names of other libraries
    exports: frozenset[str]
    sections: frozenset[str]
    glibc: tuple[int, int]  # the newest version that a symbol asks for

    @classmethod
    def read(cls, path: Path) -> "SharedLibrary":
        text = subprocess.run(
            ["readelf", "-W", "-h", "-S", "-d", "--dyn-syms", path],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        machine = re.search(r"Machine: +(.+)", text)
        assert machine is not None
        versions = re.findall(r"@GLIBC_(\d+)\.(\d+)", text)
        return cls(
            machine[1].strip(),
            frozenset(re.findall(r"\(NEEDED\).*\[(.+)\]", text)),
            frozenset(name.partition("@")[0] for name in DEFINED.findall(text)),
            frozenset(re.findall(r"\] (\.\w+)", text)),
            max((int(major), int(minor)) for major, minor in versions),
        )


def check_release(path: Path, machine: str) -> SharedLibrary:
    """Small, stripped, and with the documented functions as its whole surface."""
    assert path.stat().st_size <= MOST_BYTES, f"{path.stat().st_size} bytes"
    library = SharedLibrary.read(path)
    assert library.machine == machine
    assert ".symtab" not in library.sections and ".debug_info" not in library.sections
    documented = set(re.findall(r"^EDGELORA_API [^(;]*?(edgelora_\w+)\(", HEADER.read_text(), re.M))
    assert library.exports == documented | {"RegisterCustomOps"}
    return library
