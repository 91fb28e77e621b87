"""`load` and `Model`: a bundle, ready to answer."""

import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from edgelora import native
from edgelora.answer import Answer
from edgelora.errors import EdgeLoraError
from edgelora.generation import Completion, Sampling, SamplingSettings, Timings
from edgelora.manifest import bound_adapter_file
from edgelora.session import Adapter, Session
from edgelora.text import Message, Text

__all__ = ["Adapter", "Completion", "Model", "ModelInfo", "Sampling", "Session", "Timings", "load"]

Prompt = str | Sequence[Message]  # a text to continue, or a conversation to answer


class Settings(SamplingSettings, total=False):
    """Of one answer; the rest is `Sampling`."""

    adapter: Adapter  # default None, the base
    max_new_tokens: int  # default 256
    stop: Sequence[str]  # strings before which the text ends


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded bundle is."""

    vocab_size: int
    context_length: int  # most positions of a session
    num_hidden_layers: int
    threads: int
    weight_bytes: int  # of the external weight file
    kv_cache_bytes: int  # for one position
    eos_token_ids: tuple[int, ...]
    isa: str  # kernels in use

    @classmethod
    def of(cls, struct: native.ModelInfo) -> "ModelInfo":
        """From the C struct."""
        return cls(
            vocab_size=struct.vocab_size,
            context_length=struct.context_length,
            num_hidden_layers=struct.num_hidden_layers,
            threads=struct.threads,
            weight_bytes=struct.weight_bytes,
            kv_cache_bytes=struct.kv_cache_bytes,
            eos_token_ids=tuple(struct.eos_token_ids[: struct.eos_token_count]),
            isa=struct.isa.decode(),
        )


@dataclass(frozen=True)
class SelfcheckResult:
    """Of the base (adapter None) or of an adapter, within its tolerance; not checked: an adapter
    of which nothing is known (added by an older edgelora).
    """

    adapter: str | None
    accuracy: Literal["int8", "float"]
    checked: bool
    logits: int  # that were compared
    error: float  # root mean square of their differences from the expected ones
    tolerance: float

    @classmethod
    def of(cls, struct: native.Selfcheck) -> "SelfcheckResult":
        """From the C struct."""
        adapter = None if struct.adapter is None else struct.adapter.decode()
        accuracy: Literal["int8", "float"] = "float" if struct.exact else "int8"
        figures = (struct.logits, struct.error, struct.tolerance)
        return cls(adapter, accuracy, struct.checked, *figures)


def load(
    bundle: str | Path,
    *,
    threads: int = 0,
    spinning: bool = True,
    accuracy: Literal["int8", "float"] = "int8",
    context_length: int | None = None,
) -> "Model":
    """Loads a bundle folder; its weights are mapped, not read.

    threads: 0 for one on each performance core. spinning: workers wait busily, which is faster but
    takes the cores. accuracy: int8 activations, or float32 ones (slow, for checks). context_length:
    positions of this model's sessions, None for as many as the bundle allows.

    Raises EdgeLoraError, naming the file, for a bundle that is damaged, foreign or too new.
    """
    if accuracy not in ("int8", "float"):
        raise EdgeLoraError(f"accuracy {accuracy!r}: choose int8 or float")
    library = native.open_library(native.library_path())
    options = native.options(
        native.ModelOptions,
        library.edgelora_model_options_init,
        onnxruntime_path=os.fsencode(native.onnxruntime_path()),
        threads=threads,
        spinning=spinning,
        exact=accuracy == "float",
    )
    pointer = native.ModelPointer()
    status = library.edgelora_model_load(
        os.fsencode(bundle), ctypes.byref(options), ctypes.byref(pointer)
    )
    native.check(library, status)
    return Model(library, pointer, Path(bundle), context_length)


class Model:
    """A loaded bundle, made by `load`; a context manager, freed at the latest with the object.

    Different threads may use it at once, each through its own sessions.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        pointer: ctypes.c_void_p,
        bundle: Path,
        context_length: int | None,
    ) -> None:
        """Takes over what `edgelora_model_load` returned."""
        self.library = library
        self._open_pointer = pointer
        self._finalizer = weakref.finalize(self, library.edgelora_model_free, pointer)
        self._bundle = bundle
        self._context_length = context_length
        struct = native.ModelInfo(size=ctypes.sizeof(native.ModelInfo))
        native.check(library, library.edgelora_model_info(pointer, ctypes.byref(struct)))
        self.info = ModelInfo.of(struct)
        self._bundled = [name.decode() for name in struct.adapter_names[: struct.adapter_count]]
        self._handles: dict[str, int] = {}  # of the adapters in memory
        self._finalizers: dict[str, weakref.finalize[..., Any]] = {}  # that unload them

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unloads the adapters and lets go of the weights once no session uses them."""
        for unload in self._finalizers.values():
            unload()
        self._finalizer()

    @property
    def pointer(self) -> ctypes.c_void_p:
        """The C object. Raises EdgeLoraError after `close`."""
        if not self._finalizer.alive:
            raise EdgeLoraError(f"{self._bundle}: this model is closed")
        return self._open_pointer

    @cached_property
    def text(self) -> Text:
        """Tokenizer and chat template. Raises EdgeLoraError if the bundle's are damaged."""
        return Text(self._bundle)

    # ---- adapters ----

    @property
    def adapters(self) -> list[str]:
        """Names that may be used: the bundle's and those loaded beside it."""
        return self._bundled + [name for name in self._handles if name not in self._bundled]

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Makes an adapter outside the bundle usable: adapter.safetensors, or the folder it is in.

        Raises EdgeLoraError if the name is taken, or the file is damaged or made for another base.
        """
        if name in self.adapters:
            raise EdgeLoraError(f"adapter {name!r}: the name is taken: unload it or choose another")
        file = bound_adapter_file(Path(path))
        if not file.is_file():
            raise EdgeLoraError(
                f"{file}: no such file: to use a PEFT folder, run edgelora add-adapter"
            )
        self._load(name, self.library.edgelora_adapter_load_file, file)

    def unload_adapter(self, name: str) -> None:
        """Frees an adapter's memory; sessions that use it fail at their next step.

        One of the bundle's is loaded again when it is next named. Raises EdgeLoraError for an
        unknown name.
        """
        self._require_known(name)
        if name in self._handles:
            del self._handles[name]
            self._finalizers.pop(name)()

    def adapter_handle(self, adapter: Adapter) -> int:
        """The runtime's handle, 0 for the base; that of a sum is new and the caller's to unload.

        Raises EdgeLoraError for an unknown name or an empty sum.
        """
        if adapter is None:
            return 0
        if isinstance(adapter, Mapping):
            return self._compose(adapter)
        if adapter not in self._handles:
            self._require_known(adapter)
            self._load(adapter, self.library.edgelora_adapter_load, adapter)
        return self._handles[adapter]

    def _compose(self, weights: Mapping[str, float]) -> int:
        if not weights:
            raise EdgeLoraError("adapter {}: name at least one, or give None for the base")
        handles = [self.adapter_handle(name) for name in weights]
        handle = ctypes.c_int64()
        status = self.library.edgelora_adapter_compose(
            (ctypes.c_int64 * len(handles))(*handles),
            (ctypes.c_float * len(handles))(*weights.values()),
            len(handles),
            ctypes.byref(handle),
        )
        native.check(self.library, status)
        return handle.value

    def _load(self, name: str, function: Any, source: str | Path) -> None:
        handle = ctypes.c_int64()
        status = function(self.pointer, os.fsencode(source), ctypes.byref(handle))
        native.check(self.library, status)
        unload = self.library.edgelora_adapter_unload
        self._handles[name] = handle.value
        self._finalizers[name] = weakref.finalize(self, unload, handle.value)

    def _require_known(self, name: str) -> None:
        if name not in self.adapters:
            names = ", ".join(self.adapters) or "none"
            raise EdgeLoraError(f"{self._bundle}: no adapter {name!r} (it has: {names})")

    # ---- computing ----

    def session(
        self,
        *,
        adapter: Adapter = None,
        context_length: int | None = None,
        invoked: bool = False,
    ) -> Session:
        """A new sequence. invoked: activated LoRA acts from the first token on, whatever the text.

        Raises EdgeLoraError for an unknown adapter or too long a context.
        """
        length = context_length or self._context_length
        return Session(self, adapter=adapter, context_length=length, invoked=invoked)

    def logits(self, token_ids: Sequence[int], *, adapter: Adapter = None) -> NDArray[np.float32]:
        """Logits after each of the tokens, float32 [len(token_ids), vocab_size]."""
        with self.session(adapter=adapter) as session:
            return session.logits(token_ids)

    def selfcheck(self) -> tuple[SelfcheckResult, ...]:
        """Whether base and adapters compute on this machine what the export foresaw: in float, for
        which the bundle is loaded once more (not in flavor ort), then as this model does.

        Raises EdgeLoraError, naming the adapter and a logit, if one does not, or if the bundle has
        no selfcheck.json.
        """
        results: list[SelfcheckResult] = []
        callback = native.SelfcheckCallback(
            lambda result, _: results.append(SelfcheckResult.of(result.contents))
        )
        status = self.library.edgelora_model_selfcheck(self.pointer, callback, None)
        native.check(self.library, status)
        return tuple(results)

    def chat_or_text(self, prompt: str) -> Prompt:
        """`prompt` as a user's message if the bundle has a chat template, else as it is."""
        return [{"role": "user", "content": prompt}] if self.text.has_chat_template else prompt

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[False] = False, **settings: Unpack[Settings]
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **settings: Unpack[Settings]
    ) -> Iterator[str]: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: bool, **settings: Unpack[Settings]
    ) -> str | Iterator[str]: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **settings: Unpack[Settings]
    ) -> str | Iterator[str]:
        """The text that follows `prompt`, with `stream` in pieces as they come; see `complete`."""
        if stream:
            return iter(self._answer(prompt, **settings))
        return self.complete(prompt, **settings).text

    def complete(self, prompt: Prompt, **settings: Unpack[Settings]) -> Completion:
        """The text that follows `prompt`, with its tokens, why it ended, and how long it took.

        Raises EdgeLoraError for an unknown adapter, a setting out of range, messages without a chat
        template, or a prompt longer than the context.
        """
        answer = self._answer(prompt, **settings)
        for _ in answer:
            pass
        assert answer.completion is not None
        return answer.completion

    def _answer(
        self,
        prompt: Prompt,
        *,
        adapter: Adapter = None,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        **sampling: Unpack[SamplingSettings],
    ) -> Answer:
        tokens = self.text.encode(prompt) if isinstance(prompt, str) else self.text.chat(prompt)
        self._check_length(tokens)
        text = self.text.stream(tokens, stop=stop)
        chosen = Sampling(**sampling)
        return Answer(self.session(adapter=adapter), tokens, text, chosen, max_new_tokens)

    def _check_length(self, prompt: Sequence[int]) -> None:
        held = self._context_length or self.info.context_length
        if not prompt:
            raise EdgeLoraError("the prompt is empty")
        if len(prompt) > held:
            raise EdgeLoraError(
                f"the prompt has {len(prompt)} tokens, the context holds {held}: shorten it, "
                "or export with a longer --context-length"
            )
