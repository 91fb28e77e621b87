"""What a command said when it was called in this process."""

from collections.abc import Callable
from typing import NamedTuple


class Said(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Said]
