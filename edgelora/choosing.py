"""Mode auto and merge base auto: decided by what each costs on a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edgelora.adapter import Adapter
from edgelora.evaluation import Evaluation, Variant, VariantResult
from edgelora.plan import ExportOptions

MERGE_MAY_COST = 0.1  # of the adapter's effect, both in mean KL


@dataclass(frozen=True)
class Choice:
    """Options in which nothing, or what a measurement must decide, is "auto".

    reasons: field of Plan → why, of what was.
    """

    options: ExportOptions
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        return "auto" in (self.options.mode, self.options.merge_base)


def settle(options: ExportOptions, adapters: Mapping[str, Adapter]) -> Choice:
    """Decides what needs no measurement."""
    if options.mode != "auto":
        return Choice(options)
    if len(adapters) != 1:
        reason = f"{len(adapters) or 'no'} adapters: only exactly one can be merged"
        return Choice(replace(options, mode="side", merge_base=None), {"mode": reason})
    if any(adapter.invocation for adapter in adapters.values()):
        reason = "the adapter waits for its invocation tokens, which a merged one cannot"
        return Choice(replace(options, mode="side", merge_base=None), {"mode": reason})
    if any(adapter.prefix for adapter in adapters.values()):
        reason = "the adapter stands before the text, which no merging can apply"
        return Choice(replace(options, mode="side", merge_base=None), {"mode": reason})
    if any(adapter.replaced for adapter in adapters.values()):
        reason = "only merging can apply modules and tokens saved whole, and factors of embeddings"
        return Choice(replace(options, mode="merge"), {"mode": reason})
    if any(b.input_factor is not None for a in adapters.values() for b in a.branches.values()):
        reason = "the adapter multiplies inputs of linears, which only merging can apply"
        return Choice(replace(options, mode="merge"), {"mode": reason})
    return Choice(options)


def choose(choice: Choice, adapter: str, evaluation: Evaluation) -> Choice:
    """Merged, where that costs little more than a side branch: one model without a second part."""
    options, reasons = choice.options, dict(choice.reasons)
    best = _best_merged(options, adapter, evaluation)
    base = "nf4" if best.variant.kind == "merged_nf4" else "float"
    if options.merge_base == "auto":
        reasons["merge_base"] = _base_reason(adapter, evaluation)
    if options.mode == "merge":
        return Choice(replace(options, merge_base=base), reasons)
    side = evaluation.result(Variant(adapter, "side"))
    assert side is not None
    effect, cost = evaluation.effects[adapter].mean_kl, best.score.mean_kl - side.score.mean_kl
    found = f"merging costs {cost:.4f} of mean KL, the adapter's own effect is {effect:.4f}"
    if evaluation.lost_by_merging(best.variant):
        reason = f"{found}, and little of it is left in 4 bits: the adapter stays beside the base"
        return Choice(replace(options, mode="side", merge_base=None), {"mode": reason})
    if cost <= MERGE_MAY_COST * effect:
        reasons["mode"] = f"{found}: at most a tenth of it, so one model without a side branch"
        return Choice(replace(options, mode="merge", merge_base=base), reasons)
    reason = f"{found}: more than a tenth of it, so the adapter stays beside the base"
    return Choice(replace(options, mode="side", merge_base=None), {"mode": reason})


def _best_merged(options: ExportOptions, adapter: str, evaluation: Evaluation) -> VariantResult:
    """Of two bases that which predicts the text better: either may be the one of the training."""
    results = _merged(adapter, evaluation)
    if options.merge_base == "auto":
        return min(results.values(), key=lambda each: each.score.perplexity)
    return results.get(f"merged_{options.merge_base}", results["merged"])


def _merged(adapter: str, evaluation: Evaluation) -> dict[str, VariantResult]:
    """By kind; a base in nf4 has the one kind."""
    return {
        each.variant.kind: each
        for each in evaluation.results
        if each.variant.adapter == adapter and each.variant.kind.startswith("merged")
    }


def _base_reason(adapter: str, evaluation: Evaluation) -> str:
    names = {"merged": "float", "merged_nf4": "nf4"}
    found = [
        f"{names[kind]} {result.score.perplexity:.3f}"
        for kind, result in _merged(adapter, evaluation).items()
    ]
    return f"perplexity on the text, the lower is taken: {', '.join(found)}"
