"""Chat templates, rendered in a sandbox with the environment that transformers gives them."""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from edgelora.errors import EdgeLoraError

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_REFUSALS = (  # what an expression of a template can raise
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """Messages → the text that the model was trained on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, path: Path) -> None:
        """Raises EdgeLoraError, naming `path`, if the template is not valid."""
        self._path = path
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise EdgeLoraError(f"{path}: not a valid chat template ({error})") from error

    @classmethod
    def read(cls, folder: Path, config: Mapping[str, Any]) -> "ChatTemplate | None":
        """From chat_template.jinja or `chat_template` of tokenizer_config.json; None without."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(_read(path), _special_tokens(config), path=path)
        path = folder / "tokenizer_config.json"
        source = _default(config.get("chat_template"), path)
        return cls(source, _special_tokens(config), path=path) if source else None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation up to where the assistant answers.

        Raises EdgeLoraError if the template refuses it.
        """
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _REFUSALS as error:
            raise EdgeLoraError(f"{self._path}: refuses these messages: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what training learns: no effect here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  (the template's filter, called as it likes)
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Without jinja's own escaping of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error}): copy the bundle again") from error


def _default(template: Any, source: Path) -> str | None:
    """A template, or the one named "default" of several."""
    if template is None or isinstance(template, str):
        return template
    try:
        default = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (KeyError, TypeError):
        default = template
    if default is None or isinstance(default, str):
        return default
    raise EdgeLoraError(f"{source}: chat_template is neither a string nor a list of named ones")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names to texts; a token is a string or an object with `content`."""
    tokens = {name: config.get(name) for name in _SPECIAL_TOKENS}
    return {
        name: str(token["content"] if isinstance(token, dict) else token)
        for name, token in tokens.items()
        if token is not None and (not isinstance(token, dict) or "content" in token)
    }
