"""Training that is broken off after an update, as if the process were gone, or that is made to do something there."""

import contextlib
from unittest import mock

from dalle_cli.training.loop import Trainer


class Crash(Exception):
    """As if the process were gone."""


def crash():
    raise Crash


@contextlib.contextmanager
def after_update(step, act=crash):
    """Call `act` once update number `step` is made, in whatever trains within."""
    original = Trainer.update

    def update(self, batch):
        figures = original(self, batch)
        if self.step == step:
            act()
        return figures

    with mock.patch.object(Trainer, "update", update):
        yield
