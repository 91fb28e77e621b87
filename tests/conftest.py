"""What holds for all tests."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Child processes import the installed package, as this one does, not the folder they start in.
os.environ["PYTHONSAFEPATH"] = "1"


def has_amx() -> bool:
    """Whether prefill multiplies bfloat16 here."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()


@pytest.fixture(scope="module")
def library() -> str:
    """With our operators; EDGELORA_LIBRARY names another than the package's."""
    path = os.environ.get("EDGELORA_LIBRARY")
    if path is None:
        from edgelora import native

        path = str(native.library_path())
    assert Path(path).is_file()
    return path


@pytest.fixture
def integer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that multiply int8 exactly, where this CPU's best ones would not."""
    if has_amx():
        monkeypatch.setenv("EDGELORA_FORCE_ISA", "avx512_vnni")
