"""What the ARM kernels cost, without ARM hardware: instructions that an emulator counts, cycles of
the inner loops that llvm-mca computes, tokens a second that follow for the device profiles.

    python tests/benchmarks/arm_kernels.py BUILD tests/benchmarks/results

BUILD: a build folder of runtime/ for linux-arm64. Needs g++-aarch64-linux-gnu, qemu-user-static and
llvm-mca (19 or newer: older ones lack models of these cores).
"""

import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import click

from edgelora.device import DeviceProfile, list_profiles

ROOT = Path(__file__).parents[2]
COMPILER, OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
README, KERNELS = Path(__file__).parent / "README.md", "arm_kernels.csv"
TOKENS = "arm_tokens.csv"
OUR_KERNELS = "edgelora"
FEATURES, OUTPUTS = 2048, 128  # of arm_calls.cc
PHASES = {"decode": 1, "prefill": 32}  # rows of x
FORMATS = {"int4": 1, "int4_zero_points": 2, "int4_offsets": 3, "int8": 4, "nf4": 5}


@dataclass(frozen=True)
class Isa:
    emulated: str  # qemu's CPU
    cpus: tuple[str, ...]  # llvm's; it gives cortex-a72, a76 and x1 the model of cortex-a57


ISAS = {
    "neon": Isa("cortex-a53", ("cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76")),
    "neon_dotprod": Isa(
        "cortex-a76", ("cortex-a55", "cortex-a76", "cortex-x1", "neoverse-n1", "neoverse-v1")
    ),
    "neon_i8mm": Isa("max", ("cortex-a510", "neoverse-n2", "neoverse-v2")),
}


def architecture(isa: str) -> list[str]:
    """The flags of its folder."""
    lines = (ROOT / "runtime/kernels/kernels.inc").read_text(encoding="utf-8")
    found = re.search(rf'^EDGELORA_ISA\({isa}, .*, "(.*)", "arm"\)', lines, re.MULTILINE)
    assert found
    return found[1].split()


def flags(isa: str) -> list[str]:
    """What kernels.inc and CMakeLists.txt compile the folder with."""
    return [
        "-O3",
        "-DNDEBUG",
        "-fPIC",
        "-ffp-contract=off",
        "-fno-schedule-insns",
        "-frename-registers",
        *architecture(isa),
    ]


@dataclass(frozen=True)
class Row:
    """One inner loop on one CPU. A product is one weight times one activation."""

    kernel: str
    isa: str
    format: str
    phase: str
    cpu: str
    loop_instructions: int
    loop_products: int
    products_per_cycle: float  # llvm-mca, all loads from L1
    instructions_per_product: float  # of the whole call, counted by the emulator

    @property
    def rate(self) -> float:
        """Products a cycle of whole calls: what is outside the loop runs as fast as the loop."""
        inside = self.loop_instructions / self.loop_products / self.instructions_per_product
        return self.products_per_cycle * min(1.0, inside)


def run(*command: object) -> str:
    return subprocess.run(
        [str(each) for each in command], check=True, capture_output=True, text=True
    ).stdout


# ---- inner loops ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.text.split()[0]


def disassembled(file: Path, function: str) -> list[Instruction]:
    listing = run(OBJDUMP, "-d", "--no-show-raw-insn", f"--disassemble={function}", file)
    found = []
    for line in listing.splitlines():
        if match := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            text = re.sub(r"\s*//.*", "", match[2]).strip()
            branch = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z)\s.*?\b([0-9a-f]+) <", text)
            found.append(
                Instruction(int(match[1], 16), text, int(branch[1], 16) if branch else None)
            )
    return found


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """From a branch's target to the branch back: the smallest such spans that also scale."""
    places = {each.address: i for i, each in enumerate(code)}
    back = [(places[c.target], i) for i, c in enumerate(code) if places.get(c.target, i + 1) <= i]
    whole = [(a, b) for a, b in back if products_of(code[a : b + 1]) and scales(code[a : b + 1])]
    for first, last in whole:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in whole):
            yield code[first : last + 1]


def scales(loop: list[Instruction]) -> bool:
    return any(each.name in ("fmla", "fmul") for each in loop)


def products_of(loop: list[Instruction]) -> int:
    """Weights times activations: smmla does 32, sdot 16, a widening multiplication 8."""
    names = Counter(each.name for each in loop if ".4s" in each.text or ".8h" in each.text)
    widening = ("smull", "smull2", "smlal", "smlal2")
    return 32 * names["smmla"] + 16 * names["sdot"] + 8 * sum(names[name] for name in widening)


def inner_loop(file: Path, function: str) -> list[Instruction]:
    """Of many products, in the fewest instructions."""
    found = loops(disassembled(file, function))
    return max(found, key=lambda loop: (products_of(loop), -len(loop)))


def cycles(mca: str, cpu: str, loop: list[Instruction]) -> float:
    """Of one turn, in a hundred turns."""
    lines = ["loop:"]
    for each in loop:
        lines.append(re.sub(r"\b[0-9a-f]+ <.*>", "loop", each.text) if each.target else each.text)
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        report = run(mca, "-mtriple=aarch64", f"-mcpu={cpu}", "-iterations=100", file.name)
    total = re.search(r"Total Cycles:\s+(\d+)", report)
    assert total
    return int(total[1]) / 100


# ---- instructions -----------------------------------------------------------------------------


def executed(isa: str, *command: object) -> int:
    """Instructions that the emulator runs: one line of its log each."""
    qemu = ("qemu-aarch64-static", "-cpu", ISAS[isa].emulated, "-singlestep")
    logged = [*qemu, "-d", "exec,nochain", "-D", "/dev/stdout", *map(str, command)]
    with subprocess.Popen(logged, stdout=subprocess.PIPE) as process:  # up to gigabytes
        assert process.stdout
        count = sum(line.startswith(b"Trace") for line in process.stdout)
    assert process.returncode == 0
    return count


