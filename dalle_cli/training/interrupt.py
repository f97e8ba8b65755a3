"""Signals that ask a run to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Remembers SIGINT and SIGTERM so that an update is finished and a checkpoint written before leaving."""

    def __init__(self) -> None:
        self.came = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, the first signal is remembered and a second one raises KeyboardInterrupt."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self.came:
                raise KeyboardInterrupt  # the second time means now
            self.came = True

        kept = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
