"""A JSON file of a bundle, of one format and version."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError

AGAIN = "export the bundle again"


def read_json_file(path: Path, what: str, format_name: str, version: int) -> dict[str, Any]:
    """Raises EdgeLoraError if it cannot be read, or is another format or version."""
    with whole(path):
        fields: dict[str, Any] = json.loads(path.read_bytes())
        known = (fields["format"], fields["format_version"]) == (format_name, version)
    if not known:
        raise EdgeLoraError(f"{path}: not a {what} of this version: {AGAIN}")
    return fields


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """What is missing or of another kind in the file raises EdgeLoraError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EdgeLoraError(f"{path}: cannot be read ({error}): {AGAIN}") from error
