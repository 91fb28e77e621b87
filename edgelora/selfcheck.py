"""What a bundle must compute, written into it: a few prompts' greatest logits and how far a device
may be from them. Computed by an arithmetic that shares nothing with the runtime.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelora.calibration import Arithmetic, Past, Stream, Weight
from edgelora.config import ModelConfig
from edgelora.errors import EdgeLoraError
from edgelora.evaluation import LinearWeights, StoredWeights, Subject, Variant
from edgelora.json_file import read_json_file
from edgelora.layout import EMBEDDING, Projection, projections

FORMAT, FORMAT_VERSION = "edgelora-selfcheck", 1
PROMPTS, TOKENS = 2, 10  # tokens of a prompt
POSITIONS = 6  # at the end of each prompt, whose logits are compared
TOP = 8  # greatest logits of a position
FLOAT_SHARE = 2e-5  # of the largest logit: float32 sums in another order (3e-7 was seen)
INT8_MARGIN = 4  # × the error of rounded activations: another machine's is another sample of it
BLOCK = 32  # values of an activation that share a scale; of flavor ort the weight's

Float32 = NDArray[np.float32]
Result = TypeVar("Result")


class RoundedArithmetic(Arithmetic):
    """The inputs of each linear rounded to int8; in flavor edgelora (`ours`) queries, keys and
    values too, before the keys are rotated, which comes to the same, and all of a side branch.
    """

    def __init__(
        self,
        config: ModelConfig,
        positions: int,
        rotary: tuple[Float32, Float32],
        block_size: int,
        *,
        ours: bool,
    ) -> None:
        super().__init__(config, positions, rotary)
        self.block_size, self.ours = block_size, ours

    def linear(self, x: Float32, weight: Weight, bias: Float32) -> Float32:
        """Of the rounded x."""
        return super().linear(rounded(x, self.block_size), weight, bias)

    def side_branch(self, x: Float32, lora_a: Float32, lora_b: Float32) -> Float32:
        """Of t = A·x and of B whole rows have one scale, of A blocks."""
        if not self.ours:
            return super().side_branch(x, lora_a, lora_b)
        rank, none = len(lora_a), np.zeros(0, np.float32)
        t = super().linear(x, rounded(lora_a, BLOCK), none)
        return super().linear(rounded(t, rank), rounded(lora_b, rank), none)

    def attention(self, q: Float32, k: Float32, v: Float32, past: Past | None = None) -> Float32:
        """As the kv_cache of its flavor keeps them."""
        if self.ours:
            q, k, v = self._in_heads(q, BLOCK), self._in_heads(k, BLOCK), self._of_a_head(v)
            past = past and (self._in_heads(past[0], BLOCK), self._of_a_head(past[1]))
        return super().attention(q, k, v, past)

    def _in_heads(self, x: Float32, block_size: int) -> Float32:
        return rounded(x.reshape(-1, self.config.head_dim), block_size).reshape(x.shape)

    def _of_a_head(self, x: Float32) -> Float32:
        return self._in_heads(x, self.config.head_dim)


def rounded(x: Float32, block_size: int) -> Float32:
    """[rows, features] as int8 codes with a scale for each block_size features hold it."""
    rows, features = x.shape
    blocks = np.pad(x, ((0, 0), (0, -features % block_size))).reshape(rows, -1, block_size)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.rint(blocks / np.where(scales == 0, np.float32(1), scales))
    return np.ascontiguousarray((codes * scales).reshape(rows, -1)[:, :features], np.float32)


def spread_prompts(vocab_size: int, context_length: int) -> NDArray[np.int64]:
    """Token ids [prompts, tokens] spread over the vocabulary, the same for every base."""
    tokens = min(TOKENS, context_length)
    golden = (5**0.5 - 1) / 2  # multiples of it modulo 1 lie evenly and in no order
    shares = np.arange(1, PROMPTS * tokens + 1) * golden % 1
    return (shares * vocab_size).astype(np.int64).reshape(PROMPTS, tokens)


@dataclass
class Rehearsal:
    """The prompts' way through the bundle's own weights: in float, and with rounded activations."""

    subject: Subject
    stored: StoredWeights
    variants: Sequence[Variant]
    windows: NDArray[np.int64]  # token ids [prompts, tokens]
    streams: list[list[Stream]] = field(default_factory=list)  # of each variant: float, rounded

    def run(self) -> list[list[Float32]]:
        """Of each variant the logits [prompts, positions, vocab_size] in float and as rounded.

        Raises EdgeLoraError.
        """
        self.streams = self._start()
        *inner, head = projections(self.subject.checkpoint.config)
        for projection in inner:
            self._through(projection, Stream.advance)
        return self._through(head, self._head)

    def _start(self) -> list[list[Stream]]:
        """The embedding's table is gone when it returns."""
        checkpoint, table = self.subject.checkpoint, self.stored.matrix(EMBEDDING)
        config, read = checkpoint.config, checkpoint.read
        return [
            [
                Stream(config, each, self.windows, table, read, self.subject.past(variant))
                for each in self._both()
            ]
            for variant in self.variants
        ]

    def _both(self) -> tuple[Arithmetic, Arithmetic]:
        plan, config = self.subject.plan, self.subject.checkpoint.config
        ours, before = plan.flavor == "edgelora", self.subject.positions_before
        positions = before + self.windows.shape[1]
        rotary = self.stored.rotary(positions)
        exact = Arithmetic(config, positions, rotary)
        if plan.format == "float":
            return exact, exact
        block_size = BLOCK if ours else plan.block_size
        return exact, RoundedArithmetic(config, positions, rotary, block_size, ours=ours)

    def _through(
        self,
        projection: Projection,
        step: Callable[[Stream, list[Weight], list[Float32]], Result],
    ) -> list[list[Result]]:
        stored = self.stored.linears(projection)
        linears = [LinearWeights(self.subject, linear) for linear in projection.linears]
        results = []
        for variant, streams in zip(self.variants, self.streams, strict=True):
            pairs = zip(linears, stored, strict=True)
            weights = [linear.weight(variant, matrix) for linear, matrix in pairs]
            biases = [linear.bias(variant) for linear in linears]
            results.append([step(stream, weights, biases) for stream in streams])
        return results

    def _head(self, stream: Stream, weights: list[Weight], biases: list[Float32]) -> Float32:
        prompts, tokens = self.windows.shape
        inputs = stream.inputs.reshape(prompts, tokens, -1)[:, -POSITIONS:]
        rows = np.ascontiguousarray(inputs.reshape(-1, inputs.shape[-1]))
        logits = stream.arithmetic.linear(rows, weights[0], biases[0])
        return logits.reshape(*inputs.shape[:2], -1)


