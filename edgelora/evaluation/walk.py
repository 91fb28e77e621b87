"""A text's way through a decoder in all variants at once, one linear of the base at a time.

Activations stay float32: what is compared is weights. Memory: one linear in a few variants, and
the tokens' activations.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgelora.calibration import Arithmetic, Stream, Weight
from edgelora.evaluation.scores import Score, Tally
from edgelora.evaluation.stored import StoredWeights
from edgelora.evaluation.survival import Survival
from edgelora.evaluation.text import EvaluationText
from edgelora.evaluation.variants import LinearWeights, Subject, Variant
from edgelora.layout import EMBEDDING, Projection, head, projections
from edgelora.quantize import dequantize
from edgelora.rounding import Rounding

PROBE = 64  # tokens on which a linear's error is measured
HEAD_TOKENS = 512  # whose logits are held at once

Float32 = NDArray[np.float32]
Progress = Callable[[int, int], None]  # steps done, steps in all


@dataclass(frozen=True)
class LinearResult:
    """Of one linear in one variant. error: |(W − W_float)·x| / |W_float·x| on the text's own
    inputs; survival: of the adapter's delta, None where none is merged.
    """

    error: float
    survival: Survival | None


@dataclass
class Walk:
    """`stored` replaces the weights of the variants that a bundle holds, `exported`."""

    subject: Subject
    text: EvaluationText
    variants: list[Variant]
    stored: StoredWeights | None = None
    exported: frozenset[Variant] = frozenset()
    progress: Progress = lambda done, total: None
    linears: dict[Variant, dict[str, LinearResult]] = field(default_factory=dict)
    streams: dict[Variant, Stream] = field(default_factory=dict)
    effects: dict[str, Tally] = field(default_factory=dict)  # by adapter: see `scores`
    unapplied: dict[str, Tally] = field(default_factory=dict)

    def run(self) -> None:
        """Through everything but lm_head. Raises EdgeLoraError for weights that cannot be used."""
        config = self.subject.checkpoint.config
        positions = self.subject.positions_before + self.text.windows.shape[1]
        self.arithmetic = Arithmetic(config, positions)
        for rounded in (False, True):
            self._start(rounded=rounded)
        *inner, _ = projections(config)
        for done, projection in enumerate(inner):
            self._step(projection)
            self.progress(done + 1, len(inner) + 1)

    def scores(self) -> Iterator[tuple[Variant, Score]]:
        """Of every variant against the float variant of its adapter. Beside them `effects` and
        `unapplied` get how far the float base and the rounded base without the adapter are from it.
        """
        tallies = {variant: Tally() for variant in self.variants}
        for windows in self._portions():
            self._score(windows, tallies)
        steps = 4 * self.subject.checkpoint.config.num_hidden_layers + 1
        self.progress(steps, steps)
        for variant, tally in tallies.items():
            yield variant, tally.score()

    def logits(self, variant: Variant, tokens: NDArray[np.int64]) -> Float32:
        """[tokens, vocab_size] of the tokens with these indices, counted over all windows."""
        stored = self._stored(variant, self._stored_head, 0)
        inputs = np.ascontiguousarray(self.streams[variant].inputs[tokens])
        weight, bias = self._head.weight(variant, stored), self._head.bias(variant)
        return self.arithmetic.linear(inputs, weight, bias)

    def _start(self, *, rounded: bool) -> None:
        """The streams that begin with this embedding, whose table is gone when it returns."""
        checkpoint, table = self.subject.checkpoint, self._embedding(rounded=rounded)
        config, read, windows = checkpoint.config, checkpoint.read, self.text.windows
        for variant in self.variants:
            if (variant.kind != "float") == rounded:
                past = self.subject.past(variant)
                self.streams[variant] = Stream(config, self.arithmetic, windows, table, read, past)
                self.linears[variant] = {}

    def _embedding(self, *, rounded: bool) -> Float32:
        checkpoint = self.subject.checkpoint
        if rounded and self.stored is not None:
            return self.stored.matrix(EMBEDDING)
        values = checkpoint.read(f"{EMBEDDING}.weight")
        if not rounded:
            return values
        return dequantize(Rounding(checkpoint, self.subject.plan, {}).matrix(EMBEDDING, values))

    def _step(self, projection: Projection) -> None:
        weights = [LinearWeights(self.subject, linear) for linear in projection.linears]
        stored = None if self.stored is None else self.stored.linears(projection)
        probes = {v.adapter: self.streams[v].inputs[:PROBE] for v in self.variants if _leads(v)}
        reference: list[Weight] = []
        for variant in self.variants:
            used = [
                each.weight(variant, self._stored(variant, stored, index))
                for index, each in enumerate(weights)
            ]
            if _leads(variant):
                reference = used
            elif variant.adapter in probes:
                self._measure(variant, weights, used, reference, probes[variant.adapter])
            self.streams[variant].advance(used, [each.bias(variant) for each in weights])

    def _stored(self, variant: Variant, stored: list[Float32] | None, index: int) -> Float32 | None:
        return stored[index] if stored is not None and variant in self.exported else None

    def _measure(
        self,
        variant: Variant,
        weights: list[LinearWeights],
        used: list[Weight],
        reference: list[Weight],
        probe: Float32,
    ) -> None:
        nothing = np.zeros(0, np.float32)
        for each, ours, theirs in zip(weights, used, reference, strict=True):
            wanted = self.arithmetic.linear(probe, theirs, nothing)
            found = self.arithmetic.linear(probe, ours, nothing)
            length = float(np.sqrt(np.square(wanted, dtype=np.float64).sum()))
            error = float(np.sqrt(np.square(found - wanted, dtype=np.float64).sum()))
            result = LinearResult(error / length if length else 0.0, each.survival(variant))
            self.linears[variant][each.linear.target] = result

    def _portions(self) -> Iterator[range]:
        windows, positions = self.text.windows.shape
        step = max(1, HEAD_TOKENS // positions)
        for first in range(0, windows, step):
            yield range(first, min(first + step, windows))

    def _score(self, windows: range, tallies: Mapping[Variant, Tally]) -> None:
        positions, first = self.text.windows.shape[1], self.text.first_scored
        tokens = np.concatenate(
            [np.arange(w * positions + first, (w + 1) * positions - 1) for w in windows]
        )
        next_ids = self.text.windows.ravel()[tokens + 1]
        without: dict[str, Float32] = {}  # logits of the base, float and rounded
        reference = np.zeros(0, np.float32)
        for variant in self.variants:
            logits, adapter = self.logits(variant, tokens), variant.adapter
            if adapter is None:
                without[variant.kind] = logits
            if _leads(variant):
                reference = logits
            tallies[variant].add(logits, reference, next_ids)
            if _leads(variant) and adapter is not None:
                self.effects.setdefault(adapter, Tally()).add(without["float"], logits, next_ids)
                self.unapplied.setdefault(adapter, Tally()).add(without["side"], logits, next_ids)

    @cached_property
    def _head(self) -> LinearWeights:
        return LinearWeights(self.subject, *head(self.subject.checkpoint.config).linears)

    @cached_property
    def _stored_head(self) -> list[Float32] | None:
        config = self.subject.checkpoint.config
        return None if self.stored is None else self.stored.linears(head(config))


def _leads(variant: Variant) -> bool:
    """Whether the next variants are compared with it."""
    return variant.kind == "float"
