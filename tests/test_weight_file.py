"""The file of weights: written in pages, mapped once, in the order the runtime needs it in."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgelora
import tiny
from edgelora.bundle import PAGE, WeightFile
from edgelora.errors import EdgeLoraError
from edgelora.graph import WEIGHT_FILE
from edgelora.manifest import HEAD_FIELDS, file_entries, manifest_bytes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """In nf4, with absmax that is unpacked."""
    folder = tmp_path_factory.mktemp("weights")
    base = tiny.tiny_llama(folder / "base")
    edgelora.export(base, folder / "bundle", format="nf4", report=False)
    return folder / "bundle"


class Recorder(io.RawIOBase):
    """A file that keeps the size of each write."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return sum(self.sizes)

    def write(self, data) -> int:
        self.sizes.append(len(data))
        return len(data)


def test_a_page_is_written_at_once(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(
        Path, "open", lambda _, mode, buffering: io.BufferedWriter(recorder, buffering)
    )
    file = WeightFile(tmp_path)
    sizes = [3, PAGE - 64, PAGE, 2 * PAGE + 17, 5, 0, PAGE // 2, 3 * PAGE]
    for i, size in enumerate(sizes):
        file.add(f"w{i}", np.full(size, i, np.uint8))
    file.close()
    assert recorder.sizes[:-1] == [PAGE] * (len(recorder.sizes) - 1)
    assert len(recorder.sizes) == 8


def test_what_is_unpacked_lies_behind_all_that_is_used_in_place(bundle):
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    places = {
        tensor.name: int({e.key: e.value for e in tensor.external_data}["offset"])
        for tensor in graph.initializer
        if tensor.external_data
    }
    nf4 = {name.rsplit(".", 1)[0] for name in places if name.endswith("absmax_table")}
    roles = ("scales", "zero_points", "absmax_offset", "absmax_table")
    unpacked = {f"{name}.{role}" for name in nf4 for role in roles}
    assert len(nf4) > 3 and unpacked < {*places}
    assert max(places[name] for name in {*places} - unpacked) < min(places[n] for n in unpacked)


def mappings(path: Path) -> list[int]:
    """Where this process has mapped the file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [int(line.split("-")[0], 16) for line in lines if line.endswith(str(path))]


def test_the_runtime_maps_it_once_where_large_pages_can_hold_it(bundle):
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not tell mappings")
    with edgelora.load(bundle) as model:
        model.logits([1, 2, 3])
        [begin] = mappings(bundle / WEIGHT_FILE)
        assert begin % PAGE == 0
    assert mappings(bundle / WEIGHT_FILE) == []


def test_weights_beyond_the_end_of_their_file_are_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(e for e in tensor.external_data if e.key == "offset").value = str(1 << 40)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    fields = json.loads((copy / "manifest.json").read_text())
    kept = {key: fields[key] for key in fields if key not in HEAD_FIELDS}
    (copy / "manifest.json").write_bytes(manifest_bytes(kept | {"files": file_entries(copy)}))
    with pytest.raises(EdgeLoraError, match=f"{tensor.name} lies beyond the end of the file"):
        edgelora.load(copy)
