"""What stays resident of the weights' file once a session is open."""

import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest

from operator_models import Packed, linear_model, nf4, open_session

PAGE = os.sysconf("SC_PAGESIZE")
PAGEMAP = Path("/proc/self/pagemap")  # what the operators ask


@pytest.fixture(scope="module")
def packed() -> Packed:
    return nf4([2048], 4096)


@pytest.fixture
def model(packed: Packed, tmp_path: Path) -> Path:
    """One Linear whose constants lie in a file of their own, as a bundle's."""
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.load_from_string(linear_model(packed)), path,
        save_as_external_data=True, location="model.onnx.data", size_threshold=0,
    )  # fmt: skip
    return path


def resident(path: Path) -> dict[int, int]:
    """Bytes in this process's memory by where in the file their mapping begins."""
    found: dict[int, int] = {}
    begin = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        parts = line.split(maxsplit=5)
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", parts[0]):
            begin = int(parts[2], 16) if parts[-1] == str(path) else None
        elif parts[0] == "Rss:" and begin is not None:
            found[begin] = found.get(begin, 0) + 1024 * int(parts[1])
    return found


def constant_at(model: Path, ending: str) -> tuple[int, int]:
    """The first page in the file, and the bytes."""
    graph = onnx.load(model, load_external_data=False).graph
    [tensor] = [tensor for tensor in graph.initializer if tensor.name.endswith(ending)]
    place = {entry.key: entry.value for entry in tensor.external_data}
    return int(place["offset"]) // PAGE * PAGE, int(place["length"])


@pytest.mark.skipif(not os.access(PAGEMAP, os.R_OK), reason="the system does not tell pages")
def test_absmax_leaves_memory_once_it_is_unpacked(
    library: str, packed: Packed, model: Path
) -> None:
    begin, size = constant_at(model, "zero_points")
    assert size == 2048 * 4096 // 64
    session = open_session(library, model)
    x = np.random.default_rng(1).standard_normal((1, 3, 4096), np.float32)
    feeds = {"x": x, "adapter_ids": np.zeros(1, np.int64)}
    first = session.run(None, feeds)[0]
    found = resident(model.with_name("model.onnx.data"))
    codes = constant_at(model, "codes")
    assert found[codes[0]] >= codes[1], found
    assert found[begin] == 0, found
    assert (session.run(None, feeds)[0] == first).all()
    assert (open_session(library, linear_model(packed)).run(None, feeds)[0] == first).all()
