"""`edgelora eval`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelora.cli.console import err, out, show_columns
from edgelora.cli.parameters import NamedPath, json_option, threads_option, unique
from edgelora.cli.progress import stages

if TYPE_CHECKING:
    from edgelora.evaluating import BundleEvaluation, BundleScore


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    help="What the bundle was made from: the float model to compare with.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Plain text to score.  [default: a built-in one]",
)
@click.option(
    "--windows",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Of 512 tokens; the second half of each is scored.",
)
@click.option(
    "--adapter",
    "adapters",
    type=NamedPath(),
    multiple=True,
    help="PEFT folder of a merged adapter, or one in flavor ort; repeat.",
)
@threads_option
@json_option
def eval(
    bundle: Path,
    base: Path | None,
    text: Path | None,
    windows: int,
    adapters: tuple[tuple[str, Path], ...],
    threads: int,
    *,
    as_json: bool,
) -> None:
    """Measures on a text what BUNDLE loses, as this machine computes it: KL divergence from the
    float model, same top token, perplexity, of the base and of every adapter.

    Without --base there is nothing to compare with: perplexity alone.

    \b
    Example:  edgelora eval smollm2 --base SmolLM2-135M-Instruct --text test.txt
    """
    from edgelora.evaluating import evaluate_bundle

    with stages() as progress:
        found = evaluate_bundle(
            bundle,
            base=base,
            adapters=unique(adapters, "--adapter"),
            text=text,
            windows=windows,
            threads=threads,
            progress=progress,
        )
    if as_json:
        out.print_json(json.dumps(_fields(found)))
        return
    show_columns([_HEAD, *(_row(score) for score in found.scores)])
    out.print(f"{_text(found)}, {found.isa} kernels")
    if base is None:
        err.print("no divergences: give the float model with --base")


_HEAD = ("", "mean KL", "99 % KL", "same top", "perplexity", "float model's")


def _row(found: "BundleScore") -> tuple[str, ...]:
    name, score = found.adapter or "(base)", found.score
    if score is None or found.float_perplexity is None:
        return name, "–", "–", "–", f"{found.perplexity:.3f}", "–"
    return (
        name,
        f"{score.mean_kl:.4f}",
        f"{score.kl_99_percent:.3f}",
        f"{score.same_top_token:.1%}",
        f"{found.perplexity:.3f}",
        f"{found.float_perplexity:.3f}",
    )


def _text(found: "BundleEvaluation") -> str:
    text = found.text
    windows, positions = text.windows.shape
    return f"{text.name} text, {windows} × {positions} tokens, {text.tokens_scored} scored"


def _fields(found: "BundleEvaluation") -> dict[str, object]:
    return {
        "text": asdict(found.text.description),
        "isa": found.isa,
        "scores": [asdict(score) for score in found.scores],
    }
