"""What is said to a person, and where weights, inputs and outputs are found."""

import io
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_bad, run_ok

from dalle_cli import console
from dalle_cli.devices import arithmetic, autocast, peak_flops, peak_memory, select_device, select_dtype
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.hub.transfer import Fetched
from dalle_cli.paths import beside, given_or_piped, skip_list, slug


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_data_to_stdout_and_facts_to_stderr(capsys):
    console.result(Path("a/b.safetensors"), rows=3, psnr=12.34567, skipped=None, codes_used="7")
    assert capsys.readouterr() == ("a/b.safetensors\n", "b.safetensors: rows 3, psnr 12.35, codes used 7\n")
    for nothing in ({}, {"skipped": None}):
        console.result("x", **nothing)
        assert capsys.readouterr() == ("x\n", "")
    console.error("one\ntwo\t three")
    console.warn("so\nso")
    console.note("well")
    assert capsys.readouterr() == ("", "dalle: error: one two three\ndalle: warning: so so\nwell\n")
    console.emit_json({"a": "é"})
    console.emit("plain")
    out = capsys.readouterr().out.splitlines()
    assert (json.loads(out[0]), out[1]) == ({"a": "é"}, "plain")


def test_progress_is_sparse_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dalle_cli.console.time.monotonic", lambda: now[0])
    with console.progress("train", 100, 10, "updates") as advance:
        for step in range(90):
            now[0] += 0.5
            advance(1, loss=1 / (step + 1))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 30/100 updates, 2/s, loss 0.05"
    assert lines[-1].startswith("train: 100/100 updates, 2/s")
    assert len(lines) == 5
    with console.progress("quick", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with console.progress("sample", 4, 1, "codes") as advance:
        advance(2, loss=0.5)
        advance()
    assert "sample" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()
    assert re.search(r"\d codes/s", screen.getvalue())


def test_a_training_is_sparse_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dalle_cli.console.time.monotonic", lambda: now[0])
    due = []
    with console.training("train prior", 60, 20) as display:
        assert not display.live
        for step in range(20, 60):
            now[0] += 0.4
            if display.due():
                due.append(step)
                display.tell(console.Pace(15432.1, "tokens", 300.4, 0.413), loss=1 / step)
            display.advance()
    lines = capsys.readouterr().err.splitlines()
    assert due == [44]
    told = "updates, 2.5/s, 15.4k tokens/s, 41% of the machine's peak, peak memory 300 MiB, loss 0.02273"
    assert lines == [f"train prior: 45/60 {told}", f"train prior: 60/60 {told}"]
    with console.training("quick", 3) as display:
        display.advance()
    assert capsys.readouterr().err == ""


def test_a_training_is_a_panel_on_a_terminal(monkeypatch):
    now = [0.0]
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    with console.training("train prior", 4, 1) as display:
        assert display.live
        assert display.due()
        monkeypatch.setattr("dalle_cli.console.time.monotonic", lambda: now[0])
        display.tell(console.Pace(99.0, "pictures", 2048.0), loss=0.5)
        assert not display.due()  # twice a second is enough
        now[0] += 0.6
        assert display.due()
        display.tell(console.Pace(98.7, "pictures", 2560.0), psnr_held_out=31.25)
        display.advance()
        display.advance()
        console.note("a note above it")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    last = shown[shown.rindex("train prior") :]
    assert "3/4 updates" in last
    assert "ETA" in last
    assert "loss 0.5, psnr held out 31.25" in last
    assert "99 pictures/s, peak memory 2.5 GiB" in last
    assert "a note above it\n" in shown


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0.123, "0.12"), (9.99, "10"), (950.4, "950"), (9999, "9999"), (12345, "12.3k"), (3.2e6, "3.2M")],
)
def test_rates_in_few_characters(rate, shown):
    assert str(console.Pace(rate, "tokens")) == f"{shown} tokens/s"


