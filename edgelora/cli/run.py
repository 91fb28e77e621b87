"""`edgelora run` and `edgelora chat`."""

import json
from pathlib import Path
from typing import Any

import click

from edgelora.cli.group import WeightedName, err, unique
from edgelora.errors import EdgeLoraError
from edgelora.model import Model, load

_bundle = click.argument("bundle", type=click.Path(path_type=Path))
_threads = click.option("--threads", type=int, default=0, help="0: one for each performance core.")
_temperature = click.option("--temperature", type=float, default=0.0, help="0: greedy.")
_max_tokens = click.option("--max-tokens", type=int, default=256, show_default=True)
_seed = click.option("--seed", type=int, default=0)


@click.command()
@_bundle
@click.option("--prompt", required=True, help="What the user says; goes through the chat template.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text instead.")
@click.option(
    "--adapter", "adapters", type=WeightedName(), multiple=True, help="Repeat for a weighted sum."
)
@_max_tokens
@_temperature
@_seed
@_threads
@click.option("--json", "as_json", is_flag=True)
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

    \b Example:  edgelora run smollm2 --prompt "What is the sea?" --adapter pirate:0.7 --adapter
    butler:0.3
    """
    weights = unique(adapters, "--adapter")
    settings: dict[str, Any] = {
        "adapter": weights or None,
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


@click.command()
@_bundle
@click.option("--adapter", help="Adapter to begin with.")
@_max_tokens
@_temperature
@_seed
@_threads
def chat(
    bundle: Path,
    adapter: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int,
) -> None:
    """Talks; the whole conversation goes through the chat template.

    /adapter NAME switches in the conversation, /base goes back, /clear forgets it, /quit ends.

    \b
    Example:  edgelora chat smollm2 --adapter pirate
    """
    with load(bundle, threads=threads) as model:
        names = ", ".join(model.adapters) or "none"
        err.print(f"adapters: {names}. /adapter NAME, /base, /clear, /quit", markup=False)
        conversation = Conversation(model, adapter)
        settings = {"max_new_tokens": max_tokens, "temperature": temperature, "seed": seed}
        while (line := _read_line(conversation.adapter)) is not None:
            if line.startswith("/"):
                conversation.command(line)
            elif line:
                conversation.answer(line, settings)


def _read_line(adapter: str | None) -> str | None:
    """One line of the user; None at the end of the input or after /quit."""
    try:
        line = input(f"{adapter or 'base'}> ").strip()
    except EOFError:
        return None
    return None if line == "/quit" else line


class Conversation:
    """Messages so far, and the adapter that answers next."""

    def __init__(self, model: Model, adapter: str | None) -> None:
        self.model = model
        self.adapter = adapter
        self.messages: list[dict[str, str]] = []
        if adapter is not None:
            self._check(adapter)

    def command(self, line: str) -> None:
        """/adapter NAME, /base, /clear; anything else is said to be unknown."""
        word, _, name = line.partition(" ")
        try:
            if word == "/adapter":
                self._check(name.strip())
                self.adapter = name.strip()
            elif word == "/base":
                self.adapter = None
            elif word == "/clear":
                self.messages.clear()
            else:
                raise EdgeLoraError(f"{word}: unknown; /adapter NAME, /base, /clear, /quit")
        except EdgeLoraError as error:
            err.print(str(error), markup=False)

    def answer(self, line: str, settings: dict[str, Any]) -> None:
        """Streams the answer and keeps it in the history."""
        self.messages.append({"role": "user", "content": line})
        pieces = []
        try:
            for piece in self.model.generate(
                self.messages, adapter=self.adapter, stream=True, **settings
            ):
                pieces.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" …", nl=False)
        click.echo()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _check(self, name: str) -> None:
        if name not in self.model.adapters:
            names = ", ".join(self.model.adapters) or "none"
            raise EdgeLoraError(f"adapter {name!r}: not in this bundle (it has: {names})")
