"""./dev bench: prepares the peers, measures them beside EdgeLoRA, draws the figures."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import click

from benchmarks import (
    arm_kernels,
    arm_others,
    bandwidth,
    limits,
    losses,
    paired,
    plots,
    scaling,
    table,
    targets,
)
from benchmarks.contestants import Load
from benchmarks.figures import SPEED, append, machine_folder, named_machine, read, read_quality
from benchmarks.folder import MODELS, SMOLLM2, Peers
from benchmarks.prepare import PEERS, steps
from benchmarks.roofline import draw_roofline
from benchmarks.rounds import Setting, measure, turns
from edgelora.errors import EdgeLoraError

folder_option = click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(".venv/peers"),
    show_default=True,
    help="Where peers and models lie.",
)
model_option = click.option(
    "--model", "models", type=click.Choice(MODELS), multiple=True, help="Only these models."
)
csv_option = click.option(
    "--csv", "csv_path", type=click.Path(path_type=Path), default=SPEED, help="The figures."
)


class PromptAndNew(click.ParamType[tuple[int, int]]):
    """128:64."""

    name = "PROMPT:NEW"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        prompt, _, new = str(value).partition(":")
        if not (prompt.isdecimal() and new.isdecimal() and int(prompt) and int(new)):
            self.fail(f"{value}: expected two counts of tokens, such as 128:64", param, ctx)
        return int(prompt), int(new)


threads_option = click.option(
    "--threads", type=click.IntRange(1), multiple=True, default=(2, 1), show_default=True
)


def loads_option(*default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Prompts and new tokens to measure."""
    return click.option(
        "--load", "loads", type=PromptAndNew(), multiple=True, default=default, show_default=True
    )


def of_machine(setting: Setting) -> Path:
    """Where results that stand for one machine lie."""
    return SPEED.parent / machine_folder(named_machine(setting.machine, setting.isa))


class OneLine(click.Group):
    """Ends in one line where EdgeLoRA refuses something."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except EdgeLoraError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=OneLine, invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Speed of EdgeLoRA beside llama.cpp, ONNX Runtime GenAI and OpenVINO GenAI.

    Without a command: prepare, run, plot and table, one after the other.
    """
    if context.invoked_subcommand is None:
        for command in (prepare, run, plot, write_table):
            context.invoke(command)


@main.command()
@folder_option
@model_option
@click.option("--peer", "peers", type=click.Choice(PEERS), multiple=True, help="Only these.")
def prepare(folder: Path, models: tuple[str, ...], peers: tuple[str, ...]) -> None:
    """Makes what is missing: models, bundles, environments (20 GB, an hour on two cores)."""
    for step in steps(Peers(folder.absolute()), list(models or MODELS), list(peers or PEERS)):
        step.run()


@main.command()
@folder_option
@model_option
@csv_option
@threads_option
@loads_option("128:64", "512:32", "2000:32")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--only", multiple=True, help="A part of a contestant's name, * allowed; repeatable.")
@click.option("--run", "run_name", help="Adds rows to this run instead of a new one.")
def run(
    folder: Path,
    models: tuple[str, ...],
    csv_path: Path,
    threads: tuple[int, ...],
    loads: tuple[tuple[int, int], ...],
    rounds: int,
    only: tuple[str, ...],
    run_name: str | None,
) -> None:
    """Measures who is prepared, in rounds; without any preparation, EdgeLoRA alone on SmolLM2."""
    if only and csv_path == SPEED and not run_name:
        raise click.UsageError(
            "a run of some would take the place of a whole one in the tables: "
            "say --csv FILE, or --run and the run that they add to"
        )
    peers = Peers(folder.absolute())
    wanted = [Load(count, *load) for count in threads for load in loads]
    round_of_turns = list(turns(peers, models or MODELS, wanted, only))
    if not round_of_turns and not models and not only:
        for step in steps(peers, [SMOLLM2], ["edgelora"]):
            step.run()
        round_of_turns = list(turns(peers, models or MODELS, wanted, only))
    if not round_of_turns:
        raise click.ClickException("no such contestant: see --only, and ./dev bench prepare")
    failures = measure(peers, round_of_turns, rounds, Setting.here(run_name), csv_path)
    if failures:
        raise click.ClickException(f"{len(failures)} measurements failed:\n" + "\n".join(failures))


@main.command("paired")
@folder_option
@model_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=paired.CSV)
@threads_option
@loads_option("128:32", "512:16")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
def measure_paired(
    folder: Path,
    models: tuple[str, ...],
    csv_path: Path,
    threads: tuple[int, ...],
    loads: tuple[tuple[int, int], ...],
    rounds: int,
) -> None:
    """EdgeLoRA's bundles and adapters beside each other, in one process, in turn."""
    peers, setting = Peers(folder.absolute()), Setting.here(None)
    if not any(paired.sides(peers, model) for model in models or MODELS):
        raise click.ClickException("no bundle of these models: see ./dev bench prepare")
    for model in models or MODELS:
        for count in threads:
            for each in loads:
                for row in paired.measure(peers, model, Load(count, *each), rounds, setting):
                    append(csv_path, row)
                click.echo(f"{model}, {count} threads, {each[0]} tokens: {rounds} rounds", err=True)


