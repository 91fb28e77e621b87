"""One sequence of tokens: its kv_cache, its position, its active adapter."""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelora import native
from edgelora.errors import EdgeLoraError
from edgelora.generation import Sampling, Timings
from edgelora.interruption import interruptible

if TYPE_CHECKING:
    from edgelora.model import Model

Adapter = str | Mapping[str, float] | None  # a name, a weighted sum of names, or the base
_GREEDY = Sampling()
_COUNT_MAX = 2**63 - 1  # more than any context; a C size_t holds it


class Session:
    """Made by `Model.session`; a context manager, freed at the latest with the object.

    One thread at a time may use it; only `cancel` may be called beside it.
    A failed call raises EdgeLoraError and leaves the session as it was.
    """

    def __init__(
        self, model: "Model", *, adapter: Adapter, context_length: int | None, invoked: bool
    ) -> None:
        """context_length: positions, None for the model's; invoked: see `Model.session`."""
        self._model = model
        self._library = model.library
        options = native.options(
            native.SessionOptions,
            self._library.edgelora_session_options_init,
            context_length=context_length or 0,
            invoked=invoked,
        )
        pointer = native.SessionPointer()
        self._check(
            self._library.edgelora_session_create(
                model.pointer, ctypes.byref(options), ctypes.byref(pointer)
            )
        )
        self._open_pointer = pointer
        self._finalizer = weakref.finalize(self, self._library.edgelora_session_free, pointer)
        self._adapter: Adapter = None
        self._sum: weakref.finalize[..., Any] | None = None  # unloads the weighted sum in use
        self._sum_handle = 0
        self.set_adapter(adapter)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the kv_cache; the session cannot be used afterwards."""
        self._finalizer()
        if self._sum is not None:
            self._sum()

    @property
    def adapter(self) -> Adapter:
        """What computes the next positions; setting it computes those so far anew with it."""
        return self._adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self.set_adapter(adapter)

    def set_adapter(self, adapter: Adapter, *, keep_cache: bool = False) -> None:
        """Switches; at the next step the positions so far that are another adapter's, and those
        behind them, are computed anew unless `keep_cache`.

        Activated LoRA acts from its invocation tokens on, where they occur last in the text as it
        is when a call begins; until then the positions are the base's, and stay.

        Raises EdgeLoraError for an unknown name.
        """
        if self._sum is not None and adapter == self._adapter:
            self._set_handle(self._sum_handle, keep_cache=keep_cache)
            return
        handle = self._model.adapter_handle(adapter)
        unload = self._library.edgelora_adapter_unload
        composed = weakref.finalize(self, unload, handle) if isinstance(adapter, Mapping) else None
        try:
            self._set_handle(handle, keep_cache=keep_cache)
        except EdgeLoraError:
            if composed is not None:
                composed()
            raise
        if self._sum is not None:
            self._sum()
        self._sum, self._sum_handle = composed, handle
        self._adapter = dict(adapter) if isinstance(adapter, Mapping) else adapter

    def _set_handle(self, handle: int, *, keep_cache: bool) -> None:
        self._check(self._library.edgelora_session_set_adapter(self._pointer, handle, keep_cache))

    @property
    def position(self) -> int:
        """Length of the sequence: tokens prefilled and generated."""
        return int(self._library.edgelora_session_position(self._pointer))

    def prefill(self, tokens: Sequence[int]) -> None:
        """Appends tokens, at least one."""
        array = _token_array(tokens)
        self._run(self._library.edgelora_session_prefill, array, len(array))

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Appends tokens and returns the logits of each, float32 [len(tokens), vocab_size]."""
        array = _token_array(tokens)
        out = np.empty((len(array), self._model.info.vocab_size), np.float32)
        into = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._run(self._library.edgelora_session_logits, array, len(array), into)
        return out

    @property
    def last_logits(self) -> NDArray[np.float32] | None:
        """A copy of the last position's logits, float32 [vocab_size], or None if not at hand."""
        pointer = self._library.edgelora_session_last_logits(self._pointer)
        if not pointer:
            return None
        return np.ctypeslib.as_array(pointer, (self._model.info.vocab_size,)).copy()

    def rewind(self, position: int) -> None:
        """Forgets all tokens after `position` (0: everything)."""
        self._check(self._library.edgelora_session_rewind(self._pointer, _count(position)))

    def decode(
        self,
        n: int,
        *,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
    ) -> list[int]:
        """Up to n new tokens, greedily unless `sampling` says otherwise; fewer at an end token."""
        chosen = sampling or Sampling(ignore_eos=ignore_eos)
        return self.generate(n, chosen)[0]

    def generate(
        self,
        max_new_tokens: int,
        sampling: Sampling = _GREEDY,
        *,
        on_token: Callable[[int], bool] | None = None,
    ) -> tuple[list[int], str]:
        """New tokens, and why they end: "length", "stop", "callback" or "context".

        on_token gets each new token, maybe on another thread; False ends after it. What it
        raises ends the generation and is raised here. It may use other sessions; of this one
        only `position`, `last_logits`, `timings`, `cancel` and `close`.
        """
        count_asked = self._room(_count(max_new_tokens))
        tokens = (ctypes.c_int32 * count_asked)()
        count, finish = ctypes.c_size_t(), ctypes.c_int32()
        callback = _Callback(on_token)
        options = native.options(
            native.Sampling, self._library.edgelora_sampling_init, **vars(sampling)
        )
        self._run(
            self._library.edgelora_session_generate,
            ctypes.byref(options),
            count_asked,
            tokens,
            ctypes.byref(count),
            ctypes.byref(finish),
            callback.pointer,
            None,
        )
        if callback.error is not None:
            raise callback.error
        return list(tokens[: count.value]), native.FINISH_NAMES[finish.value]

    def cancel(self) -> None:
        """Makes a running call of this session raise EdgeLoraError soon. From any thread."""
        self._library.edgelora_session_cancel(self._pointer)

    @property
    def timings(self) -> Timings:
        """Durations of the last prefill and the last generate."""
        struct = native.Timings(size=ctypes.sizeof(native.Timings))
        self._check(self._library.edgelora_session_timings(self._pointer, ctypes.byref(struct)))
        return Timings.of(struct)

    def _room(self, count: int) -> int:
        """`count`, or one more than the positions left: a full context is told from enough."""
        return min(count, self._model.info.context_length - self.position + 1)

    @property
    def _pointer(self) -> ctypes.c_void_p:
        if not self._finalizer.alive:
            raise EdgeLoraError("this session is closed")
        return self._open_pointer

    def _check(self, status: int) -> None:
        native.check(self._library, status)

    def _run(self, function: Any, *arguments: Any) -> None:
        """Calls and checks on the same thread: the message of an error belongs to a thread."""
        pointer = self._pointer
        interruptible(lambda: self._check(function(pointer, *arguments)), self.cancel)


class _Callback:
    """A Python function as a C callback that lets no exception into C."""

    def __init__(self, function: Callable[[int], bool] | None) -> None:
        self._function = function
        self.error: BaseException | None = None
        self.pointer = native.TokenCallback(self._call) if function else native.TokenCallback()

    def _call(self, token: int, _: object) -> bool:
        assert self._function is not None
        try:
            return bool(self._function(token))
        except BaseException as error:
            self.error = error
            return False


def _token_array(tokens: Sequence[int]) -> Any:
    """Ids as C int32; raises EdgeLoraError for one that does not fit."""
    outside = [token for token in tokens if not -(2**31) <= token < 2**31]
    if outside:
        raise EdgeLoraError(f"token {outside[0]}: not in the vocabulary")
    return (ctypes.c_int32 * len(tokens))(*tokens)


def _count(value: int) -> int:
    if value < 0:
        raise EdgeLoraError(f"{value}: a count of tokens cannot be negative")
    return min(value, _COUNT_MAX)
