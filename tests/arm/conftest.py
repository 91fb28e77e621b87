"""The fixtures: the aarch64 wheel, built once and unpacked, and a bundle of the real model."""

import sys
from pathlib import Path

import pytest

import edgelora
from edgelora.cli.demo import GGUF, shipped_adapters
from test_smollm2 import gguf_folder

sys.path.append(str(Path(__file__).parent))  # its modules import each other by plain names

import emulated


@pytest.fixture(scope="session")
def wheel() -> Path:
    emulated.skip_without_tools()
    return emulated.build_wheel()


@pytest.fixture(scope="session")
def machine(wheel: Path) -> emulated.Machine:
    return emulated.Machine(emulated.unpack(wheel), emulated.onnxruntime_library())


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one of its adapters: an emulated token takes seconds."""
    bundle = tmp_path_factory.mktemp("arm") / "smollm2"
    adapters = {"pirate": dict(shipped_adapters())["pirate"]}
    edgelora.export(gguf_folder() / GGUF, bundle, adapters=adapters, report=False)
    return bundle
