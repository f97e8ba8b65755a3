"""An import holds one tensor at a time, whatever the size of the files: 1.5 times the largest tensor plus 500 MB."""

import json
import subprocess
import sys

import msgpack
import pytest
import torch
from safetensors.torch import save_file

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from torch import nn
from dalle_cli.importing.bundle import write
from dalle_cli.importing.cached import logged
from dalle_cli.importing.publication import From, Part, Publication
from dalle_cli.importing.source import open_source

kind, folder, width, n, dtype = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:5]), sys.argv[5]
dtype = None if dtype == "stored" else dtype

class Net(nn.Module):  # n matrices, each of three of the source's
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(n))

def planned(names):
    made = {}
    for i in range(n):
        if kind == "flax":  # all layers in one array
            made[f"layers.{i}.weight"] = From.one("stack", lambda t, i=i: t[i].T)
        else:
            made[f"layers.{i}.weight"] = From(tuple(f"{i}.{x}" for x in "qkv"), lambda *t: torch.cat(t))
    return made

import dataclasses
@dataclasses.dataclass
class Sizes:
    width: int = 8

source = open_source(str(folder / kind), folder)
part = Part("a.safetensors", "weights.clip", Net, Sizes(), (kind,), planned)
def most():  # of this process alone: getrusage's number begins with that of the process which started it
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

with torch.device("meta"):  # which takes memory once
    torch.cat([Net(None).layers[0].weight.T]).T
before, began = most(), time.monotonic()
write([(source, Publication("Large", [part], {}, "mit"))], folder / "out", dtype, logged)
size = sum(path.stat().st_size for path in (folder / "out").iterdir())
print(json.dumps({"before": before, "most": most(), "seconds": time.monotonic() - began, "size": size}))
"""


def write(path, kind, width, n):
    """A file of n times three matrices, or of all in one array."""
    if kind != "flax":
        tensors = {f"{i}.{x}": torch.randn(width, width) for i in range(n) for x in "qkv"}
        save_file(tensors, str(path)) if kind == "safetensors" else torch.save(tensors, path)
        return
    layer = bytes(12 * width**2)
    head = msgpack.packb(((n, width, 3 * width), "float32", b""), use_bin_type=True)[:-2]
    head += b"\xc6" + (n * len(layer)).to_bytes(4, "big")
    with open(path, "wb") as file:
        file.write(b"\x81\xa5stack\xc9" + (len(head) + n * len(layer)).to_bytes(4, "big") + b"\x01" + head)
        for _ in range(n):
            file.write(layer)


def measured(folder, kind, width, n, dtype):
    """Memory and time of an import in a process of its own."""
    write(folder / kind, kind, width, n)
    arguments = [kind, str(folder), str(width), str(n), dtype]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=True, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["most"] < 1.5 * (12 * width**2) + 500e6, found
    return found


@pytest.mark.parametrize("kind", ["torch", "flax"])
def test_one_tensor_at_a_time(tmp_path, kind):
    """400 MB in ten tensors: what is held beyond the imports of Python is a small part of them."""
    found = measured(tmp_path, kind, 1826, 10, "bfloat16")
    assert found["most"] - found["before"] < 3 * 40e6 + 100e6, found  # what is read, what is made, a block of it cast


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "torch", "flax"])
def test_four_gigabytes(tmp_path, kind):
    found = measured(tmp_path, kind, 2921, 39, "stored")  # 102 MB each
    print(f"{kind}: {found['size'] / found['seconds'] / 1e6:.0f} MB/s, {found['most'] / 1e6:.0f} MB at most")
