"""Names that an adapter may have in a bundle."""

import re
from collections.abc import Iterable

from edgelora.errors import EdgeLoraError

_PORTS = tuple(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))
WINDOWS_DEVICES = frozenset(("con", "prn", "aux", "nul", *_PORTS))


def model_name(text: str) -> str:
    """A hub's "owner/model" as it is; of anything else, such as a path, the last component."""
    parts = [part for part in text.replace("\\", "/").split("/") if part]
    is_hub_name = len(parts) == 2 and text[:1] not in "/.~" and "\\" not in text
    return text if is_hub_name else parts[-1] if parts else ""


def valid_adapter_name(name: str) -> str:
    """The name itself (it becomes a folder). Raises EdgeLoraError saying what is allowed."""
    if name.casefold() == "base":
        raise EdgeLoraError(f"adapter name {name!r}: reserved for the model without an adapter")
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) or name.endswith("."):
        rule = "use 1 to 64 of A-Z a-z 0-9 . _ -, and no dot at either end"
        raise EdgeLoraError(f"adapter name {name!r}: {rule}")
    if name.partition(".")[0].casefold() in WINDOWS_DEVICES:
        raise EdgeLoraError(f"adapter name {name!r}: a device on Windows: choose another name")
    return name


def valid_adapter_names(names: Iterable[str]) -> None:
    """Raises EdgeLoraError for a bad name, or two that are one folder where case does not count."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(valid_adapter_name(name).casefold(), name)
        if other != name:
            raise EdgeLoraError(
                f"adapter names {other!r} and {name!r}: one folder on systems that ignore case: "
                "choose another name"
            )
