"""What the user asked for, checked where it is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import EdgeLoraError

FORMATS = ("int4", "nf4", "float")
EMBEDDING_FORMATS = ("int8", "int4")
MODES = ("side", "merge", "auto")
MERGE_BASES = ("float", "nf4", "auto")
FLAVORS = ("edgelora", "ort")
BLOCK_SIZES = (32, 64, 128)
CALIBRATION_WINDOWS: Mapping[str, int] = {"fast": 0, "balanced": 32, "best": 64}
"""Quality → windows of calibration text that are read for it."""
QUALITIES = tuple(CALIBRATION_WINDOWS)
DEFAULT_CONTEXT = 8192  # positions; longer contexts are asked for


@dataclass(frozen=True)
class ExportOptions:
    """None leaves the decision to the plan."""

    mode: str = "side"
    format: str | None = None
    block_size: int | None = None
    zero_points: bool = False
    embedding_format: str | None = None
    head_format: str | None = None
    quality: str = "fast"
    calibration: Path | str | None = None  # a plain text file
    flavor: str = "edgelora"
    context_length: int | None = None
    device: str | None = None
    merge_base: str | None = None  # what an adapter is merged into; None: "float"
    report: bool = True
    report_text: Path | str | None = None  # a plain text file in place of the built-in text

    def __post_init__(self) -> None:
        self._check_values()
        self._check_flavor()
        self._check_float()
        self._check_quality()
        self._check_merging()
        if self.format == "nf4" and self.block_size not in (None, 64):
            raise EdgeLoraError(f"block size {self.block_size}: nf4 has blocks of 64")
        if self.zero_points and self.format not in (None, "int4"):
            raise EdgeLoraError(f"zero points with format {self.format}: only int4 has them")

    def _check_values(self) -> None:
        _one_of("mode", self.mode, MODES)
        _one_of("flavor", self.flavor, FLAVORS)
        if self.format is not None:
            _one_of("format", self.format, FORMATS)
        if self.block_size is not None:
            _one_of("block size", self.block_size, BLOCK_SIZES)
        if self.embedding_format is not None:
            _one_of("embedding format", self.embedding_format, EMBEDDING_FORMATS)
        if self.head_format is not None:
            _one_of("head format", self.head_format, EMBEDDING_FORMATS)
        _one_of("quality", self.quality, QUALITIES)
        if self.context_length is not None and self.context_length < 1:
            raise EdgeLoraError(f"context length {self.context_length}: at least 1")

    def _check_flavor(self) -> None:
        if self.format == "nf4" and self.flavor == "ort":
            raise EdgeLoraError("--flavor ort: ONNX Runtime has no nf4 with double quantization")
        if self.embedding_format == "int4" and self.flavor == "ort":
            raise EdgeLoraError("--flavor ort: the embedding is int8")

    def _check_float(self) -> None:
        if self.format != "float":
            return
        if self.block_size is not None:
            raise EdgeLoraError(f"block size {self.block_size}: format float has no blocks")
        for what, asked in (("embedding", self.embedding_format), ("head", self.head_format)):
            if asked is not None:
                raise EdgeLoraError(f"{what} format {asked}: with format float it is float too")

    def _check_quality(self) -> None:
        if self.quality == "fast":
            if self.calibration is not None:
                raise EdgeLoraError(
                    f"{self.calibration}: quality fast reads no calibration text: "
                    "choose --quality balanced"
                )
            return
        if self.format not in (None, "int4"):
            raise EdgeLoraError(f"quality {self.quality} with format {self.format}: int4 only")
        if self.calibration is None:
            raise EdgeLoraError(
                f"quality {self.quality}: needs --calibration FILE, a plain text of the kind that "
                "the model will read or write"
            )

    def _check_merging(self) -> None:
        if self.merge_base is not None:
            _one_of("merge base", self.merge_base, MERGE_BASES)
            if self.mode == "side":
                raise EdgeLoraError(
                    f"merge base {self.merge_base}: in mode side nothing is merged: choose --mode "
                    "merge or auto"
                )
        if self.report_text is not None and not self.report and self.mode != "auto":
            raise EdgeLoraError(f"{self.report_text}: no report was asked for, so it is not read")


def _one_of(what: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise EdgeLoraError(f"{what} {value!r}: one of {', '.join(map(str, allowed))}")