def test_names_beside_the_input():
    assert beside(Path("a/red.codes.safetensors"), ".images.safetensors") == Path("a/red.images.safetensors")
    assert beside(Path("red.images.safetensors"), ".best.safetensors") == Path("red.best.safetensors")
    assert beside(Path("a/codes"), ".images.safetensors") == Path("a/codes.images.safetensors")
    assert beside(Path("v1.2.safetensors"), ".png") == Path("v1.2.png")
    assert skip_list(Path("a/codes")) == Path("a/codes.skipped.jsonl")
    assert skip_list(Path("a/c.safetensors")) == Path("a/c.skipped.jsonl")
    with pytest.raises(DalleError, match="over itself"):
        beside(Path("red.best.safetensors"), ".best.safetensors")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, on white!", "a-red-circle-on-white"),
        ("빨간 원", "빨간-원"),
        ("../../etc/passwd", "etc-passwd"),
        ("🟥", "prompt"),
        ("", "prompt"),
        ("x" * 99, "x" * 60),
    ],
)
def test_slugs(prompt, expected):
    assert slug(prompt) == expected


def test_input_by_argument_or_pipe(monkeypatch):
    assert given_or_piped(Path("a")) == Path("a")
    monkeypatch.setattr(sys, "stdin", io.StringIO("note\n b c.safetensors \n"))
    assert given_or_piped(None) == Path("b c.safetensors")
    for stdin in (None, Terminal("a\n"), io.StringIO("")):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(DalleError, match="no argument"):
            given_or_piped(None)


def test_devices():
    cpu = torch.device("cpu")
    assert select_device("cpu") == cpu
    assert select_dtype("bfloat16", cpu) is torch.bfloat16
    assert select_dtype("fp16", cpu) is select_dtype("float16", cpu) is torch.float16
    assert select_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(DalleError, match="--dtype auto, bfloat16, float16 or float32, found 'half'"):
        select_dtype("half", cpu)
    for name in ("tpu", "", "cpu:x"):
        with pytest.raises(DalleError, match="--device"):
            select_device(name)
    if not torch.cuda.is_available():
        assert select_device("auto").type in ("cpu", "mps")
        with pytest.raises(DalleError, match="no cuda on this machine"):
            select_device("cuda")
    a = torch.randn(3, 3)
    with autocast(cpu, torch.float32):
        assert (a @ a).dtype is torch.float32
    with autocast(cpu, torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16


def test_what_the_machine_could_do_and_has_held():
    machine = arithmetic("cpu", "float32")
    began = time.monotonic()
    flops = peak_flops(machine)
    assert time.monotonic() - began < 5  # a fifth of a second, on a machine that has nothing else to do
    assert 1e8 < flops < 1e15
    held = torch.ones(64, 2**20)
    peak = peak_memory(machine.device)
    assert 256 < peak < 1e6  # MiB
    del held
    if Path("/proc/self/status").exists():  # the kernel's other record; not what was before the program was loaded
        highest = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
        assert 0.95 * highest < peak < 100 * highest


# Bundles


def test_a_bundle_is_a_folder_a_file_a_shipped_name_or_a_repository(chain, monkeypatch):
    found = bundles.weights(str(chain.model), "weights.clip")
    assert found.path == chain.clip
    assert bundles.weights(str(chain.clip), "weights.clip").digest == found.digest
    assert bundles.tokenizer(found) == chain.tokenizer
    monkeypatch.setattr(bundles, "SHIPPED", chain.root)
    assert bundles.locate("model") == chain.model
    monkeypatch.setattr(bundles, "DEFAULTS", ("nothing", "model"))
    assert bundles.locate(None) == chain.model
    monkeypatch.setattr("dalle_cli.hub.transfer.holds_bundle", lambda name: True)
    monkeypatch.setattr(
        "dalle_cli.hub.transfer.fetch", lambda name, kinds: {"hf://me/it@v2": Fetched(chain.model, (), "")}[name]
    )
    monkeypatch.setattr(bundles, "publication", lambda name: None)
    assert bundles.locate("hf://me/it@v2") == chain.model


def test_the_environment_names_a_model(chain, tmp_path):
    out = tmp_path / "a.safetensors"
    assert run_ok("sample", "x", "-n", 1, "-o", out, env={"DALLE_MODEL": str(chain.model)}) == str(out)


def test_too_little_memory_is_one_line(chain, tmp_path, monkeypatch):
    def greedy(*_):
        return torch.empty(10**17)

    monkeypatch.setattr("dalle_cli.pipelines.codec.Codec.decode", greedy)
    error = run_bad("decode", chain.drawn, "-m", chain.model, "-o", tmp_path / "x.safetensors")
    assert "expected more memory" in error
