"""ctypes declarations of `runtime/include/edgelora.h`, and where the two libraries lie."""

import ctypes
import functools
import importlib.util
import operator
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
)
from pathlib import Path
from typing import Any

from edgelora.errors import EdgeLoraError

OK = 0
FINISH_NAMES = ("length", "stop", "callback", "context")  # EdgeLoraFinish

ModelPointer = ctypes.c_void_p
SessionPointer = ctypes.c_void_p
TokenCallback = ctypes.CFUNCTYPE(c_bool, c_int32, ctypes.c_void_p)


class ModelOptions(ctypes.Structure):
    """EdgeLoraModelOptions."""

    _fields_ = (
        ("size", c_size_t),
        ("onnxruntime_path", c_char_p),
        ("threads", c_int32),
        ("spinning", c_bool),
        ("exact", c_bool),
    )


class ModelInfo(ctypes.Structure):
    """EdgeLoraModelInfo."""

    _fields_ = (
        ("size", c_size_t),
        ("vocab_size", c_int32),
        ("context_length", c_int32),
        ("num_hidden_layers", c_int32),
        ("threads", c_int32),
        ("weight_bytes", c_int64),
        ("kv_cache_bytes", c_int64),
        ("eos_token_count", c_int32),
        ("eos_token_ids", POINTER(c_int32)),
        ("isa", c_char_p),
        ("adapter_count", c_int32),
        ("adapter_names", POINTER(c_char_p)),
    )


class Selfcheck(ctypes.Structure):
    """EdgeLoraSelfcheck."""

    _fields_ = (
        ("size", c_size_t),
        ("adapter", c_char_p),
        ("exact", c_bool),
        ("checked", c_bool),
        ("logits", c_int32),
        ("error", c_double),
        ("tolerance", c_double),
    )


SelfcheckCallback = ctypes.CFUNCTYPE(None, POINTER(Selfcheck), ctypes.c_void_p)


class SessionOptions(ctypes.Structure):
    """EdgeLoraSessionOptions."""

    _fields_ = (("size", c_size_t), ("context_length", c_int32), ("invoked", c_bool))


class Sampling(ctypes.Structure):
    """EdgeLoraSampling."""

    _fields_ = (
        ("size", c_size_t),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("seed", c_uint64),
        ("stop_tokens", POINTER(c_int32)),
        ("stop_token_count", c_size_t),
        ("ignore_eos", c_bool),
    )


class Timings(ctypes.Structure):
    """EdgeLoraTimings."""

    _fields_ = (
        ("size", c_size_t),
        ("prefill_seconds", c_double),
        ("prefill_tokens", c_int64),
        ("decode_seconds", c_double),
        ("decode_tokens", c_int64),
    )


_INTEGERS = {  # type → least and greatest value; ctypes would wrap others around
    c_int32: (-(2**31), 2**31 - 1),
    c_uint64: (0, 2**64 - 1),
}
_TOKENS = POINTER(c_int32)
_FLOATS = POINTER(c_float)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # name → result type, argument types
    "version": (c_char_p, ()),
    "last_error": (c_char_p, ()),
    "model_options_init": (None, (POINTER(ModelOptions),)),
    "model_load": (c_int32, (c_char_p, POINTER(ModelOptions), POINTER(ModelPointer))),
    "model_free": (None, (ModelPointer,)),
    "model_info": (c_int32, (ModelPointer, POINTER(ModelInfo))),
    "model_selfcheck": (c_int32, (ModelPointer, SelfcheckCallback, ctypes.c_void_p)),
    "adapter_load": (c_int32, (ModelPointer, c_char_p, POINTER(c_int64))),
    "adapter_load_file": (c_int32, (ModelPointer, c_char_p, POINTER(c_int64))),
    "adapter_compose": (c_int32, (POINTER(c_int64), _FLOATS, c_size_t, POINTER(c_int64))),
    "adapter_unload": (c_int32, (c_int64,)),
    "session_options_init": (None, (POINTER(SessionOptions),)),
    "session_create": (
        c_int32,
        (ModelPointer, POINTER(SessionOptions), POINTER(SessionPointer)),
    ),
    "session_free": (None, (SessionPointer,)),
    "session_set_adapter": (c_int32, (SessionPointer, c_int64, c_bool)),
    "session_prefill": (c_int32, (SessionPointer, _TOKENS, c_size_t)),
    "session_logits": (c_int32, (SessionPointer, _TOKENS, c_size_t, _FLOATS)),
    "session_last_logits": (_FLOATS, (SessionPointer,)),
    "session_position": (c_size_t, (SessionPointer,)),
    "session_rewind": (c_int32, (SessionPointer, c_size_t)),
    "sampling_init": (None, (POINTER(Sampling),)),
    "session_generate": (
        c_int32,
        (
            SessionPointer,
            POINTER(Sampling),
            c_size_t,
            _TOKENS,
            POINTER(c_size_t),
            POINTER(c_int32),
            TokenCallback,
            ctypes.c_void_p,
        ),
    ),
    "session_cancel": (None, (SessionPointer,)),
    "session_timings": (c_int32, (SessionPointer, POINTER(Timings))),
}


def library_path() -> Path:
    """The runtime inside this package; raises EdgeLoraError if it was installed without one."""
    path = Path(__file__).with_name("libedgelora.so")
    if path.is_file():
        return path
    advice = "build and install the package with pip install ."
    if (path.parents[1] / "pyproject.toml").is_file():
        advice += " and start Python outside of its source folder, or with -P"
    raise EdgeLoraError(f"{path}: missing: {advice}")


def onnxruntime_path() -> Path:
    """The library inside the installed onnxruntime package, which is found but not imported.

    Raises EdgeLoraError if the package or its library is missing.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise EdgeLoraError("onnxruntime is missing: pip install onnxruntime")
    folder = Path(spec.origin).parent / "capi"
    found = sorted(path for path in folder.glob("libonnxruntime.*") if ".so" in path.name)
    if not found:
        raise EdgeLoraError(f"{folder}: no libonnxruntime.so: reinstall onnxruntime")
    return found[-1]


@functools.cache
def open_library(path: Path) -> ctypes.CDLL:
    """The runtime, its functions declared; raises EdgeLoraError if it cannot load or lacks one."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = library[f"edgelora_{name}"]
            function.restype, function.argtypes = result, arguments
            setattr(library, f"edgelora_{name}", function)
    except (OSError, AttributeError) as error:
        raise EdgeLoraError(f"{path}: cannot be loaded ({error}): reinstall edgelora") from error
    return library


def check(library: ctypes.CDLL, status: int) -> None:
    """Raises EdgeLoraError with this thread's message unless `status` is EDGELORA_OK."""
    if status != OK:
        raise EdgeLoraError(library.edgelora_last_error().decode(errors="backslashreplace"))


def options(kind: type[Any], init: Any, **values: Any) -> Any:
    """An option struct filled by its `_init` function, then with `values`.

    Raises EdgeLoraError for an integer that the field cannot hold.
    """
    struct, types = kind(), dict(kind._fields_)
    init(ctypes.byref(struct))
    for name, value in values.items():
        if types[name] in _INTEGERS:
            _check_range(name, value, *_INTEGERS[types[name]])
        setattr(struct, name, value)
    return struct


def _check_range(name: str, value: Any, least: int, greatest: int) -> None:
    if not least <= operator.index(value) <= greatest:
        raise EdgeLoraError(f"{name} is {value}, not in {least}…{greatest}")
