"""EdgeLoRA: fine-tuned language models on small devices.

`load` needs only numpy, onnxruntime, tokenizers and jinja2; `export` needs `pip install
edgelora[export]`.
"""

from typing import TYPE_CHECKING, Any

from edgelora.errors import EdgeLoraError
from edgelora.model import Model, Session, load

if TYPE_CHECKING:
    from edgelora.exporter import ExportReport, export

__all__ = ["EdgeLoraError", "ExportReport", "Model", "Session", "export", "load"]


def __getattr__(name: str) -> Any:
    """`export` and `ExportReport`, imported when first used: they need onnx."""
    if name not in ("ExportReport", "export"):
        raise AttributeError(f"module 'edgelora' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("edgelora.exporter"), name)
