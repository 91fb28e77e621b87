"""Text of a bundle: its tokenizer, its chat template, and text that arrives token by token."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgelora.chat_template import ChatTemplate
from edgelora.errors import EdgeLoraError

Message = Mapping[str, Any]  # role, content
_REPLACEMENT = "\ufffd"  # what a decoder makes of half a character
_CONTEXT_TOKENS = 6  # of the prompt: some decoders treat the first piece of a text differently


class Text:
    """The tokenizer and chat template of one bundle folder."""

    def __init__(self, folder: Path) -> None:
        """Raises EdgeLoraError if tokenizer.json or tokenizer_config.json is missing or damaged."""
        self._folder = folder
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        self._template = ChatTemplate.read(folder, _read_json(folder / "tokenizer_config.json"))

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that begins a sequence (with bos where the tokenizer adds one).

        Raises EdgeLoraError for a text with lone surrogates, which came from invalid UTF-8.
        """
        return list(self._tokenizer.encode(_valid(text)).ids)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant is to answer.

        Raises EdgeLoraError if the bundle has no chat template or it refuses the messages.
        """
        if self._template is None:
            raise EdgeLoraError(f"{self._folder}: no chat template: give a text, not messages")
        rendered = _valid(self._template.render(messages))
        return list(self._tokenizer.encode(rendered, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int] = (), *, stop: Sequence[str] = ()) -> "TextStream":
        """Text of the tokens that follow `prompt`, until one of the strings `stop`."""
        return TextStream(self, prompt, stop)


class TextStream:
    """Turns tokens, one at a time, into whole characters, and ends before a stop string."""

    def __init__(self, text: Text, prompt: Sequence[int], stop: Sequence[str]) -> None:
        """Raises EdgeLoraError for an empty stop string."""
        if "" in stop:
            raise EdgeLoraError("stop: an empty string would stop before anything: leave it out")
        self._text = text
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])  # those still needed to decode what follows
        self._read = len(self._tokens)  # how many of them are known as text already
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met; nothing comes after it."""
        return self._stop.stopped

    def push(self, token: int) -> str:
        """The text that is certain now: "" while a character or a stop string may be unfinished."""
        self._tokens.append(token)
        known = self._text.decode(self._tokens[: self._read])
        text = self._text.decode(self._tokens)
        if text.endswith(_REPLACEMENT) or len(text) <= len(known):
            return ""
        del self._tokens[: self._read]
        self._read = len(self._tokens)
        return self._stop.push(text[len(known) :])

    def finish(self) -> str:
        """What was held back for a stop string that did not come; half a character is dropped."""
        known = self._text.decode(self._tokens[: self._read])
        rest = self._text.decode(self._tokens)[len(known) :].rstrip(_REPLACEMENT)
        return self._stop.push(rest) + self._stop.finish()


class StopStrings:
    """Passes text through up to the first stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""  # could be the beginning of a stop string
        self.stopped = False

    def push(self, piece: str) -> str:
        """The part of everything held and `piece` that belongs to no stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [i for i in (text.find(stop) for stop in self._stop) if i >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) - self._beginning(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def finish(self) -> str:
        """What is still held: no stop string followed."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self._stop), default=0)
        return next(
            (
                length
                for length in range(min(longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop)
            ),
            0,
        )


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EdgeLoraError(f"the prompt is not valid UTF-8 (at character {error.start})") from None
    return text


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # tokenizers raises nothing narrower
        raise EdgeLoraError(f"{path}: no tokenizer ({error}): export the bundle again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error}): copy the bundle again") from error
    if not isinstance(fields, dict):
        raise EdgeLoraError(f"{path}: not an object: export the bundle again")
    return fields
