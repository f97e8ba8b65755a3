"""From the runs of every case to a table of ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.cases import Case, Ratio

Run = Mapping[str, Any]  # what `timing.work` returns


@dataclass(frozen=True)
class Summary:
    """A case over all rounds: its best second per update, how much longer the slowest round took, its least peak."""

    seconds: float
    spread: float
    rate: float  # units a second
    flops_rate: float
    memory: int


@dataclass(frozen=True)
class Row:
    """A ratio found: ours over the best peer's."""

    ratio: Ratio
    ours: float
    peer: float
    peer_name: str
    value: float
    spread: float

    @property
    def holds(self) -> bool | None:
        """Whether the limit holds; None where there is none."""
        limit = self.ratio.limit
        if limit is None:
            return None
        return self.value <= limit if self.ratio.sign == "<=" else self.value >= limit


def summarize(runs: Sequence[Run]) -> Summary:
    """Rounds of one case, at least one."""
    best = min(run["seconds"] for run in runs)
    return Summary(
        seconds=best,
        spread=max(run["seconds"] for run in runs) / best - 1,
        rate=runs[0]["units"] / best,
        flops_rate=runs[0]["flops"] / best,
        memory=min(run["memory"] for run in runs),
    )


def rows(ratios: Sequence[Ratio], runs: Mapping[str, Sequence[Run]]) -> list[Row]:
    """Every ratio whose cases ran; the best peer is the fastest for a rate, the smallest for memory."""
    found = {name: summarize(each) for name, each in runs.items() if each}
    made = []
    for ratio in ratios:
        peers = {name: found[name] for name in ratio.peers if name in found}
        if ratio.ours not in found or not peers:
            continue
        mine = found[ratio.ours]
        if ratio.measure == "memory":
            name = min(peers, key=lambda n: peers[n].memory)
            ours, peer = float(mine.memory), float(peers[name].memory)
        else:
            name = max(peers, key=lambda n: peers[n].rate)
            ours, peer = (mine.flops_rate if ratio.measure in ("share", "bandwidth") else mine.rate), peers[name].rate
        spread = max(mine.spread, peers[name].spread)
        made.append(Row(ratio, ours, peer, name, ours / peer if peer else float("nan"), spread))
    return made


def ratio_table(made: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| ratio | value | limit | holds | ours | peer | best of the peers | slowest round |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in made:
        ratio = row.ratio
        limit = "none" if ratio.limit is None else f"{ratio.sign} {ratio.limit:g}"
        holds = {None: "", True: "yes", False: "**no**"}[row.holds]
        ours, peer = (_figure(ratio.measure, x) for x in (row.ours, row.peer))
        cells = (ratio.name, f"{row.value:.2f}", limit, holds, ours, peer, row.peer_name, f"+{row.spread:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def case_table(cases: Sequence[Case], runs: Mapping[str, Sequence[Run]]) -> str:
    """Markdown: every case by itself."""
    lines = [
        "| case | s an update | slowest round | a second | peak memory | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        if each := runs.get(case.name):
            found = summarize(each)
            parameters = f"{each[0]['parameters'] / 1e6:.1f}M" if each[0]["parameters"] else ""
            special = {"FLOP": "share", "B": "bandwidth"}.get(case.unit)
            rate = _figure(special, found.rate) if special else f"{found.rate:,.1f} {case.unit}"
            cells = (case.name, f"{found.seconds:.4g}", f"+{found.spread:.0%}", rate, _figure("memory", found.memory))
            lines.append("| " + " | ".join((*cells, parameters)) + " |")
    return "\n".join(lines) + "\n"


def _figure(measure: str, value: float) -> str:
    if measure == "memory":
        return f"{value / 2**20:,.0f} MiB"
    if measure == "rate":
        return f"{value:,.1f}/s"
    return f"{value / 1e9:,.{0 if measure == 'share' else 1}f} {'GFLOP' if measure == 'share' else 'GB'}/s"


def markdown(
    settings: Mapping[str, Any], cases: Sequence[Case], made: Sequence[Row], runs: Mapping[str, Sequence[Run]]
) -> str:
    """The whole report: the machine, the ratios, the cases."""
    lines = [f"- {name}: {value}" for name, value in settings.items()]
    parts = ["# Benchmark\n", "\n".join(lines) + "\n", ratio_table(made), case_table(cases, runs), _NOTES]
    return "\n".join(parts)


_NOTES = """\
Best of the rounds; each round runs every case once, in a process of its own, and takes the median of its updates.
An update is forward, backward, clipping, optimizer. "Slowest round" says how much longer it took than the best one.
Peak memory is what the process held at most, less what it held after its imports; the least of the rounds. Captions
fill all their positions. Share: 6 FLOPs for each matrix parameter and position it is used at, and those of the pairs
that attend to each other, over the rate of a 2048 x 2048 x 2048 bfloat16 product in this same run. DALLE-pytorch's
defaults have blocks a third larger than ours (a gated MLP), and no average of the weights is kept by any peer. Width of
MLP and U-Net of dalle2-pytorch are such that each has as many parameters as ours. Its prior has a table of tokens, as
ours has, in the place of a CLIP's encodings; both decoders are told of embeddings alone.
"""
