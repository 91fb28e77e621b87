"""What holds for all tests."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calling import Call, Said

os.environ["HF_HUB_OFFLINE"] = "1"
# Child processes import the installed package, as this one does, not the folder they start in.
os.environ["PYTHONSAFEPATH"] = "1"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process for each file, since fixtures of modules are dear, and for all of tests/arm,
    which builds one wheel in one place.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/arm" if file.startswith("tests/arm/") else file

    return Scheduling(config, log)


def has_amx() -> bool:
    """Whether prefill multiplies bfloat16 here."""
    from edgelora.device import read_cpuinfo

    return "amx_bf16" in read_cpuinfo().features


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


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["edgelora", *map(str, arguments)])
        try:
            from edgelora.cli import main

            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def fails(call: Call) -> Callable[..., str]:
    """The one line of a command that fails."""

    def run(*arguments: object) -> str:
        said = call(*arguments)
        assert said.code == 1, said
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        return said.err

    return run
