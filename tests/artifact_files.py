"""Artifact files: small ones to write and read, what must be refused, a large one, and the columns of one on disk."""

import json
import struct

import numpy as np
import pytest

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.errors import DalleError

ENTRY = {"stage": "test", "options": {"seed": 1}, "inputs": {"x": "ab"}}
CONFIG = {"n_vocab": 9, "grid": 2}


def codes(n, start=0):
    return (np.arange(start * 4, (start + n) * 4).reshape(n, 2, 2) % 9).astype(np.uint16)


def write_codes(path, n=3, start=0, config=CONFIG, entries=(ENTRY,), **more):
    columns = {"codes": codes(n, start), "ids": [f"id {i}" for i in range(start, start + n)], **more}
    return write_artifact(path, "codes", columns, config, entries)


def array(path, name):
    """A column of numbers of an artifact on the disk."""
    return np.asarray(open_artifact(path).array(name))


def strings(path, name):
    """A column of strings of an artifact on the disk."""
    return list(open_artifact(path).strings(name))


def read_all(path, *kinds):
    found = open_artifact(path, *kinds)
    for name in found.columns:
        np.asarray(found.array(name)).sum()
    for stem in found.headers[0].table.strings:
        if stem in found:
            list(found.strings(stem))


def refused(path, *kinds):
    """What is said of a file that cannot be read to its end, in one line."""
    with pytest.raises(DalleError) as caught:
        read_all(path, *kinds)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("expected ")
    return str(caught.value)


def sparse(path, size=1 << 30, kind="weights.prior.codes"):
    """A weights file of one tensor of zeros that takes no room on the disk."""
    meta = {"kind": kind, "version": 1, "config": {}, "history": []}
    head = {
        "__metadata__": {"dalle": json.dumps(meta)},
        "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    raw = json.dumps(head).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)
    return path
