"""`edgelora run`."""

import json
from pathlib import Path
from typing import Any

import click

from edgelora.cli.parameters import (
    WeightedName,
    chosen_adapter,
    json_option,
    max_tokens_option,
    seed_option,
    temperature_option,
    threads_option,
    unique,
)
from edgelora.errors import EdgeLoraError
from edgelora.model import Model, load


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What the user says; goes through the chat template.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text instead.")
@click.option(
    "--adapter", "adapters", type=WeightedName(), multiple=True, help="Repeat for a weighted sum."
)
@max_tokens_option
@temperature_option
@seed_option
@threads_option
@json_option
def run(
    bundle: Path,
    prompt: str,
    adapters: tuple[tuple[str, float], ...],
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int,
    *,
    raw: bool,
    as_json: bool,
) -> None:
    """Generates an answer to one prompt.

    \b
    Example:
      edgelora run smollm2 --prompt "What is the sea?" \\
          --adapter pirate:0.7 --adapter butler:0.3
    """
    if not prompt:
        raise EdgeLoraError("the prompt is empty")
    weights = unique(adapters, "--adapter")
    settings: dict[str, Any] = {
        "adapter": chosen_adapter(weights),
        "max_new_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
    }
    with load(bundle, threads=threads) as model:
        asked = prompt if raw else model.chat_or_text(prompt)
        if as_json:
            click.echo(json.dumps(_result(model, asked, weights, settings), ensure_ascii=False))
            return
        for piece in model.generate(asked, stream=True, **settings):
            click.echo(piece, nl=False)
        click.echo()


def _result(
    model: Model, asked: Any, weights: dict[str, float], settings: dict[str, Any]
) -> dict[str, Any]:
    result = model.complete(asked, **settings)
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "adapter": weights or None,
        "finish": result.finish,
        "prompt_tokens": result.timings.prefill_tokens,
        "prefill_seconds": result.timings.prefill_seconds,
        "decode_seconds": result.timings.decode_seconds,
    }
