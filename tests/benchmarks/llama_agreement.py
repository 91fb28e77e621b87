"""How far our lossless export of a GGUF file is from llama.cpp on the same file.

llama-perplexity writes its log-probabilities (the format is read off its perplexity.cpp: magic,
n_ctx, n_vocab, chunks, tokens, then for each scored token float32 scale and minimum and n_vocab
uint16); the same tokens go through our runtime.

python tests/benchmarks/llama_agreement.py BUNDLE --perplexity llama-perplexity --gguf FILE --text
FILE
"""

import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

import edgelora

WINDOW = 512
HEAD_UINT16 = 4  # scale and minimum, two float32


class LogProbabilities:
    """The file that llama-perplexity --kl-divergence-base writes."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        magic, self.n_ctx, self.n_vocab, self.chunks = struct.unpack_from("<8s3i", self.data)
        assert magic == b"_logits_"
        tokens = np.frombuffer(self.data, "<i4", self.chunks * self.n_ctx, 20)
        self.tokens = tokens.reshape(self.chunks, self.n_ctx)
        self.start = 20 + tokens.nbytes

    def rows(self) -> int:
        """Scored tokens of a chunk: its second half but the last."""
        return self.n_ctx - 1 - self.n_ctx // 2

    def chunk(self, number: int) -> NDArray[np.float64]:
        """Log-probabilities float64 [rows, n_vocab]; −inf where the file has only a lower bound.

        Logits more than 16 below the largest are stored as the bound: together 0.2 % of the mass.
        """
        width = 2 * ((self.n_vocab + 1) // 2) + HEAD_UINT16
        count = self.rows() * width
        stored = np.frombuffer(self.data, "<u2", count, self.start + 2 * count * number)
        table = stored.reshape(self.rows(), width)
        head = np.ascontiguousarray(table[:, :HEAD_UINT16]).view("<f4").astype(np.float64)
        codes = table[:, HEAD_UINT16 : HEAD_UINT16 + self.n_vocab].astype(np.float64)
        return np.where(codes > 0, head[:, :1] * codes + head[:, 1:], -np.inf)


def compare(bundle: Path, theirs: LogProbabilities) -> Iterator[tuple[float, float]]:
    """(mean KL of llama.cpp to ours, share of equal top tokens) of each chunk."""
    half = slice(theirs.n_ctx // 2, theirs.n_ctx - 1)
    with edgelora.load(bundle) as model:
        for number in range(theirs.chunks):
            logits = model.logits(theirs.tokens[number].tolist())[half].astype(np.float64)
            shifted = logits - logits.max(-1, keepdims=True)
            ours = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            log_p = theirs.chunk(number)
            difference = np.where(np.isfinite(log_p), log_p - ours, 0.0)
            kl = (np.exp(log_p) * difference).sum(-1).mean()
            same = (log_p.argmax(-1) == ours.argmax(-1)).mean()
            yield float(kl), float(same)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--perplexity", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--gguf", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--windows", default=4, show_default=True)
def main(bundle: Path, perplexity: Path, gguf: Path, text: Path, windows: int) -> None:
    """Prints mean KL and top-token agreement."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "logits"
        command: list[object] = [perplexity, "-m", gguf, "-f", text, "-c", WINDOW, "-t", 2]
        command += ["--chunks", windows, "--kl-divergence-base", file]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        kl, same = np.mean(list(compare(bundle, LogProbabilities(file))), axis=0)
    click.echo(f"mean KL {kl:.5f}, same top token {same:.4f}, {windows} windows of {WINDOW}")


if __name__ == "__main__":
    main()
