"""What a base and its adapters lose in each way of shipping them, as one record."""

from collections.abc import Mapping
from dataclasses import dataclass

from edgelora.evaluation.scores import Score
from edgelora.evaluation.text import TextDescription
from edgelora.evaluation.variants import Variant
from edgelora.evaluation.walk import LinearResult, Walk

MERGED = ("merged", "merged_nf4")
KEPT_CORRELATION = 0.1  # of the delta, less is lost
KEPT_GAIN = 0.5  # of a side branch's, in mean KL


@dataclass(frozen=True)
class VariantResult:
    """score: against the float model with the same adapter."""

    variant: Variant
    exported: bool  # measured with the weights of the bundle, not with plainly rounded ones
    score: Score
    linears: Mapping[str, LinearResult]  # by target; empty for kind float

    @property
    def mean_correlation(self) -> float | None:
        """Of the delta, over the targets into which one was merged; None without any."""
        found = [each.survival.correlation for each in self.linears.values() if each.survival]
        return sum(found) / len(found) if found else None

    @property
    def mean_changed(self) -> float | None:
        """Share of codes that the delta moved, likewise."""
        found = [each.survival.changed for each in self.linears.values() if each.survival]
        return sum(found) / len(found) if found else None

    def worst(self, count: int) -> list[tuple[str, float]]:
        """(target, error) of the linears that lose most."""
        errors = [(target, each.error) for target, each in self.linears.items()]
        return sorted(errors, key=lambda pair: -pair[1])[:count]


@dataclass(frozen=True)
class Evaluation:
    """Variants are grouped by adapter, the base first."""

    text: TextDescription
    results: tuple[VariantResult, ...]
    effects: Mapping[str, Score]  # adapter → how far the float base without it is from it
    unapplied: Mapping[str, Score]  # the same of the rounded base

    def result(self, variant: Variant) -> VariantResult | None:
        """None if it was not evaluated."""
        return next((each for each in self.results if each.variant == variant), None)

    def lost_by_merging(self, variant: Variant) -> bool:
        """Whether little is left of an adapter in a merged form: its delta, or its gain over the
        rounded base that knows nothing of it, beside the gain of a side branch.
        """
        result = self.result(variant)
        if result is None or variant.adapter is None or variant.kind not in MERGED:
            return False
        correlation = result.mean_correlation
        side = self.result(Variant(variant.adapter, "side"))
        assert side is not None
        without = self.unapplied[variant.adapter].mean_kl
        gain, best = without - result.score.mean_kl, without - side.score.mean_kl
        return gain < KEPT_GAIN * best or (
            correlation is not None and correlation < KEPT_CORRELATION
        )


def evaluate(walk: Walk) -> Evaluation:
    """Runs it. Raises EdgeLoraError."""
    walk.run()
    scores = dict(walk.scores())
    return Evaluation(
        walk.text.description,
        tuple(
            VariantResult(variant, variant in walk.exported, score, walk.linears[variant])
            for variant, score in scores.items()
        ),
        {name: tally.score() for name, tally in walk.effects.items()},
        {name: tally.score() for name, tally in walk.unapplied.items()},
    )
