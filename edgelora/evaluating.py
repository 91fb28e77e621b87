"""What a bundle loses on this machine: the runtime beside the float base, on a text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError
from edgelora.evaluation import EvaluationText, Score, Tally, read_evaluation_text
from edgelora.manifest import read_manifest
from edgelora.model import Model, load
from edgelora.reference import Reference, open_reference
from edgelora.tokenizer import from_folder

POSITIONS = 512  # of a window, or the bundle's context

Progress = Callable[[str, int, int], None]
"""Stage ("float model", "bundle"), steps done, steps in all."""


@dataclass(frozen=True)
class BundleScore:
    """Of the base (adapter None) or of one adapter, as the runtime computes it.

    score: None without the base, from which the divergences are.
    """

    adapter: str | None
    perplexity: float
    float_perplexity: float | None
    score: Score | None


@dataclass(frozen=True)
class BundleEvaluation:
    """isa: the kernels that computed it."""

    text: EvaluationText
    scores: tuple[BundleScore, ...]
    isa: str


def evaluate_bundle(
    bundle: Path,
    *,
    base: Path | None = None,
    adapters: Mapping[str, Path] | None = None,
    text: Path | None = None,
    windows: int = 8,
    threads: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> BundleEvaluation:
    """Scores the base and every adapter of `bundle`; against the float model if `base` is given.

    adapters: PEFT folders of those that are merged, or in ONNX Runtime's format; the others are
    read from the bundle. Raises EdgeLoraError for a base or an adapter that is not the bundle's.
    """
    manifest = read_manifest(bundle)
    if adapters and base is None:
        raise EdgeLoraError(f"adapter {', '.join(adapters)}: is compared only with --base BASE")
    reference = open_reference(bundle, manifest, base, adapters or {}) if base else None
    with load(bundle, threads=threads) as model:
        positions = min(POSITIONS, model.info.context_length - _longest_prefix(manifest))
        source = read_evaluation_text(
            text,
            from_folder(bundle),
            model.info.vocab_size,
            windows=windows,
            positions=positions,
        )
        if reference is not None:
            reference.run(source, partial(progress, "float model"))
        scores = _score(model, source, reference, partial(progress, "bundle"))
        return BundleEvaluation(source, scores, model.info.isa)


def _longest_prefix(manifest: Mapping[str, Any]) -> int:
    """Positions that no text can have."""
    return max((entry.get("prefix", 0) for entry in manifest["adapters"].values()), default=0)


def _score(
    model: Model,
    text: EvaluationText,
    reference: Reference | None,
    progress: Callable[[int, int], None],
) -> tuple[BundleScore, ...]:
    names: list[str | None] = [None, *model.adapters]
    ours, theirs = ({name: Tally() for name in names} for _ in range(2))
    for done, ids in enumerate(text.windows):
        part = slice(text.first_scored, len(ids) - 1)
        next_ids = ids[text.first_scored + 1 :]
        for name in names:
            with model.session(adapter=name, invoked=True) as session:
                logits = session.logits(ids.tolist())[part]
            wanted = logits if reference is None else reference.logits(name, done)
            ours[name].add(logits, wanted, next_ids)
            if reference is not None:
                theirs[name].add(wanted, wanted, next_ids)
        progress(done + 1, len(text.windows))
    return tuple(
        _row(name, ours[name].score(), None if reference is None else theirs[name].score())
        for name in names
    )


def _row(name: str | None, ours: Score, theirs: Score | None) -> BundleScore:
    if theirs is None:
        return BundleScore(name, ours.perplexity, None, None)
    return BundleScore(name, ours.perplexity, theirs.perplexity, ours)
