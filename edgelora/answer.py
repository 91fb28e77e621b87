"""An answer in the making: computed on a thread of its own, read as pieces of text."""

import queue
from collections.abc import Iterator, Sequence

from edgelora.generation import Completion, Sampling
from edgelora.interruption import end, start
from edgelora.session import Session
from edgelora.text import TextStream


class Answer:
    """Owns its session. Iterate once; leaving early, or Ctrl-C, ends the computation."""

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        text: TextStream,
        sampling: Sampling,
        max_new_tokens: int,
    ) -> None:
        """Nothing is computed before the iteration begins."""
        self._session = session
        self._prompt = prompt
        self._text = text
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._pieces: list[str] = []
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: no more
        self._abandoned = False
        self.completion: Completion | None = None  # once the iteration has ended

    def __iter__(self) -> Iterator[str]:
        """Pieces as they come; raises EdgeLoraError if the prompt is too long, or a run fails."""
        worker, future = start(self._compute)
        try:
            while (piece := self._queue.get()) is not None:
                yield piece
            self.completion = future.result()
        finally:
            self._abandoned = True
            end(worker, self._session.cancel)
            self._session.close()

    def _compute(self) -> Completion:
        try:
            self._session.prefill(self._prompt)
            tokens, finish = self._session.generate(
                self._max_new_tokens, self._sampling, on_token=self._take
            )
            self._put(self._text.finish())
            return Completion(
                text="".join(self._pieces),
                token_ids=tokens,
                finish="stop" if self._text.stopped else finish,
                timings=self._session.timings,
            )
        finally:
            self._queue.put(None)

    def _take(self, token: int) -> bool:
        self._put(self._text.push(token))
        return not (self._text.stopped or self._abandoned)

    def _put(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._queue.put(piece)
