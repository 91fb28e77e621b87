"""Decode and prefill beside llama.cpp, ONNX Runtime GenAI and OpenVINO GenAI, interleaved in one
run.

Every round runs each contestant once in a process of its own, so that a machine that slows down
slows all of them; the table has medians. It takes an idle machine: other load costs those whose
threads wait for each other many times more than the rest. A peer takes part when its model is given
(README.md beside this file prepares them):

python tests/benchmarks/peers.py BUNDLE --llama-bench PATH --gguf Q4_0.gguf --gguf Q4_K_M.gguf \\
--genai PYTHON FOLDER --openvino PYTHON FOLDER --csv tests/benchmarks/results/peers.csv
"""

import csv
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import click

GENAI = """
import json, sys, time
import onnxruntime_genai as og
folder, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
config = og.Config(folder)
options = {"session_options": {"intra_op_num_threads": threads}}
config.overlay(json.dumps({"model": {"decoder": options}}))
model = og.Model(config)
def run():
    params = og.GeneratorParams(model)
    length = prompt + new + 1
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens([(7 * i + 11) % 49152 for i in range(prompt)])
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(new):
        generator.generate_next_token()
    return first - start, time.perf_counter() - first
run()
a, b = run()
print(json.dumps([prompt / a, new / b]))
"""
OPENVINO = """
import json, sys, time
import numpy as np, openvino as ov, openvino_genai as g
folder, threads, prompt, new = sys.argv[1], *map(int, sys.argv[2:])
pipe = g.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
config = g.GenerationConfig(max_new_tokens=new + 1, min_new_tokens=new + 1, ignore_eos=True)
config.do_sample = False
def run(offset):
    ids = np.array([[(7 * i + offset) % 49152 for i in range(prompt)]], np.int64)
    inputs = g.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    return pipe.generate(inputs, config).perf_metrics
run(12)  # the pipeline keeps a prompt's kv_cache: a second run of one prompt would skip its prefill
metrics = run(11)
assert metrics.get_num_generated_tokens() == new + 1
print(json.dumps([1000 * prompt / metrics.get_ttft().mean, 1000 / metrics.get_tpot().mean]))
"""


@dataclass(frozen=True)
class Load:
    """What every contestant does."""

    threads: int
    prompt_tokens: int
    new_tokens: int


Rates = tuple[float, float]  # tokens a second: prefill, decode
Contestant = Callable[[Load], Rates]


def output(command: list[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def edgelora(bundle: Path, adapter: str | None) -> Contestant:
    def run(load: Load) -> Rates:
        command: list[object] = [sys.executable, "-m", "edgelora", "bench", bundle, "--json"]
        command += ["--threads", load.threads, "--repeats", 1]
        command += ["--prompt-tokens", load.prompt_tokens, "--new-tokens", load.new_tokens]
        said = json.loads(output(command + (["--adapter", adapter] if adapter else [])))
        return said["prefill_tokens_per_second"], said["decode_tokens_per_second"]

    return run


def llama_cpp(binary: Path, gguf: Path) -> Contestant:
    def run(load: Load) -> Rates:
        common: list[object] = [binary, "-m", gguf, "-t", load.threads, "--poll", 0, "-r", 1]
        common += ["-o", "json"]
        # decode begins behind the prompt, as the others' does
        prefill = ["-p", load.prompt_tokens, "-n", 0]
        decode = ["-p", 0, "-n", load.new_tokens, "-d", load.prompt_tokens]
        [prefilled], [decoded] = (json.loads(output(common + part)) for part in (prefill, decode))
        return prefilled["avg_ts"], decoded["avg_ts"]

    return run


def scripted(python: Path, program: str, folder: Path) -> Contestant:
    def run(load: Load) -> Rates:
        sizes = (load.threads, load.prompt_tokens, load.new_tokens)
        said = output([python, "-c", program, folder, *sizes])
        prefill, decode = json.loads(said.splitlines()[-1])
        return prefill, decode

    return run


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--adapter", multiple=True, help="Measure the bundle with this adapter too.")
@click.option("--other", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--llama-bench", type=click.Path(exists=True, path_type=Path))
@click.option("--gguf", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--genai", nargs=2, multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--openvino", nargs=2, multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--threads", default=2, show_default=True)
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--new-tokens", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path))
def main(
    bundle: Path,
    adapter: tuple[str, ...],
    other: tuple[Path, ...],
    llama_bench: Path | None,
    gguf: tuple[Path, ...],
    genai: tuple[tuple[Path, Path], ...],
    openvino: tuple[tuple[Path, Path], ...],
    threads: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    csv_path: Path | None,
) -> None:
    """Runs all contestants ROUNDS times in turn."""
    contestants = {f"edgelora {bundle.name}": edgelora(bundle, None)}
    contestants |= {f"edgelora {path.name}": edgelora(path, None) for path in other}
    contestants |= {f"edgelora {bundle.name} + {name}": edgelora(bundle, name) for name in adapter}
    if llama_bench:
        contestants |= {f"llama.cpp {path.stem}": llama_cpp(llama_bench, path) for path in gguf}
    contestants |= {
        f"onnxruntime-genai {p.name}": scripted(python, GENAI, p) for python, p in genai
    }
    contestants |= {f"OpenVINO {p.name}": scripted(python, OPENVINO, p) for python, p in openvino}
    load = Load(threads, prompt_tokens, new_tokens)
    rates = measure(contestants, load, rounds)
    report(rates, load, csv_path)


def measure(contestants: dict[str, Contestant], load: Load, rounds: int) -> dict[str, list[Rates]]:
    """All rates by contestant, in the order of the rounds."""
    rates: dict[str, list[Rates]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, run in contestants.items():
            rates[name].append(run(load))
            click.echo(f"round {number + 1}  {name:40} {rates[name][-1]}", err=True)
    return rates


def report(rates: dict[str, list[Rates]], load: Load, csv_path: Path | None) -> None:
    """Prints medians; appends every single figure to the CSV."""
    for name, runs in rates.items():
        prefill, decode = (statistics.median(run[i] for run in runs) for i in range(2))
        click.echo(f"{name:44} prefill {prefill:8.0f}  decode {decode:8.1f}")
    if csv_path is None:
        return
    about = asdict(load) | {
        "machine": machine(),
        "edgelora": version("edgelora"),
        "commit": commit(),
    }
    rows = [
        {"contestant": name, "round": i, "prefill": run[0], "decode": run[1]} | about
        for name, runs in rates.items()
        for i, run in enumerate(runs)
    ]
    new = not csv_path.exists()
    with csv_path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        if new:
            writer.writeheader()
        writer.writerows(rows)


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} × {models[0]}" if models else platform.machine()


def commit() -> str:
    return output(["git", "rev-parse", "--short", "HEAD"]).strip()


if __name__ == "__main__":
    main()
