"""What other projects' ARM kernels cost, measured as arm_kernels.py measures ours; tables of both.

    PYTHONPATH=tests python -m benchmarks.arm_others tests/benchmarks/results \\
        --kleidiai FOLDER --llama FOLDER

Compiles what it needs of their sources. Needs what arm_kernels.py needs.
"""

import csv
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click

from benchmarks.arm_kernels import (
    ISAS,
    KERNELS,
    OUR_KERNELS,
    PHASES,
    Row,
    architecture,
    compiled,
    inner_loop,
    instructions_per_product,
    measured,
    our,
    read,
    run,
    write,
)
from benchmarks.table import markdown

NEON, DOTPROD, I8MM = ISAS
# The part that differs of the names of functions and files: where it runs, as what.
MATMUL = "matmul_clamp_f32"
KLEIDIAI = {
    "qsi8d32p1x4_qsi4c32p4x4_1x4_neon_dotprod": ((DOTPROD, I8MM), "decode"),
    "qsi8d32p1x8_qsi4c32p4x8_1x4x32_neon_dotprod": ((DOTPROD, I8MM), "decode"),
    "qsi8d32p4x4_qsi4c32p4x4_16x4_neon_dotprod": ((DOTPROD,), "prefill"),
    "qsi8d32p4x8_qsi4c32p4x8_16x4_neon_i8mm": ((I8MM,), "prefill"),
    "qsi8d32p4x8_qsi4c32p4x8_8x4x32_neon_i8mm": ((I8MM,), "prefill"),
}
LLAMA = {
    "vec_dot_q4_0": ((NEON,), "int4", ("decode", "prefill")),
    "vec_dot_iq4_nl": ((NEON,), "nf4", ("decode", "prefill")),
    "gemv_q4_0_4x4": ((DOTPROD,), "int4", ("decode",)),
    "gemm_q4_0_4x4": ((DOTPROD,), "int4", ("prefill",)),
    "gemv_q4_0_4x8": ((I8MM,), "int4", ("decode",)),
    "gemm_q4_0_4x8": ((I8MM,), "int4", ("prefill",)),
    "gemv_iq4_nl_4x4": ((DOTPROD, I8MM), "nf4", ("decode",)),
    "gemm_iq4_nl_4x4": ((DOTPROD, I8MM), "nf4", ("prefill",)),
}


@dataclass(frozen=True)
class Kernel:
    """Another project's function, and in which the inner loop is."""

    name: str
    isas: Sequence[str]
    format: str
    phases: Sequence[str]
    function: str
    loop: str
    header: Path
    sources: Sequence[Path]
    includes: Sequence[Path]


def kleidiai(folder: Path) -> Iterator[Kernel]:
    for variant, (isas, phase) in KLEIDIAI.items():
        name = f"{MATMUL}_{variant}"
        file = folder / "kai/ukernels/matmul" / f"{MATMUL}_qsi8d32p_qsi4c32p" / f"kai_{name}"
        header, *sources = (Path(f"{file}{end}") for end in (".h", ".c", "_asm.S"))
        yield Kernel(
            f"kleidiai {variant.split('_')[2]}", isas, "int4", [phase], f"kai_run_{name}",
            f"kai_kernel_{name}", header, sources, [folder],
        )  # fmt: skip


def llama(folder: Path) -> Iterator[Kernel]:
    source = folder / "ggml/src"
    cpu = source / "ggml-cpu"
    for name, (isas, format_, phases) in LLAMA.items():
        function = f"ggml_{name}_q8_0"
        header, file = ("quants.h", "quants.c") if "dot" in name else ("repack.h", "repack.cpp")
        yield Kernel(
            f"llama.cpp {name}", isas, format_, phases, function, function, cpu / header,
            [cpu / "arch/arm" / file], [folder / "ggml/include", source, cpu],
        )  # fmt: skip


def program(folder: Path, kernel: Kernel, isa: str) -> Path:
    """What calls it, without the functions of those files that it does not need."""
    options = [*architecture(isa), *(f"-I{path}" for path in kernel.includes)]
    objects = [folder / f"{source.name}.o" for source in kernel.sources]
    for source, output in zip(kernel.sources, objects, strict=True):
        command = ("aarch64-linux-gnu-gcc", "-O3", "-DNDEBUG", "-ffunction-sections", *options)
        run(*command, "-c", source, "-o", output)
    caller = ("-include", kernel.header, f"-DFUNCTION={kernel.function}", "-O2", *options)
    linked = (*objects, "-static", "-Wl,--gc-sections")
    return compiled(folder / "other_calls", "arm_other_calls.cc", *caller, *linked)


