"""Makes what `run` measures: checkpoints, bundles, and for each peer an environment and its models.

Everything becomes a step with one product: what exists is left alone, and a step that failed leaves
nothing behind under the product's name. Downloads come from PyPI alone.
"""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.folder import GGUF_RANKS, LLAMA_1B, OURSELVES, RANKS, Peers, offline
from benchmarks.random_adapter import write_random_adapter
from benchmarks.rounds import isa

PEERS = ("edgelora", "llama.cpp", "genai", "openvino")
# An open torch takes gigabytes of CUDA: this is what .ci/constraints.txt has.
TORCH = "torch==2.13.0"
PACKAGES = {
    "genai": [TORCH, "onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "transformers>=5"],
    "openvino": [TORCH, "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf"],
}
LLAMA_TOOLS = ("batched-bench", "completion", "quantize", "perplexity")
# GCC 12 drops what _tile_loadconfig reads but for its first 8 bytes, and then AMX traps.
AMX_OPTIONS = ("-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse -fno-tree-sra",)
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """`make` writes to the path that it is given, which then gets the product's name."""

    product: Path
    make: Callable[[Path], None]

    def run(self) -> None:
        if self.product.exists():
            return
        click.echo(f"making {self.product}", err=True)
        self.product.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.product.with_name("unfinished-" + self.product.name)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
        self.make(unfinished)
        unfinished.rename(self.product)


def steps(peers: Peers, models: Sequence[str], wanted: Sequence[str]) -> Iterator[Step]:
    """In the order in which they build on each other."""
    for model in models:
        write = [sys.executable, "-m", "benchmarks.checkpoints", model]
        yield _command(peers.checkpoint(model), write)
        for rank in RANKS:
            yield _adapter(peers, model, rank)
    environments = {"llama.cpp": llama_steps, "genai": environment, "openvino": environment}
    converted = {
        "edgelora": bundles,
        "llama.cpp": ggufs,
        "genai": genai_models,
        "openvino": openvino_models,
    }
    for peer in wanted:
        if peer in environments:
            yield from environments[peer](peers, peer)
        for model in models:
            yield from converted[peer](peers, model)


def bundles(peers: Peers, model: str) -> Iterator[Step]:
    """Ours, with the options that export has by itself."""
    adapters = {f"rank{rank}": peers.adapter(model, rank) for rank in RANKS}
    merged = {"rank16": adapters["rank16"]}
    kinds: dict[str, Sequence[object]] = {
        "int4": ("--format", "int4"),
        "int4-128": ("--format", "int4", "--block-size", "128"),
        "nf4": ("--format", "nf4"),
        "merged": ("--format", "int4", "--mode", "merge", *_named(merged)),
        "adapters": ("--format", "int4", *_named(adapters)),
    }
    if peers.calibration.exists():
        balanced = ("--quality", "balanced", "--calibration", peers.calibration)
        kinds["balanced"] = balanced
        kinds["balanced-128"] = (*balanced, "--block-size", "128")
    for name, options in kinds.items():
        yield _bundle(peers, model, name, options)
    smallest = peers.model(model) / "edgelora-balanced-128"
    if smallest.is_dir() or peers.calibration.exists():
        product = smallest.with_name(f"{smallest.name}-adapters")
        yield Step(product, lambda path: _with_adapters(smallest, adapters, path))


def llama_steps(peers: Peers, peer: str) -> Iterator[Step]:
    """llama.cpp from the source archive of llama-cpp-python, built for this CPU."""
    yield Step(peers.llama_source, lambda path: _unpack_llama(peers, path))
    tool = peers.llama_tool(LLAMA_TOOLS[0])
    yield Step(tool.parent.parent / "BUILT", lambda path: _build_llama(peers, path))


def environment(peers: Peers, peer: str) -> Iterator[Step]:
    yield Step(peers.environment(peer) / "INSTALLED", lambda path: _install(peers, peer, path))


def ggufs(peers: Peers, model: str) -> Iterator[Step]:
    folder, checkpoint = peers.model(model), peers.checkpoint(model)
    convert: list[object] = [
        sys.executable,
        peers.llama_source / "convert_hf_to_gguf.py",
        checkpoint,
    ]
    yield _command(peers.float_gguf(model), [*convert, "--outtype", "f32", "--outfile"])
    for kind in ("Q4_0", "Q4_K_M"):
        yield Step(folder / f"{kind}.gguf", _quantizing(peers, peers.float_gguf(model), kind))
    convert = [sys.executable, peers.llama_source / "convert_lora_to_gguf.py", "--outtype", "f16"]
    for rank in GGUF_RANKS:
        source = [peers.adapter(model, rank), "--base", checkpoint, "--outfile"]
        yield _command(folder / f"rank{rank}.gguf", [*convert, *source])


def genai_models(peers: Peers, model: str) -> Iterator[Step]:
    """Blocks of 32 and int8 activations, as ours; the head in 4 bits, and in 8."""
    build: list[object] = [*peers.isolated("genai"), "-m", "onnxruntime_genai.models.builder"]
    build += ["-m", peers.checkpoint(model), "-p", "int4", "-e", "cpu"]
    options = ["--extra_options", "accuracy_level=4", "block_size=32", "algo_config=rtn"]
    for name, more in (("int4", []), ("int4-head8", ["matmul_mixed_precision=last_matmul:int8"])):
        command = [*build, *options, *more, "-o"]
        yield _command(peers.model(model) / f"genai-{name}", command)


def openvino_models(peers: Peers, model: str) -> Iterator[Step]:
    """Groups of 64, and of 128 where they divide; the head in 8 bits, which is its default."""
    program = peers.environment("openvino") / "bin" / "optimum-cli"
    export = [*peers.isolated("openvino"), program, "export", "openvino"]
    task = ["--task", "text-generation-with-past", "-m", peers.checkpoint(model)]
    for group, name in ((64, "openvino-int4"), (128, "openvino-int4-128")):
        if model == LLAMA_1B or group == 64:  # SmolLM2's 576 are no groups of 128
            options = ["--weight-format", "int4", "--group-size", group]
            yield _command(peers.model(model) / name, [*export, *options, *task])


def _adapter(peers: Peers, model: str, rank: int) -> Step:
    checkpoint = peers.checkpoint(model)
    return Step(
        peers.adapter(model, rank), lambda path: write_random_adapter(checkpoint, rank, path)
    )


def _named(adapters: dict[str, Path]) -> list[str]:
    return [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]


def _bundle(peers: Peers, model: str, name: str, options: Sequence[object]) -> Step:
    export = [*OURSELVES, "export", peers.checkpoint(model), "--no-report", *options, "-o"]
    return _command(peers.model(model) / f"edgelora-{name}", export)


def _command(product: Path, command: Sequence[object]) -> Step:
    """A program whose last argument is the output."""
    return Step(product, lambda path: _call([*command, path]))


def _with_adapters(bundle: Path, adapters: dict[str, Path], path: Path) -> None:
    shutil.copytree(bundle, path)
    for name, folder in adapters.items():
        _call([*OURSELVES, "add-adapter", path, f"{name}={folder}"])


def _quantizing(peers: Peers, source: Path, kind: str) -> Callable[[Path], None]:
    return lambda path: _call([peers.llama_tool("quantize"), source, path, kind])


def _unpack_llama(peers: Peers, path: Path) -> None:
    """PyPI's archive, whose vendor/llama.cpp is the project; its metadata step builds nothing."""
    download = peers.root / "llama.cpp" / "download"
    shutil.rmtree(download, ignore_errors=True)  # of an older version
    fetch = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python"]
    _call([sys.executable, "-m", "pip", *fetch, "-d", download])
    [archive] = download.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(download, filter="data")
    name = archive.name.removesuffix(".tar.gz")
    (download / name / "vendor" / "llama.cpp").rename(path)
    peers.llama_version.write_text(name.replace("_", "-") + "\n")


def _build_llama(peers: Peers, path: Path) -> None:
    build = path.parent
    options = (*LLAMA_OPTIONS, *(AMX_OPTIONS if isa() == "amx_bf16" else ()))
    _call(["cmake", "-S", peers.llama_source, "-B", build, *options])
    targets = [f"llama-{tool}" for tool in LLAMA_TOOLS]
    _call(["cmake", "--build", build, "--parallel", "2", "--target", *targets])
    path.touch()


def _install(peers: Peers, peer: str, path: Path) -> None:
    folder = path.parent
    _call([sys.executable, "-m", "venv", folder])
    _call([peers.python(peer), "-m", "pip", "install", *PACKAGES[peer]])
    # Optimum brings torchvision, which only imports beside a CUDA build of torch.
    _call([peers.python(peer), "-m", "pip", "uninstall", "--yes", "torchvision"])
    path.touch()


def _call(command: Sequence[object]) -> None:
    """What it says goes through to the terminal. Raises click's error if it fails."""
    parts = [str(part) for part in command]
    if subprocess.run(parts, env=offline(), stdout=sys.stderr).returncode:
        raise click.ClickException(f"failed: {' '.join(parts)}")
