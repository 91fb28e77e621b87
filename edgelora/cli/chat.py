"""`edgelora chat`."""

import io
import sys
from pathlib import Path
from typing import Any

import click

from edgelora.cli.console import err, show_error
from edgelora.cli.parameters import (
    WeightedName,
    chosen_adapter,
    max_tokens_option,
    seed_option,
    temperature_option,
    threads_option,
    unique,
    weighted_name,
)
from edgelora.errors import EdgeLoraError
from edgelora.model import Model, load


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "adapters",
    type=WeightedName(),
    multiple=True,
    help="Adapter to begin with; repeat for a weighted sum.",
)
@max_tokens_option
@temperature_option
@seed_option
@threads_option
def chat(
    bundle: Path,
    adapters: tuple[tuple[str, float], ...],
    max_tokens: int,
    temperature: float,
    seed: int,
    threads: int,
) -> None:
    """Talks; the whole conversation goes through the chat template.

    /adapter NAME[:WEIGHT] switches in the conversation (several names: their sum), /base goes
    back, /clear forgets the conversation, /quit ends.

    When the context is full, an answer ends there. A message that no longer fits is refused and
    dropped, the conversation is kept: ask something shorter, or /clear.

    \b
    Example:  edgelora chat smollm2 --adapter pirate
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # refused as a prompt, by the line
    with load(bundle, threads=threads) as model:
        names = ", ".join(model.adapters) or "none"
        err.print(f"adapters: {names}. /adapter NAME[:WEIGHT], /base, /clear, /quit")
        conversation = Conversation(model, unique(adapters, "--adapter"))
        settings = {"max_new_tokens": max_tokens, "temperature": temperature, "seed": seed}
        while (line := _read_line(conversation.title)) is not None:
            if line.startswith("/"):
                conversation.command(line)
            elif line:
                conversation.answer(line, settings)


def _read_line(title: str) -> str | None:
    """One line of the user; None at the end of the input or after /quit."""
    try:
        line = input(f"{title}> ").strip()
    except EOFError:
        return None
    return None if line == "/quit" else line


class Conversation:
    """Messages so far, and the adapters that answer next."""

    def __init__(self, model: Model, weights: dict[str, float]) -> None:
        """Raises EdgeLoraError for an adapter that is not in the bundle."""
        self.model = model
        self.weights = self._known(weights)
        self.messages: list[dict[str, str]] = []

    @property
    def title(self) -> str:
        """Who answers next: "base", "pirate", "pirate:0.6 + butler:0.4"."""
        weights = self.weights.items()
        return " + ".join(n if w == 1 else f"{n}:{w:g}" for n, w in weights) or "base"

    def command(self, line: str) -> None:
        """/adapter, /base, /clear; anything else is said to be unknown."""
        word, *names = line.split()
        try:
            if word == "/adapter":
                self.weights = self._parsed(names)
            elif word == "/base":
                self.weights = {}
            elif word == "/clear":
                self.messages.clear()
            else:
                raise EdgeLoraError(f"{word}: unknown; /adapter NAME, /base, /clear, /quit")
        except EdgeLoraError as error:
            show_error(str(error))

    def answer(self, line: str, settings: dict[str, Any]) -> None:
        """Streams the answer and keeps it in the history; without an answer, nothing is kept."""
        asked = [*self.messages, {"role": "user", "content": line}]
        pieces = []
        try:
            for piece in self.model.generate(
                asked, adapter=chosen_adapter(self.weights), stream=True, **settings
            ):
                pieces.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" …", nl=False)
            if not pieces:
                click.echo()
                return
        except EdgeLoraError as error:
            if pieces:
                click.echo()
            show_error(f"error: {error}")
            return
        click.echo()
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _parsed(self, names: list[str]) -> dict[str, float]:
        if not names:
            raise EdgeLoraError("/adapter: which? /adapter NAME or NAME:WEIGHT, or /base")
        try:
            weights = dict(map(weighted_name, names))
        except ValueError as error:
            raise EdgeLoraError(f"/adapter {error}") from None
        if len(weights) < len(names):
            raise EdgeLoraError("/adapter: a name given twice")
        return self._known(weights)

    def _known(self, weights: dict[str, float]) -> dict[str, float]:
        for name in weights:
            if name not in self.model.adapters:
                names = ", ".join(self.model.adapters) or "none"
                raise EdgeLoraError(f"adapter {name!r}: not in this bundle (it has: {names})")
        return weights
