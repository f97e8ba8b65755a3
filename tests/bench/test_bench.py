"""The benchmark's arithmetic: ratios, limits, counted FLOPs, equal time. `make bench` does the measuring."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import cases, cli, equal_time, machine, report, timing
from bench import prior as bench_prior
from bench.cases import Ratio
from dalle_cli.models.attention import Pattern
from dalle_cli.models.dvae import DVAE, DVAEConfig
from dalle_cli.models.prior import Prior, PriorConfig

BENCH = Path(__file__).parent


def run_of(seconds, memory=100, units=60.0, flops=0.0):
    return {"seconds": seconds, "units": units, "flops": flops, "memory": memory, "parameters": 0}


RUNS = {
    "ours": [run_of(2.0, 300, flops=10.0), run_of(3.0, 280, flops=10.0)],
    "slow": [run_of(6.0, 200), run_of(4.0, 250)],
    "fast": [run_of(3.0, 900), run_of(3.3, 800)],
    "machine": [run_of(1.0, units=50.0)],
    "absent": [],
}


def row(measure, peers, limit=None, ours="ours"):
    found = report.rows([Ratio("x", measure, ours, peers, limit)], RUNS)
    return found[0] if found else None


def test_summary_is_of_the_best_round():
    found = report.summarize(RUNS["ours"])
    assert (found.seconds, found.spread, found.rate, found.flops_rate, found.memory) == (2.0, 0.5, 30.0, 5.0, 280)


def test_the_best_peer_counts_for_each_measure():
    rate, memory = row("rate", ("slow", "fast")), row("memory", ("slow", "fast"))
    assert (rate.peer_name, rate.value) == ("fast", 30 / 20)
    assert (memory.peer_name, memory.value) == ("slow", 280 / 200)
    assert rate.spread == 0.5  # ours, whose rounds differ most


def test_share_is_of_the_machines_rate():
    assert row("share", ("machine",)).value == 5 / 50


def test_what_did_not_run_is_left_out():
    assert row("rate", ("absent", "never")) is None
    assert row("rate", ("fast",), ours="absent") is None
    assert row("rate", ("absent", "slow")).peer_name == "slow"


@pytest.mark.parametrize(
    ("measure", "limit", "holds"),
    [("rate", 1.5, True), ("rate", 1.51, False), ("memory", 0.36, True), ("memory", 0.34, False), ("rate", None, None)],
)
def test_limits(measure, limit, holds):
    assert row(measure, ("fast",), limit).holds is holds


def test_table_has_the_limit_beside_the_value():
    lines = report.ratio_table([row("memory", ("slow",), 1.0), row("rate", ("slow",), 2.0)]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1.40 | <= 1 | **no** |" in lines[2]
    assert "| 2.00 | >= 2 | yes |" in lines[3]


def test_report_leaves_out_cases_without_runs():
    every = cases.measured()
    text = report.markdown({"machine": "x"}, every, [], {every[0].name: RUNS["machine"]})
    assert "| machine |" in text
    assert "| dvae/ours |" not in text


def test_flops_of_an_update_by_hand():
    # 2 streams of 3 positions; block of 10 parameters; a head of 4 at two positions and one of 5 at the third
    matrices = 10 * 3 + 4 * 2 + 5
    assert bench_prior.update_flops(2, 7, 10, [(2, 4), (1, 5)], 6) == 2 * (6 * matrices + 3 * 6 * (2 * 7 + 2 * 7))


@pytest.fixture(scope="module")
def tiny():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_text_vocab": 30, "n_text": 3, "n_image_vocab": 20, "grid": 4}
    return {kind: Prior(PriorConfig(**sizes, attention=kind, conv_kernel=3)) for kind in ("full", "sparse")}


def test_flops_of_full_attention(tiny):
    length, width = 3 + 16, 8
    matrices = 2 * 12 * width**2 * length + width * (30 * 3 + 20 * 16)
    attention = 2 * 3 * 4 * width * length * (length + 1) // 2
    assert bench_prior.flops_of(tiny["full"], 5) == 5 * (6 * matrices + attention)


def test_flops_are_fewer_for_sparse_attention(tiny):
    assert bench_prior.flops_of(tiny["sparse"], 5) < bench_prior.flops_of(tiny["full"], 5)


def test_attended_pairs_counted_one_by_one():
    n_text, grid = 3, 4
    prefix, pairs = n_text + 1, 0
    for query in range(n_text + grid**2):
        for key in range(query + 1):
            pairs += key < prefix or query - key <= grid
    assert bench_prior.attended([Pattern("row", n_text, grid)]) == pairs


def test_times_leave_out_the_warm_up_and_last_long_enough():
    calls = []
    assert len(timing.times(lambda: calls.append(0), warmup=2, updates=3, seconds=0.0)) == 3
    assert len(calls) == 5
    assert sum(timing.times(lambda: None, warmup=0, updates=1, seconds=0.01)) >= 0.01


def test_slow_updates_are_timed_less_often():
    assert len(timing.times(lambda: time.sleep(0.02), warmup=0, updates=3, seconds=0.001)) == 1


def test_equal_time_counts_updates_and_not_validation():
    now = [0.0]

    def update(number):
        now[0] += 2.0

    def nats():
        now[0] += 100.0
        return 1.0

    curve = equal_time.follow(update, nats, 10.0, 2, lambda: now[0])
    assert [(p["seconds"], p["updates"]) for p in curve] == [(0.0, 0), (6.0, 3), (10.0, 5)]


def test_mean_nats_weighs_batches_by_their_pictures():
    batches = [(None, None, [1.0, 1.0, 1.0]), (None, None, [5.0])]
    assert equal_time.mean_nats(lambda a, b, codes: codes[0], batches) == 2.0


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_and_ratio_names_what_there_is(quick):
    every = cases.measured(quick)
    names = [case.name for case in every]
    assert len(set(names)) == len(names)
    for case in every:
        tree = ast.parse((BENCH.parent / (case.module.replace(".", "/") + ".py")).read_text())
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        arguments = functions[case.function].args
        known = [a.arg for a in arguments.args]
        assert set(known[: len(known) - len(arguments.defaults)]) <= set(case.settings) <= set(known)
    for ratio in cases.ratios():
        assert {ratio.ours, *ratio.peers} <= set(names)


def test_the_plain_dvae_is_the_published_one():
    plain = pytest.importorskip("bench.peers.dvae").DVAE(8, 16)
    ours = DVAE(DVAEConfig(image_size=16, n_hid=8, n_vocab=16))
    with torch.no_grad():
        for a, b in zip(plain.parameters(), ours.parameters(), strict=True):
            a.copy_(b)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = ours.logits(images)
    torch.testing.assert_close(plain.encoder(0.1 + 0.8 * images), logits)
    codes = torch.nn.functional.one_hot(logits.argmax(1), 16).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(plain.decoder(codes), ours.decoder(codes))


def test_the_plain_decoder_has_our_sizes_and_sees_no_later_id():
    from bench.peers.decoder import Block

    block = Block(8, 2)
    tiny_block = Prior(PriorConfig(n_layer=1, n_head=2, n_embd=8, n_text_vocab=3, n_text=1, n_image_vocab=2, grid=2))
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in tiny_block.blocks.parameters())
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x)[:, :3], block(x[:, :3]))


def test_unknown_case_is_a_usage_error(capsys):
    assert cli.benchmark(cli.parse(["--only", "nothing"])) == 2
    assert "sparse-2/ours" in capsys.readouterr().err


def test_equal_time_needs_its_inputs():
    with pytest.raises(SystemExit):
        cli.parse(["--equal-time", "1"])


def test_busy_cores_are_a_number():
    assert 0 <= machine.busy(0.01) <= 1e4


def test_one_case_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "report.md"
    command = [sys.executable, BENCH, "--quick", "--threads", "1", "--only", "dvae/plain", "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert "dvae/plain ..." in done.stderr
    (run,) = json.loads(out.with_suffix(".json").read_text())["runs"]["dvae/plain"]
    assert run["memory"] > 0
    assert run["seconds"] > 0
    assert "| dvae/plain |" in out.read_text()
