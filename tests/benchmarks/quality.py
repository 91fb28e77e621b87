"""What each format loses: KL divergence, top-1 agreement and perplexity against the float model.

Windows of 512 tokens, the second half of each scored, as `llama-perplexity --kl-divergence` does.

    PYTHONPATH=tests python -m benchmarks.quality CHECKPOINT TEXT --calibration OTHER_TEXT \\
        --csv tests/benchmarks/results/quality.csv \\
        --also ANOTHER_KIND_OF_TEXT tests/benchmarks/results/quality-code.csv
"""

import csv
import itertools
import math
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import edgelora
from benchmarks.rounds import isa

WINDOW = 512
FORMATS: dict[str, dict[str, Any]] = {
    "int4 block 32": {"format": "int4", "block_size": 32},
    "int4 block 64": {"format": "int4", "block_size": 64},
    "int4 block 128": {"format": "int4", "block_size": 128},
    "int4 block 32 zero points": {"format": "int4", "block_size": 32, "zero_points": True},
    "nf4": {"format": "nf4"},
    "int4 block 32, int4 head": {"format": "int4", "block_size": 32, "embedding_format": "int4"},
    "balanced, int8 head": {"quality": "balanced", "embedding_format": "int8"},
    "balanced": {"quality": "balanced"},
    "balanced, block 128": {"quality": "balanced", "block_size": 128},
    "balanced, int8 embedding": {
        "quality": "balanced",
        "embedding_format": "int8",
        "head_format": "int4",
    },
    "balanced, zero points": {"quality": "balanced", "zero_points": True},
    "best": {"quality": "best"},
    "best, int8 embedding": {"quality": "best", "embedding_format": "int8"},
    "int4 block 32, float activations": {"format": "int4", "block_size": 32},
    "nf4, float activations": {"format": "nf4"},
    "balanced, block 128, float activations": {"quality": "balanced", "block_size": 128},
}
FLOAT_PATH = ", float activations"
ROUNDED = ", int8 against float activations"  # and kv_cache: one bundle's two paths


@dataclass
class Score:
    """Sums over the scored tokens of one format."""

    name: str
    megabytes: float
    streamed: float  # megabytes that each decoded token reads
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    same: int = 0
    log_likelihood: float = 0.0

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, next_ids: torch.Tensor) -> None:
        """Log-probabilities float64 [tokens, vocab_size] of the format and of the float model."""
        self.kl.append((theirs.exp() * (theirs - ours)).sum(-1).numpy())
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.log_likelihood += float(ours.gather(1, next_ids[:, None]).sum())

    def row(self) -> dict[str, object]:
        """One line of the table."""
        kl = np.concatenate(self.kl)
        return {
            "format": self.name,
            "mean_kl": f"{kl.mean():.4f}",
            "kl_99_percent": f"{np.percentile(kl, 99):.3f}",
            "same_top_token": f"{self.same / kl.size:.4f}",
            "perplexity": f"{math.exp(-self.log_likelihood / kl.size):.3f}",
            "weight_megabytes": f"{self.megabytes:.1f}",
            "streamed_megabytes": f"{self.streamed:.1f}",
            "tokens": kl.size,
        }


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--windows", default=24, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Other rows are kept.")
@click.option(
    "--also",
    type=(click.Path(exists=True, path_type=Path), click.Path(path_type=Path)),
    multiple=True,
    metavar="TEXT CSV",
    help="Score this text too, into another file.",
)
@click.option("--only", multiple=True, help="Measure these formats only.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, path_type=Path),
    help="Another text than TEXT; without it, quality balanced is left out.",
)
def main(
    checkpoint: Path,
    text: Path,
    windows: int,
    csv_path: Path | None,
    also: tuple[tuple[Path, Path], ...],
    only: tuple[str, ...],
    calibration: Path | None,
) -> None:
    """Exports CHECKPOINT in every format and scores TEXT."""
    chosen = {
        name: options | ({"calibration": calibration} if "quality" in options else {})
        for name, options in FORMATS.items()
        if (not only or name in only) and (calibration or "quality" not in options)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = dict(load_all(checkpoint, folder, chosen))
        sizes = {
            name: (model.info.weight_bytes / 1e6, streamed_bytes(folder / name) / 1e6)
            for name, model in models.items()
        }
        sizes |= dict.fromkeys(["float", *(base + ROUNDED for base in both_paths(models))], (0, 0))
        reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        kernels = {"isa": isa()}
        for file, path in ((text, csv_path), *also):
            scores = {name: Score(name, *size) for name, size in sizes.items()}
            for ids in token_windows(checkpoint, file, windows):
                score_window(reference, models, scores, ids)
            rows = [score.row() | kernels for score in scores.values()]
            for row in rows:
                click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
            if path:
                write_csv(path, rows)


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Of each ISA in the order of FORMATS, with the newest figures; the float model last."""
    found: dict[tuple[object, object], dict[str, object]] = {}
    if path.exists():
        with path.open(newline="") as file:
            found = {(row["isa"], row["format"]): dict(row) for row in csv.DictReader(file)}
    found |= {(row["isa"], row["format"]): row for row in rows}
    names = [*FORMATS, *(base + ROUNDED for base in both_paths(FORMATS)), "float"]
    isas = dict.fromkeys(of for of, _ in found)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found[key] for key in itertools.product(isas, names) if key in found)


def load_all(
    checkpoint: Path, folder: Path, formats: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, edgelora.Model]]:
    """The runtime's models by name of the format."""
    for name, options in formats.items():
        bundle = folder / name
        edgelora.export(checkpoint, bundle, context_length=WINDOW, report=False, **options)
        accuracy = "float" if name.endswith(FLOAT_PATH) else "int8"
        yield name, edgelora.load(bundle, accuracy=accuracy)


def both_paths(names: Collection[str]) -> list[str]:
    """Those of which the float path is there too."""
    return [name for name in names if name + FLOAT_PATH in names]


def streamed_bytes(bundle: Path) -> int:
    """The weights of all linears; of an embedding that is not lm_head's, a token reads one row."""
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    read = {
        name for node in graph.node if node.op_type in ("Layer", "Linear") for name in node.input
    }
    return sum(
        int(entry.value)
        for tensor in graph.initializer
        for entry in tensor.external_data
        if tensor.name in read and entry.key == "length"
    )


def token_windows(checkpoint: Path, text: Path, windows: int) -> Iterator[list[int]]:
    """The first windows of the text, each WINDOW tokens."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False).ids
    for start in range(0, windows * WINDOW, WINDOW):
        yield ids[start : start + WINDOW]


def score_window(
    reference: torch.nn.Module,
    models: dict[str, edgelora.Model],
    scores: dict[str, Score],
    ids: list[int],
) -> None:
    """Adds the second half of one window to every score."""
    half = slice(WINDOW // 2, WINDOW - 1)
    next_ids = torch.tensor(ids[WINDOW // 2 + 1 :])
    with torch.no_grad():
        theirs = log_probabilities(reference(torch.tensor([ids])).logits[0, half])
    scores["float"].add(theirs, theirs, next_ids)
    ours = {
        name: log_probabilities(torch.from_numpy(model.logits(ids)[half]))
        for name, model in models.items()
    }
    for name, found in ours.items():
        scores[name].add(found, theirs, next_ids)
    for base in both_paths(models):
        scores[base + ROUNDED].add(ours[base], ours[base + FLOAT_PATH], next_ids)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float64 [tokens, vocab_size]."""
    return torch.log_softmax(logits.double(), -1)


if __name__ == "__main__":
    main()
