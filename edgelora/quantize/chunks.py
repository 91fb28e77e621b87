"""Work over a matrix in cache-sized pieces, on all cores.

numpy releases the GIL inside each operation.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

CHUNK = 1 << 19  # weights: 2 MB of float32, so temporaries stay in the last cache level

Result = TypeVar("Result")


def slices(count: int, size: int) -> Iterator[slice]:
    """Cuts `count` items of `size` weights each into pieces of about CHUNK weights."""
    step = max(1, CHUNK // max(1, size))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def over(work: Callable[[slice], Result], count: int, size: int) -> list[Result]:
    """work(slice) for every piece, in the order of the pieces.

    `work` writes only its own piece, so the result does not depend on the number of threads.
    The first piece that raises decides the error.
    """
    pieces = list(slices(count, size))
    if len(pieces) < 2:
        return [work(piece) for piece in pieces]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(work, pieces))