@main.command("scaling")
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="At most.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
def measure_scaling(bundle: Path, threads: int, repeats: int) -> None:
    """EdgeLoRA alone over the length of the context, the batch (of all cores) and the threads."""
    setting = Setting.here(None)
    points = []
    for point in scaling.measure(bundle, threads, repeats):
        click.echo(point, err=True)
        points.append(point)
    with tempfile.TemporaryDirectory() as scratch:
        stream = bandwidth.build(Path(scratch))
        streamed = bandwidth.streamed(stream, bundle / "model.onnx.data", threads)
    about = f"{bundle.name}, {setting.machine} {setting.isa}, {streamed:.1f} GB/s"
    about += f", {setting.run}, commit {setting.commit}"
    scaling.write(points, about, of_machine(setting))


@main.command("limits")
@folder_option
@model_option
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=limits.CSV)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def measure_limits(folder: Path, models: tuple[str, ...], csv_path: Path, threads: int) -> None:
    """Measures load, adapter switch, resident memory and the library's size against targets."""
    for measure_one in limits.measures(Peers(folder.absolute()), models or MODELS, threads):
        found = list(measure_one())
        limits.append(csv_path, found)
        for limit in found:
            click.echo(limit.line)


@main.command()
@csv_option
@click.option("--to", type=click.Path(path_type=Path), default=SPEED.parent)
def plot(csv_path: Path, to: Path) -> None:
    """Draws the figures of the CSV as SVG."""
    for path in plots.draw(read(csv_path), to, read(paired.CSV)):
        click.echo(path)


@main.command()
@click.argument("output", type=click.File())
@click.option("--to", type=click.Path(path_type=Path), help="[default: this machine's results]")
@click.option("--peak", type=float, help="GMAC/s that the cores could do at most.")
def roofline(output: TextIO, to: Path | None, peak: float | None) -> None:
    """Draws what kernels_bench said (a file, or - for stdin), and keeps it beside the drawing."""
    said, setting = output.read(), Setting.here(None)
    to = to or of_machine(setting)
    to.mkdir(parents=True, exist_ok=True)
    about = f"# {setting.machine} {setting.isa}, {setting.run}, commit {setting.commit}\n"
    click.echo(draw_roofline(said, to / "roofline.svg", peak))
    (to / "kernels.txt").write_text(said if said.startswith("#") else about + said)


@main.command("losses")
@folder_option
@model_option
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--windows", type=click.IntRange(1), default=24, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), default=losses.CSV)
def measure_losses(
    folder: Path, models: tuple[str, ...], text: Path, windows: int, csv_path: Path
) -> None:
    """KL divergence of every prepared bundle and of llama.cpp's files, on TEXT."""
    for model in models or MODELS:
        for loss in losses.measure(Peers(folder.absolute()), model, text, windows):
            losses.write(csv_path, [loss])
            click.echo(loss)


@main.command("table")
@csv_option
@click.option("--check", is_flag=True, help="Write nothing; fail if README and CSV disagree.")
def write_table(csv_path: Path, *, check: bool) -> None:
    """Writes the CSV's medians into the READMEs, which targets are met into ARCHITECTURE.md."""
    for path, name, tables in generated(csv_path):
        wanted = table.inserted(path.read_text(), name, tables)
        if check and path.read_text() != wanted:
            raise click.ClickException(f"{path.name} and the CSV disagree: run ./dev bench table")
        path.write_text(wanted)


def generated(csv_path: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, name of the marks, what belongs between them)"""
    rows, lost = read(csv_path), losses.read()
    yield table.README, "speed", table.tables(rows, lost, threads=2)
    yield arm_kernels.README, "speed", table.tables(rows, lost, threads=1)
    on_code = read_quality("quality-code.csv")
    yield table.README, "quality", table.quality(read_quality(), on_code, lost)
    yield targets.ARCHITECTURE, "targets", targets.tables(rows, lost, read(paired.CSV))
    yield targets.ARCHITECTURE, "limits", limits.tables(limits.read())
    arm = list(arm_kernels.read(SPEED.parent / arm_kernels.KERNELS))
    yield arm_kernels.README, "arm", arm_others.tables(arm)
    predicted = arm_others.predicted(SPEED.parent / arm_kernels.TOKENS)
    yield arm_kernels.README, "tokens", predicted


if __name__ == "__main__":
    main()
