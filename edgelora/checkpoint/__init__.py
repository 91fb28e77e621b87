"""A base checkpoint: config, tokenizer, and tensors read one at a time under their HF names."""

from edgelora.checkpoint.fingerprint import FingerprintBuilder, merged_fingerprint
from edgelora.checkpoint.opening import open_checkpoint, read_tokenizer
from edgelora.checkpoint.protocol import Checkpoint, StoredAs

__all__ = [
    "Checkpoint",
    "FingerprintBuilder",
    "StoredAs",
    "merged_fingerprint",
    "open_checkpoint",
    "read_tokenizer",
]