def others(kernels: Sequence[Kernel], mca: str) -> Iterator[Row]:
    for kernel, isa in ((each, isa) for each in kernels for isa in each.isas):
        with tempfile.TemporaryDirectory() as folder:
            calls = program(Path(folder), kernel, isa)
            loop = inner_loop(calls, kernel.loop)
            for phase in kernel.phases:
                whole = instructions_per_product(isa, PHASES[phase], calls)
                yield from measured(kernel.name, isa, kernel.format, phase, loop, whole, mca)


# ---- beside ours ------------------------------------------------------------------------------


def tables(rows: list[Row]) -> str:
    """For README.md."""
    return ratios(rows) + "\n" + instructions(rows)


def ratios(rows: list[Row]) -> str:
    """Our products a cycle divided by the best other's, and those of nf4 by those of int4."""
    columns = product(PHASES, ("int4", "nf4", "nf4 ÷ int4"))
    head = ["", *(f"{phase}, {name}" for phase, name in columns)]
    lines = []
    for isa, cpu in ((isa, cpu) for isa, about in ISAS.items() for cpu in about.cpus):
        cells = [f"{isa}, {cpu}"]
        for phase in PHASES:
            int4, nf4 = (our(rows, isa, each, phase, cpu).rate for each in ("int4", "nf4"))
            others = (best(rows, isa, each, phase, cpu) for each in ("int4", "nf4"))
            quotients = zip((int4, nf4, nf4), (*others, int4), strict=True)
            cells += [f"{a / b:.2f}" for a, b in quotients]
        lines.append(cells)
    return markdown(head, lines)


def best(rows: list[Row], isa: str, format_: str, phase: str, cpu: str) -> float:
    wanted = (isa, format_, phase, cpu)
    return max(
        row.rate
        for row in rows
        if row.kernel != OUR_KERNELS and (row.isa, row.format, row.phase, row.cpu) == wanted
    )


def instructions(rows: list[Row]) -> str:
    """Of whole calls, a product; of several kernels of a project the one with the fewest."""
    columns = [
        (OUR_KERNELS, "int4"), ("kleidiai", "int4"), ("llama.cpp", "int4"),
        (OUR_KERNELS, "nf4"), ("llama.cpp", "nf4"),
    ]  # fmt: skip
    head = ["", "int4", "KleidiAI", "llama.cpp Q4_0", "nf4", "llama.cpp IQ4_NL"]
    lines = [
        [f"{isa}, {phase}", *(fewest(rows, isa, phase, *each) for each in columns)]
        for isa, phase in product(ISAS, PHASES)
    ]
    return markdown(head, lines)


def predicted(path: Path) -> str:
    """Of arm_tokens.csv, by device: decode, prefill."""
    cells: dict[str, dict[str, str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            rates = f"{float(line['decode']):.0f}, {float(line['prefill']):.0f}"
            cells.setdefault(line["device"], {})[f"{line['model']} {line['format']}"] = rates
    columns = list(dict.fromkeys(name for of_device in cells.values() for name in of_device))
    lines = [[device, *(mine.get(name, "") for name in columns)] for device, mine in cells.items()]
    return markdown(["decode, prefill", *columns], lines)


def fewest(rows: list[Row], isa: str, phase: str, project: str, format_: str) -> str:
    wanted = (project, isa, format_, phase)
    found = (
        row.instructions_per_product
        for row in rows
        if (row.kernel.split()[0], row.isa, row.format, row.phase) == wanted
    )
    least = min(found, default=None)
    return "" if least is None else f"{least:.3f}"


EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.argument("results", type=EXISTING)
@click.option("--kleidiai", "kleidiai_folder", type=EXISTING, required=True)
@click.option("--llama", "llama_folder", type=EXISTING, required=True)
@click.option("--llvm-mca", "mca", default="llvm-mca", show_default=True)
def main(results: Path, kleidiai_folder: Path, llama_folder: Path, mca: str) -> None:
    path = results / KERNELS
    ours = [row for row in read(path) if row.kernel == OUR_KERNELS]
    kernels = [*kleidiai(kleidiai_folder), *llama(llama_folder)]
    write(path, [*ours, *others(kernels, mca)])


if __name__ == "__main__":
    main()
