"""Signals that stop a run."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Remembers SIGINT and SIGTERM, so that the loop finishes its update and writes a checkpoint first."""

    def __init__(self) -> None:
        self.received = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context the first signal is remembered, and a second one raises KeyboardInterrupt."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self.received:
                raise KeyboardInterrupt  # the second time means now
            self.received = True

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