Entry = dict[str, Any]


def selfcheck_json(subject: Subject, stored: StoredWeights, variants: Sequence[Variant]) -> bytes:
    """The file, for the variants that the bundle holds. Raises EdgeLoraError."""
    vocab_size = subject.checkpoint.config.vocab_size
    room = subject.plan.context_length - subject.positions_before
    windows = spread_prompts(vocab_size, room)
    expected, errors = _expect(subject, stored, variants, windows)
    noise = INT8_MARGIN * float(np.sqrt(np.mean(errors)))
    for each in expected:
        each["int8_tolerance"] = max(noise, each["float_tolerance"])
    fields = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return _file_bytes(fields | {"prompts": windows.tolist(), "expected": expected})


def extended(path: Path, subject: Subject, stored: StoredWeights, adapter: str) -> bytes:
    """The file at `path` with the entry of one more adapter, or with it anew; the others stay.

    Raises EdgeLoraError if the base that is stored does not compute what the file says of it.
    """
    fields = read_json_file(path, "self-check", FORMAT, FORMAT_VERSION)
    windows = np.array(fields["prompts"], np.int64)
    _check_room(windows, subject, adapter)
    variants = [Variant(None, "side"), Variant(adapter, "side")]
    (base, new), errors = _expect(subject, stored, variants, windows)
    others = [each for each in fields["expected"] if each["adapter"] != adapter]
    _compare(path, base, next(each for each in others if each["adapter"] is None))
    own = INT8_MARGIN * float(np.sqrt(errors[1]))
    known = min(each["int8_tolerance"] for each in others)
    new["int8_tolerance"] = max(own, known, new["float_tolerance"])
    expected = sorted([*others, new], key=lambda each: each["adapter"] or "")
    return _file_bytes(fields | {"expected": expected})


def _file_bytes(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields) + "\n").encode()


def _check_room(windows: NDArray[np.int64], subject: Subject, adapter: str) -> None:
    room = subject.plan.context_length - subject.positions_before
    if windows.shape[1] > room:
        raise EdgeLoraError(
            f"adapter {adapter}: its prefix leaves {room} positions of the context, the prompts of "
            f"the self-check take {windows.shape[1]}: export the bundle again with it"
        )


def _compare(path: Path, found: Entry, known: Entry) -> None:
    """Whether the weights are still those of the export: what they give is to be believed."""
    same = found["tokens"] == known["tokens"]
    differences = np.subtract(found["logits"], known["logits"]) if same else np.array(np.inf)
    if not float(np.sqrt(np.mean(np.square(differences)))) <= known["float_tolerance"]:
        raise EdgeLoraError(
            f"{path}: the base computes other logits than at export: copy the bundle again, or "
            "export it again"
        )


def _expect(
    subject: Subject,
    stored: StoredWeights,
    variants: Sequence[Variant],
    windows: NDArray[np.int64],
) -> tuple[list[Entry], list[float]]:
    """Of each variant its entry, but for int8_tolerance, and the mean square of the error of
    rounded activations.
    """
    expected, errors = [], []
    found = Rehearsal(subject, stored, variants, windows).run()
    for variant, logits in zip(variants, found, strict=True):
        _refuse_nonfinite(variant, logits)
        tokens = np.argsort(-logits[0], axis=-1, kind="stable")[..., :TOP]
        exact, rough = (np.take_along_axis(each, tokens, axis=-1) for each in logits)
        errors.append(float(np.mean(np.square(rough - exact, dtype=np.float64))))
        expected.append(
            {
                "adapter": variant.adapter if variant.kind == "side" else None,
                "float_tolerance": FLOAT_SHARE * float(np.abs(logits[0]).max()),
                "tokens": tokens.tolist(),
                "logits": [[[round(x, 5) for x in row] for row in p] for p in exact.tolist()],
            }
        )
    return expected, errors


def _refuse_nonfinite(variant: Variant, logits: Sequence[Float32]) -> None:
    if not all(np.isfinite(each).all() for each in logits):
        whose = f"adapter {variant.adapter}" if variant.adapter else "the base"
        raise EdgeLoraError(f"{whose}: computes logits that are not finite: train it again")
