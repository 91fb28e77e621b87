"""Names that an adapter may have in a bundle."""

import re

from edgelora.errors import EdgeLoraError


def valid_adapter_name(name: str) -> str:
    """The name itself (it becomes a folder). Raises EdgeLoraError saying what is allowed."""
    if name.casefold() == "base":
        raise EdgeLoraError(f"adapter name {name!r}: reserved for the model without an adapter")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) or name.endswith("."):
        rule = "use 1 to 64 of A-Z a-z 0-9 . _ -, and no dot at either end"
        raise EdgeLoraError(f"adapter name {name!r}: {rule}")
    return name
