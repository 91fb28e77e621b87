"""EdgeLoRA: fine-tuned language models on small devices.

`load` needs only numpy, onnxruntime, tokenizers and jinja2; `export` needs `pip install
edgelora[export]`; `compose` needs only numpy for the methods linear, cat and svd.
"""

from typing import TYPE_CHECKING, Any

from edgelora.errors import EdgeLoraError
from edgelora.model import Model, Session, load

if TYPE_CHECKING:
    from edgelora.composing import ComposeReport, compose
    from edgelora.exporter import ExportReport, export

__all__ = [
    "ComposeReport",
    "EdgeLoraError",
    "ExportReport",
    "Model",
    "Session",
    "compose",
    "export",
    "load",
]

_LATER = {
    "ComposeReport": "edgelora.composing",
    "ExportReport": "edgelora.exporter",
    "compose": "edgelora.composing",
    "export": "edgelora.exporter",
}


def __getattr__(name: str) -> Any:
    """What is imported when first used: `export` needs onnx."""
    if name not in _LATER:
        raise AttributeError(f"module 'edgelora' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LATER[name]), name)
