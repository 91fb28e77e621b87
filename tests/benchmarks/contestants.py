"""Who takes part, and how one measurement of each is started and read.

Every measurement is a process of its own: it loads, warms up, and measures one prefill and the
decode behind it, batch 1.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.folder import GGUF_RANKS, OURSELVES, RANKS, Peers, offline

PROGRAMS = Path(__file__).parent
LONGEST = 1800  # seconds of one measurement
OURS = "EdgeLoRA"
OURS_INT4 = f"{OURS} int4"
MERGED = f"{OURS_INT4}, rank 16 merged"
LOADED = f"{OURS_INT4}, adapters loaded"
SMALLEST = f"{OURS_INT4}, balanced, block 128"


@dataclass(frozen=True)
class Load:
    """What every contestant does."""

    threads: int
    prompt_tokens: int
    new_tokens: int


Rates = tuple[float, float]  # tokens a second: prefill, decode
Command = Sequence[object]


@dataclass(frozen=True)
class Contestant:
    """weights: the files that decode streams, the base's first; it takes part when all exist."""

    name: str
    weights: tuple[Path, ...]
    command: Callable[[Load], Command]
    parse: Callable[[str], Rates]
    version: Callable[[], str]

    @property
    def ready(self) -> bool:
        return all(path.exists() for path in (*self.weights, self.program))

    @property
    def program(self) -> Path:
        """What the command starts."""
        return Path(str(self.command(Load(1, 1, 1))[0]))

    @property
    def weight_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weights)

    def measure(self, load: Load) -> Rates:
        """Runs the command. Raises RuntimeError with the end of what it said if it fails."""
        return self.parse(output(self.command(load)))


def about_adapters(name: str) -> bool:
    """Whether a contestant of this name is there for the sake of an adapter."""
    return "rank" in name or "adapters" in name


def output(command: Command) -> str:
    """Everything the program says, on both streams, the one with the results last."""
    parts = [str(part) for part in command]
    done = subprocess.run(
        parts,
        capture_output=True,
        text=True,
        env=offline(),
        stdin=subprocess.DEVNULL,
        timeout=LONGEST,
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-1500:]
        raise RuntimeError(f"{parts[0]} failed ({done.returncode}):\n{said}")
    return done.stderr + done.stdout


def contestants(peers: Peers, model: str) -> Iterator[Contestant]:
    """All that there could be, ours first."""
    folder = peers.model(model)
    for name in ("int4", "nf4"):
        yield edgelora(f"{OURS} {name}", folder / f"edgelora-{name}")
    yield edgelora(f"{OURS_INT4}, block 128", folder / "edgelora-int4-128")
    yield edgelora(f"{OURS_INT4}, balanced", folder / "edgelora-balanced")
    yield edgelora(SMALLEST, folder / "edgelora-balanced-128")
    yield edgelora(MERGED, folder / "edgelora-merged")
    yield edgelora(LOADED, folder / "edgelora-adapters", load=True)
    for rank in RANKS:
        yield edgelora(f"{OURS_INT4} + rank {rank}", folder / "edgelora-adapters", rank=rank)
    for rank in (16, 64):
        bundle = folder / "edgelora-balanced-128-adapters"
        yield edgelora(f"{SMALLEST} + rank {rank}", bundle, rank=rank)
    for name in ("Q4_0", "Q4_K_M"):
        yield llama_cpp(peers, f"llama.cpp {name}", folder / f"{name}.gguf")
    for rank in (0, *GGUF_RANKS):  # 0: none, by the tool that can have one
        adapters = [folder / f"rank{rank}.gguf"] if rank else []
        name = f"llama.cpp Q4_0 + rank {rank}"
        yield llama_cpp_adapter(peers, name, folder / "Q4_0.gguf", adapters)
    for name in ("int4", "int4-head8"):
        yield genai(peers, folder / f"genai-{name}")
    yield openvino(peers, "OpenVINO GenAI int4", folder / "openvino-int4")
    yield openvino(peers, "OpenVINO GenAI int4, group 128", folder / "openvino-int4-128")


def place(name: str) -> int:
    """In tables and figures; behind all others what is no contestant any more."""
    names = [each.name for each in contestants(Peers(Path()), "")]
    return names.index(name) if name in names else len(names)


