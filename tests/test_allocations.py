"""What the runtime asks the system for while it decodes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgelora
import tiny
from test_float_oracle import make_adapter

SOURCE = Path(__file__).parent / "native" / "count_allocations.c"
DECODING = """
import ctypes, sys
import edgelora
count = ctypes.CDLL(None).own_allocations
count.restype = ctypes.c_long
with edgelora.load(sys.argv[1], threads=2) as model:
    session = model.session(adapter=sys.argv[2] or None)

    def allocations(tokens):
        session.rewind(0)
        session.prefill([1, 2, 3])
        before = count()
        session.decode(tokens, ignore_eos=True)
        return count() - before

    allocations(40)  # the first time buffers grow
    print(allocations(10), allocations(40))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library as Linux does")
@pytest.mark.parametrize("adapter", ["", "a"])
def test_a_token_allocates_nothing(adapter: str, tmp_path: Path) -> None:
    base = tiny.tiny_llama(tmp_path / "base")
    adapters = {"a": make_adapter(base, tmp_path / "a", target_modules="all-linear")}
    edgelora.export(base, tmp_path / "bundle", adapters=adapters)
    counter = tmp_path / "counter.so"
    subprocess.run(["cc", "-shared", "-fPIC", SOURCE, "-o", counter, "-ldl"], check=True)
    said = subprocess.run(
        [sys.executable, "-P", "-c", DECODING, tmp_path / "bundle", adapter],
        env=os.environ | {"LD_PRELOAD": str(counter)},
        check=True,
        capture_output=True,
        text=True,
    )
    few, many = map(int, said.stdout.split())
    assert many == few > 0  # of the call
