"""What /proc/cpuinfo tells: the kind of each processor, and the features that all of them have."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_AVX512_VNNI = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

# Best first: the names that the kernel prints under Features (Arm) and flags (x86).
ISA_FEATURES = (
    ("neon_i8mm", {"asimd", "asimddp", "i8mm"}),
    ("neon_dotprod", {"asimd", "asimddp"}),
    ("neon", {"asimd"}),
    ("amx_bf16", _AVX512_VNNI | {"avx512_bf16", "amx_tile", "amx_bf16"}),
    ("avx512_vnni", _AVX512_VNNI),
    ("avx_vnni", {"avx2", "fma", "f16c", "avx_vnni"}),
    ("avx2", {"avx2", "fma", "f16c"}),
)

# Arm's part numbers (MIDR_EL1) of the cores in the profiles and their neighbours.
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD05: "Cortex-A55",
    0xD08: "Cortex-A72",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
    0xD44: "Cortex-X1",
    0xD46: "Cortex-A510",
    0xD47: "Cortex-A710",
    0xD48: "Cortex-X2",
    0xD49: "Neoverse-N2",
    0xD4D: "Cortex-A715",
    0xD4E: "Cortex-X3",
    0xD4F: "Neoverse-V2",
    0xD80: "Cortex-A520",
    0xD81: "Cortex-A720",
    0xD82: "Cortex-X4",
}


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo says."""

    kinds: tuple[str, ...]  # model or core name of each processor, in order
    features: frozenset[str]  # those that every processor has

    @property
    def name(self) -> str | None:
        return " + ".join(dict.fromkeys(self.kinds)) or None


def select_isa(features: Iterable[str]) -> str | None:
    """The best ISA that a set of kernel feature names allows."""
    present = set(features)
    return next((isa for isa, needed in ISA_FEATURES if needed <= present), None)


def _kind(fields_of_processor: dict[str, str]) -> str:
    if "model name" in fields_of_processor and "CPU part" not in fields_of_processor:
        return fields_of_processor["model name"]
    implementer = fields_of_processor.get("CPU implementer", "?")
    part = fields_of_processor.get("CPU part", "?")
    name = _ARM_PARTS.get(int(part, 16)) if implementer == "0x41" and part != "?" else None
    return name or f"implementer {implementer} part {part}"


def read_cpuinfo(root: Path = Path("/")) -> CpuInfo:
    """Of the machine whose files lie under `root`; nothing where it has no such file."""
    try:
        return parse_cpuinfo((root / "proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return CpuInfo((), frozenset())


def parse_cpuinfo(text: str) -> CpuInfo:
    """Reads the text of /proc/cpuinfo, x86 or Arm; only paragraphs that describe a processor."""
    processors = []
    for paragraph in text.split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        values = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in values:
            processors.append(values)
    features = [set(p.get("flags", p.get("Features", "")).split()) for p in processors]
    common = frozenset(set.intersection(*features)) if features else frozenset()
    return CpuInfo(tuple(_kind(values) for values in processors), common)
