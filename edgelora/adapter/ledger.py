"""The ledger: every config field and tensor is exported, harmless or refused, with a reason.

What is exported but could mean something else has one more entry, doubtful, and is warned of.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Verdict = Literal["exported", "harmless", "doubtful", "refused"]
NAMES_SHOWN = 8  # of one reason in an error's line; the ledger itself lists all


class LedgerEntry(NamedTuple):
    """One config field or tensor, and what becomes of it."""

    item: str
    verdict: Verdict
    reason: str


def exported(item: str, reason: str) -> LedgerEntry:
    return LedgerEntry(item, "exported", reason)


def harmless(item: str, reason: str) -> LedgerEntry:
    return LedgerEntry(item, "harmless", reason)


def doubtful(item: str, reason: str) -> LedgerEntry:
    return LedgerEntry(item, "doubtful", reason)


def refused(item: str, reason: str) -> LedgerEntry:
    return LedgerEntry(item, "refused", reason)


def refusals(ledger: Iterable[LedgerEntry]) -> str:
    """All refused items as one line, grouped by reason; empty if nothing is refused."""
    groups: dict[str, list[str]] = {}
    for entry in ledger:
        if entry.verdict == "refused":
            groups.setdefault(entry.reason, []).append(entry.item)
    line = "; ".join(f"{_shown(items)}: {reason}" for reason, items in groups.items())
    return line if line.isprintable() else line.encode("unicode_escape").decode()


def _shown(items: list[str]) -> str:
    more = len(items) - NAMES_SHOWN
    return ", ".join(items[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