def edgelora(name: str, bundle: Path, *, rank: int | None = None, load: bool = False) -> Contestant:
    """Ours; with `load` the bundle's adapters are loaded and none is active."""
    options: list[object] = ["--adapter", f"rank{rank}"] if rank else []
    if load:
        options = [part for each in RANKS for part in ("--load", f"rank{each}")]
    weights = [bundle / "model.onnx.data"]
    if rank:
        weights.append(bundle / "adapters" / f"rank{rank}" / "adapter.safetensors")

    def command(load: Load) -> Command:
        start: Command = [*OURSELVES, "bench", bundle, "--json", *options]
        sizes = ["--prompt-tokens", load.prompt_tokens, "--new-tokens", load.new_tokens]
        return [*start, "--threads", load.threads, "--repeats", 1, *sizes]

    def parse(said: str) -> Rates:
        figures = json.loads(said[said.index("{") :])
        return figures["prefill_tokens_per_second"], figures["decode_tokens_per_second"]

    return Contestant(name, tuple(weights), command, parse, lambda: version("edgelora"))


def llama_cpp(peers: Peers, name: str, gguf: Path) -> Contestant:
    """Its batched-bench with one sequence; the first prompt is the warm-up."""

    def command(load: Load) -> Command:
        prompts = f"{min(load.prompt_tokens, 512)},{load.prompt_tokens}"
        sizes: Command = ["-npp", prompts, "-ntg", load.new_tokens, "-npl", 1]
        context = load.prompt_tokens + load.new_tokens + 64
        start: Command = [peers.llama_tool("batched-bench"), "-m", gguf, "-c", context]
        threads: Command = ["-t", load.threads, "-tb", load.threads]
        return [*start, *threads, *sizes, "--output-format", "jsonl"]

    def parse(said: str) -> Rates:
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return lines[-1]["speed_pp"], lines[-1]["speed_tg"]

    return Contestant(name, (gguf,), command, parse, lambda: _llama_version(peers))


def llama_cpp_adapter(peers: Peers, name: str, gguf: Path, adapters: Sequence[Path]) -> Contestant:
    """Its completion tool, the one of those that measure that takes adapters; it warms up itself.

    The prompt is a text of about as many tokens; the tool says how fast those it had were.
    """

    def command(load: Load) -> Command:
        active = [part for adapter in adapters for part in ("--lora", adapter)]
        start: Command = [peers.llama_tool("completion"), "-m", gguf, *active]
        threads: Command = ["-t", load.threads, "-tb", load.threads, "-no-cnv", "--ignore-eos"]
        context = 2 * load.prompt_tokens + load.new_tokens + 64
        prompt: Command = ["-p", " time" * load.prompt_tokens, "-c", context]
        return [*start, *threads, *prompt, "-n", load.new_tokens + 1, "--temp", 0]

    def parse(said: str) -> Rates:
        found = re.findall(r"(prompt eval|eval) time =.*?([\d.]+) tokens per second", said)
        rates = {name: float(rate) for name, rate in found}
        return rates["prompt eval"], rates["eval"]

    return Contestant(name, (gguf, *adapters), command, parse, lambda: _llama_version(peers))


def genai(peers: Peers, folder: Path) -> Contestant:
    kind = folder.name.removeprefix("genai-").replace("-head8", ", int8 head")
    name = f"onnxruntime-genai {kind}"
    return _scripted(peers, name, "genai", folder / "model.onnx.data", "onnxruntime-genai")


def openvino(peers: Peers, name: str, folder: Path) -> Contestant:
    return _scripted(peers, name, "openvino", folder / "openvino_model.bin", "openvino-genai")


def _scripted(peers: Peers, name: str, peer: str, weights: Path, package: str) -> Contestant:
    def command(load: Load) -> Command:
        program = PROGRAMS / f"run_{peer}.py"
        sizes = (load.threads, load.prompt_tokens, load.new_tokens)
        return [*peers.isolated(peer), program, weights.parent, *sizes]

    def parse(said: str) -> Rates:
        prefill, decode = json.loads(said.splitlines()[-1])
        return prefill, decode

    def its_version() -> str:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return output([*peers.isolated(peer), "-c", code]).strip().splitlines()[-1]

    return Contestant(name, (weights,), command, parse, its_version)


def _llama_version(peers: Peers) -> str:
    return peers.llama_version.read_text().strip()
