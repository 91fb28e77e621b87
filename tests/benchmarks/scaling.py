"""EdgeLoRA alone: tokens a second over the length of the context, the batch and the threads.

The batch is the graph's: a plain onnxruntime session with our library, which has no batches in its
public interface, so that decode of many sequences can be driven here.
"""

import csv
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgelora import native
from edgelora.bench import bench
from edgelora.manifest import read_manifest

CONTEXTS = (128, 512, 1024, 2048, 4096, 8000)
BATCHES = (1, 2, 3, 4, 6, 8)
PROMPT, NEW = 128, 32
STEP = 32  # positions, of a kv_cache's capacity


@dataclass(frozen=True)
class Point:
    """Tokens a second, of all sequences together; context: tokens of the prompt. over: what of
    the three the point's curve goes along.
    """

    over: str
    context: int
    batch: int
    threads: int
    prefill: float
    decode: float


def measure(bundle: Path, most_threads: int, repeats: int) -> Iterator[Point]:
    """Along each of the three, the others at 128 tokens, one sequence and most_threads."""
    for context in CONTEXTS:
        yield in_runtime(bundle, "context", context, most_threads, repeats)
    for threads in range(1, most_threads + 1):
        yield in_runtime(bundle, "threads", PROMPT, threads, repeats)
    for batch in BATCHES:
        yield in_graph(bundle, batch, most_threads, repeats)


def in_runtime(bundle: Path, over: str, context: int, threads: int, repeats: int) -> Point:
    """One sequence, by `edgelora.bench`."""
    found = bench(bundle, threads=threads, prompt_tokens=context, new_tokens=NEW, repeats=repeats)
    rates = found.prefill_tokens_per_second, found.decode_tokens_per_second
    return Point(over, context, 1, threads, *rates)


def in_graph(bundle: Path, batch: int, threads: int, repeats: int) -> Point:
    """`batch` sequences of one length; threads: those of the machine, which the operators take."""
    decoding = Batch(bundle, batch)
    decoding.run(PROMPT)  # warm-up
    runs = [(decoding.restart(), decoding.run(PROMPT), decoding.decode()) for _ in range(repeats)]
    prefill, decode = (statistics.median(run[i] for run in runs) for i in (1, 2))
    rates = batch * PROMPT / prefill, batch * NEW / decode
    return Point("batch", PROMPT, batch, threads, *rates)


class Batch:
    """A session whose kv_cache is read and written in place."""

    def __init__(self, bundle: Path, batch: int) -> None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(native.library_path()))
        options.intra_op_num_threads = 1  # the operators have their own
        self._session = onnxruntime.InferenceSession(bundle / "model.onnx", options)
        self._binding = self._session.io_binding()
        self._batch, self._position = batch, 0
        self._names = {each.name for each in self._session.get_inputs()}
        self._bind_caches(read_manifest(bundle)["model"]["head_dim"])
        self._binding.bind_output("logits")

    def _bind_caches(self, head_dim: int) -> None:
        # As runtime/ops/kv_layout.h has int8: codes, padded, and scales.
        widths = {"key": -(-head_dim // 32) * 34, "value": -(-head_dim // 16) * 16 + 4}
        capacity = -(-(PROMPT + NEW) // STEP) * STEP
        for past in self._session.get_inputs():
            if not past.name.startswith("past_key_values."):
                continue
            width = widths[past.name.rpartition(".")[2]]
            shape = (self._batch, past.shape[1], capacity, width)
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.uint8))
            self._binding.bind_ortvalue_input(past.name, cache)
            present = past.name.replace("past_key_values", "present")
            self._binding.bind_ortvalue_output(present, cache)

    def restart(self) -> None:
        self._position = 0

    def run(self, count: int) -> float:
        """Seconds for `count` more tokens of each sequence."""
        self._position += count
        mask = np.ones((self._batch, self._position), np.int64)
        feeds = {
            "input_ids": np.full((self._batch, count), 11, np.int64),
            "attention_mask": mask,
            "logits_to_keep": np.array([count - 1], np.int64),
            "adapter_ids": np.zeros(self._batch, np.int64),
        }
        started = time.perf_counter()
        for name in self._names & feeds.keys():
            self._binding.bind_cpu_input(name, feeds[name])
        self._session.run_with_iobinding(self._binding)
        return time.perf_counter() - started

    def logits(self) -> NDArray[np.float32]:
        """Of the last run, [batch, 1, vocab_size]."""
        found: NDArray[np.float32] = self._binding.copy_outputs_to_cpu()[-1]
        return found

    def decode(self) -> float:
        """Seconds for NEW tokens, one at a time."""
        return sum(self.run(1) for _ in range(NEW))


def write(points: list[Point], about: str, folder: Path) -> None:
    """scaling.csv and scaling.svg. about: bundle, machine, moment, bandwidth, commit."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scaling.csv").open("w", newline="") as file:
        names = [*(field.name for field in fields(Point)), "about"]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(point), "about": about} for point in points)
    draw(points, about).savefig(folder / "scaling.svg", metadata={"Date": None})


def draw(points: list[Point], about: str) -> plt.Figure:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5))
    for axis, what in zip(axes, ("context", "batch", "threads"), strict=True):
        chosen = [p for p in points if p.over == what]
        line = sorted((getattr(p, what), p.prefill, p.decode) for p in chosen)
        for i, name in ((1, "prefill"), (2, "decode")):
            axis.plot([p[0] for p in line], [p[i] / line[0][i] for p in line], "o-", label=name)
        axis.set_xlabel({"context": "tokens of prompt"}.get(what, what))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("tokens a second, of the first point's")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"EdgeLoRA, {about}", fontsize=9)
    figure.tight_layout()
    return figure
