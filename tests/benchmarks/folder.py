"""Where the peers and their models lie: everything under one folder that ./dev bench prepare
fills.

    llama.cpp/source, llama.cpp/build, llama.cpp/VERSION
    genai/, openvino/           virtual environments
    models/<model>/checkpoint   Hugging Face folder
    models/<model>/adapters/rank16 …   PEFT folders
    models/<model>/<what a contestant loads>
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

SMOLLM2, LLAMA_1B = "smollm2-135m", "llama-1.07b"
MODELS = (SMOLLM2, LLAMA_1B)
RANKS = (8, 16, 32, 64)
# The installed EdgeLoRA, not a source tree that is the current folder.
OURSELVES = (sys.executable, "-P", "-m", "edgelora")
GGUF_RANKS = (16, 64)  # of them, as llama.cpp's adapters


@dataclass(frozen=True)
class Peers:
    """Paths; nothing says that they exist."""

    root: Path

    @property
    def llama_source(self) -> Path:
        return self.root / "llama.cpp" / "source"

    @property
    def llama_version(self) -> Path:
        return self.root / "llama.cpp" / "VERSION"

    def llama_tool(self, name: str) -> Path:
        return self.root / "llama.cpp" / "build" / "bin" / f"llama-{name}"

    def environment(self, peer: str) -> Path:
        return self.root / peer

    def python(self, peer: str) -> Path:
        return self.environment(peer) / "bin" / "python"

    def isolated(self, peer: str) -> list[object]:
        """Its Python, which sees neither PYTHONPATH nor the files beside a script."""
        return [self.python(peer), "-I"]

    @property
    def calibration(self) -> Path:
        """A plain text that whoever measures puts there, for quality balanced."""
        return self.root / "calibration.txt"

    def model(self, name: str) -> Path:
        return self.root / "models" / name

    def checkpoint(self, name: str) -> Path:
        return self.model(name) / "checkpoint"

    def float_gguf(self, name: str) -> Path:
        """llama.cpp's, of which its others are made."""
        return self.model(name) / "f32.gguf"

    def adapter(self, name: str, rank: int) -> Path:
        return self.model(name) / "adapters" / f"rank{rank}"


def offline() -> dict[str, str]:
    """The environment of every program that is started: no hub is asked for a model."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
