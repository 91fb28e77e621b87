"""What the prepared bundles lose, and llama.cpp's files: the KL divergence beside the speed.

As quality.py: windows of 512 tokens, the second half of each scored against the float model.
"""

import csv
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM

import edgelora
from benchmarks.contestants import OURS, OURS_INT4, about_adapters, contestants
from benchmarks.figures import Row
from benchmarks.folder import Peers
from benchmarks.quality import WINDOW, Score, score_window, token_windows
from edgelora.errors import EdgeLoraError

CSV = Path(__file__).parent / "results" / "losses.csv"
GGUFS = ("Q4_0", "IQ4_NL", "Q4_1", "Q4_K_S", "Q4_K_M", "Q8_0")
NO_WORSE_THAN = "llama.cpp Q4_0"  # the bundle measured must be


@dataclass(frozen=True)
class Loss:
    """One contestant's, in nats and shares; tokens: scored; megabytes: of llama.cpp's tensors."""

    model: str
    contestant: str
    mean_kl: float
    kl_99_percent: float
    same_top_token: float
    perplexity: float
    tokens: int
    text: str
    megabytes: float = 0.0


def measure(peers: Peers, model: str, text: Path, windows: int) -> Iterator[Loss]:
    """Of every prepared bundle without adapters, of the float model, of llama.cpp's files."""
    yield from _ours(peers, model, text, windows)
    if peers.llama_tool("perplexity").exists():
        yield from _llama_cpp(peers, model, text, windows)


def _ours(peers: Peers, model: str, text: Path, windows: int) -> Iterator[Loss]:
    models = {
        each.name: edgelora.load(each.weights[0].parent)
        for each in contestants(peers, model)
        if each.ready and each.name.startswith(OURS) and not about_adapters(each.name)
    }
    if not models:
        raise EdgeLoraError(f"{peers.model(model)}: no bundle in it; see ./dev bench prepare")
    scores = {name: Score(name, 0.0, 0.0) for name in [*models, "float"]}
    checkpoint = peers.checkpoint(model)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for ids in token_windows(checkpoint, text, windows):
        score_window(reference, models, scores, ids)
    for name, score in scores.items():
        row = score.row()
        figures = [float(str(row[key])) for key in _FIGURES]
        yield Loss(model, name, *figures, int(str(row["tokens"])), text.name)


def _llama_cpp(peers: Peers, model: str, text: Path, windows: int) -> Iterator[Loss]:
    """Its own tool, with the same windows; the float model's logits first."""
    with tempfile.TemporaryDirectory() as folder:
        base = ["--kl-divergence-base", str(Path(folder) / "logits")]
        start: list[object] = [peers.llama_tool("perplexity"), "-f", text, "-c", WINDOW, *base]
        start += ["--chunks", windows, "-m"]
        _said([*start, peers.float_gguf(model)])
        tokens = windows * (WINDOW // 2 - 1)
        for kind in GGUFS:
            file = Path(folder) / "model.gguf"
            _said([peers.llama_tool("quantize"), peers.float_gguf(model), file, kind])
            found = figures(_said([*start, file, "--kl-divergence"]))
            yield Loss(model, f"llama.cpp {kind}", *found, tokens, text.name, _megabytes(file))


def _megabytes(file: Path) -> float:
    """Of a GGUF file's tensors: without the tokenizer."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors) / 1e6


def figures(said: str) -> tuple[float, float, float, float]:
    """Mean and 99th percentile of KL, same top token, perplexity, as llama-perplexity prints."""
    patterns = (r"Mean +KLD: +([\d.]+)", r"99\.0% +KLD: +([\d.]+)", r"Same top p: +([\d.]+)",
                r"Mean PPL\(Q\) +: +([\d.]+)")  # fmt: skip
    found = [re.search(pattern, said) for pattern in patterns]
    if not all(found):
        raise ValueError(f"llama-perplexity said nothing of KL divergence:\n{said[-1500:]}")
    mean, percentile, same, perplexity = (float(each[1]) for each in found if each)
    return mean, percentile, same / 100, perplexity


def write(path: Path, losses: list[Loss]) -> None:
    """Rows of models and contestants that were not measured now are kept."""
    kept = {(each.model, each.contestant): each for each in read(path)}
    kept |= {(each.model, each.contestant): each for each in losses}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Loss)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_written(each) for each in kept.values())


def read(path: Path = CSV) -> list[Loss]:
    """Empty if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [_loss(line) for line in csv.DictReader(file)]


def smallest_allowed(rows: Sequence[Row], kl: dict[str, float]) -> str:
    """The one of our contestants that stands for its model: of those that lose no more than
    NO_WORSE_THAN the smallest. Without losses the default.
    """
    allowed = kl.get(NO_WORSE_THAN, 0.0)
    names = dict.fromkeys(row.contestant for row in rows if row.contestant.startswith(OURS))
    eligible = [name for name in names if not about_adapters(name) and kl.get(name, 1e9) <= allowed]
    bytes_of = {row.contestant: row.weight_bytes or 0 for row in rows}
    return min(eligible, key=bytes_of.__getitem__, default=OURS_INT4)


def mean_kl(losses: list[Loss], model: str) -> dict[str, float]:
    """By contestant."""
    return {each.contestant: each.mean_kl for each in losses if each.model == model}


_FIGURES = ("mean_kl", "kl_99_percent", "same_top_token", "perplexity")


def _loss(line: dict[str, str]) -> Loss:
    numbers = [float(line[key]) for key in _FIGURES]
    tokens, megabytes = int(line["tokens"]), float(line["megabytes"])
    return Loss(line["model"], line["contestant"], *numbers, tokens, line["text"], megabytes)


def _written(loss: Loss) -> dict[str, object]:
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(loss).items()}


def _said(command: list[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}):\n{done.stderr[-1500:]}")
    return done.stdout + done.stderr