def instructions_per_product(isa: str, rows: int, *command: object) -> float:
    """`command` takes the number of rows and that of calls too."""
    one, two = (executed(isa, *command, rows, calls) for calls in (1, 2))
    return (two - one) / (FEATURES * OUTPUTS * rows)


# ---- all together -----------------------------------------------------------------------------


def compiled(output: Path, source: str, *rest: object) -> Path:
    source_path = ROOT / "tests/benchmarks" / source
    run(COMPILER, "-std=c++17", f"-I{ROOT / 'runtime'}", source_path, *rest, "-o", output)
    return output


def compiled_loops(folder: Path, isa: str) -> Path:
    return compiled(folder / f"{isa}.o", "arm_loops.cc", "-c", f"-DEDGELORA_ISA={isa}", *flags(isa))


def compiled_calls(folder: Path, build: Path) -> Path:
    library = build / "kernels/libedgelora_kernels.a"
    return compiled(folder / "arm_calls", "arm_calls.cc", library, "-O2", "-static")


def ours(build: Path, mca: str) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        program = compiled_calls(Path(name), build)
        for isa in ISAS:
            file = compiled_loops(Path(name), isa)
            for format_, (phase, rows) in product(FORMATS, PHASES.items()):
                loop = inner_loop(file, f"{phase}_{format_}")
                whole = instructions_per_product(isa, rows, program, isa, FORMATS[format_])
                yield from measured(OUR_KERNELS, isa, format_, phase, loop, whole, mca)


def measured(
    kernel: str, isa: str, format_: str, phase: str, loop: list[Instruction], whole: float, mca: str
) -> Iterator[Row]:
    """A row for each CPU. whole: instructions for each product."""
    for cpu in ISAS[isa].cpus:
        rate = products_of(loop) / cycles(mca, cpu, loop)
        yield Row(
            kernel, isa, format_, phase, cpu, len(loop), products_of(loop), round(rate, 2),
            round(whole, 4),
        )  # fmt: skip


# ---- tokens a second --------------------------------------------------------------------------

# The core that stands for another in llvm's models: the same design, or the nearest that has one.
STAND_INS = {
    "Cortex-A53": "cortex-a53",
    "Cortex-A76": "neoverse-n1",
    "Cortex-A78AE": "neoverse-n1",
    "Cortex-A715": "neoverse-n2",
    "Cortex-X3": "neoverse-v2",
    "Everest": "neoverse-v2",
}
BITS = {"int4": 4.5, "nf4": 4.25, "int8": 8.5}  # a weight, with the scales that decode reads


@dataclass(frozen=True)
class Model:
    name: str
    linears: int  # weights in 4 bits
    head: int  # weights in int8


MODELS = (
    Model("SmolLM2-135M", 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536), 49152 * 576),
    Model("Llama shape 1.07B", 16 * 2048 * (2 * 2048 + 2 * 512 + 3 * 8192), 49152 * 2048),
)


@dataclass(frozen=True)
class Tokens:
    """Of linears alone, without attention: all performance cores, each at its highest clock."""

    device: str
    model: str
    format: str
    decode_memory: float  # tokens a second if only memory limits
    decode_compute: float  # if only the cores do
    decode: float
    prefill: float


def our(rows: list[Row], isa: str, format_: str, phase: str, cpu: str) -> Row:
    wanted = (OUR_KERNELS, isa, format_, phase, cpu)
    return next(r for r in rows if (r.kernel, r.isa, r.format, r.phase, r.cpu) == wanted)


def seconds(rows: list[Row], profile: DeviceProfile, format_: str, phase: str, count: int) -> float:
    """Of `count` products, by all performance cores."""
    a_second = sum(
        each.count * each.max_ghz * 1e9
        * our(rows, profile.isa, format_, phase, STAND_INS[each.microarchitecture]).rate
        for each in profile.cores
        if each.performance
    )  # fmt: skip
    return count / a_second


def tokens(rows: list[Row]) -> Iterator[Tokens]:
    profiles = [each for each in list_profiles() if each.isa in ISAS]
    for profile, model, format_ in product(profiles, MODELS, ("int4", "nf4")):
        size = (model.linears * BITS[format_] + model.head * BITS["int8"]) / 8
        memory = profile.bandwidth_bytes_per_second.sustained / size
        compute = 1 / (
            seconds(rows, profile, format_, "decode", model.linears)
            + seconds(rows, profile, "int8", "decode", model.head)
        )
        prefill = 1 / seconds(rows, profile, format_, "prefill", model.linears)
        each = (memory, compute, min(memory, compute), prefill)
        yield Tokens(profile.id, model.name, format_, *(round(value, 1) for value in each))


def read(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            yield Row(
                line["kernel"], line["isa"], line["format"], line["phase"], line["cpu"],
                int(line["loop_instructions"]), int(line["loop_products"]),
                float(line["products_per_cycle"]), float(line["instructions_per_product"]),
            )  # fmt: skip


def write(path: Path, rows: Sequence[Row | Tokens]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


@click.command(help=__doc__)
@click.argument("build", type=click.Path(exists=True, path_type=Path))
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--llvm-mca", "mca", default="llvm-mca", show_default=True)
def main(build: Path, results: Path, mca: str) -> None:
    path = results / KERNELS
    others = [row for row in read(path) if row.kernel != OUR_KERNELS]
    rows = [*ours(build, mca), *others]
    write(path, rows)
    write(results / TOKENS, [*tokens(rows)])


if __name__ == "__main__":
    main()
