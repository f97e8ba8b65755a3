"""What is measured, and the ratios that are made of it. No torch here: every case runs in a process of its own."""

from dataclasses import dataclass, field
from typing import Any, Literal

# Names as PriorConfig has them, for ours and for the peers alike.
SIZES = {
    "n_layer": 8,
    "n_head": 8,
    "n_embd": 512,
    "n_text_vocab": 16384,
    "n_text": 256,
    "n_image_vocab": 8192,
    "grid": 32,
}
QUICK_SIZES = {**SIZES, "n_layer": 4, "n_embd": 128, "n_head": 2, "n_text": 16, "grid": 8}
BATCHES = (2, 8)
DVAE_SIZES = {"image_size": 64, "n_hid": 64, "n_vocab": 2048, "batch": 32}
QUICK_DVAE_SIZES = {**DVAE_SIZES, "n_hid": 16, "batch": 2}
GRIDS = (16, 32, 64)  # of one layer's attention by itself
SIDE = 2048  # of the matrices whose product gives the machine's rate
LEAST_SHARE = {2: 0.33, 8: 0.45}  # of the machine's rate, by batch
ARITHMETICS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One thing to time: `function` of `module`, called with `settings`, gives a `timing.Subject`."""

    name: str
    module: str
    function: str
    unit: str  # of what one update works through
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """A figure of ours over the best of the peers', each case at its best; `limit` None: reported only."""

    name: str
    measure: Literal["rate", "memory", "share"]
    ours: str
    peers: tuple[str, ...]
    limit: float | None

    @property
    def sign(self) -> str:
        """On which side of the limit the ratio has to be."""
        return "<=" if self.measure == "memory" else ">="


def measured(quick: bool = False, dvae_batch: int | None = None) -> list[Case]:
    """All cases, in the order in which each round runs them."""
    sizes = QUICK_SIZES if quick else SIZES
    pictures = {**(QUICK_DVAE_SIZES if quick else DVAE_SIZES)}
    if dvae_batch is not None:
        pictures["batch"] = dvae_batch
    cases = [Case("machine", "bench.machine", "product", "FLOP", {"side": 256 if quick else SIDE})]
    for batch in BATCHES:
        cases += _sparse(f"sparse-{batch}", {"sizes": sizes, "batch": batch})
    for batch in BATCHES:
        cases += _full(f"full-{batch}", {"sizes": sizes, "batch": batch})
    cases += [
        Case("dvae/ours", "bench.dvae", "ours", "pictures", pictures),
        Case("dvae/plain", "bench.peers.dvae", "plain", "pictures", pictures),
    ]
    for grid in (4, 8) if quick else GRIDS:
        settings = {"grid": grid, "n_text": sizes["n_text"], "batch": 1}
        cases += [
            Case(f"attention-{grid}/{kind}", "bench.attention", "layer", "positions", {**settings, "kind": kind})
            for kind in ("full", "row", "column", "conv")
        ]
    return cases + sampling(sizes)


def _sparse(group: str, settings: dict[str, Any]) -> list[Case]:
    peer = "bench.peers.dalle_pytorch"
    ours = Case(f"{group}/ours", "bench.prior", "ours", "tokens", {**settings, "attention": "sparse"})
    peers = [
        Case(f"{group}/dalle-pytorch-{dtype}", peer, "axial", "tokens", {**settings, "dtype": dtype})
        for dtype in ARITHMETICS
    ]
    return [ours, *peers]


def _full(group: str, settings: dict[str, Any]) -> list[Case]:
    decoder, gpt2 = "bench.peers.decoder", "bench.peers.gpt2"
    return [
        Case(f"{group}/ours", "bench.prior", "ours", "tokens", {**settings, "attention": "full"}),
        Case(f"{group}/decoder", decoder, "decoder", "tokens", {**settings, "compiled": False}),
        Case(f"{group}/decoder-compiled", decoder, "decoder", "tokens", {**settings, "compiled": True}),
        *(Case(f"{group}/gpt2-{dtype}", gpt2, "gpt2", "tokens", {**settings, "dtype": dtype}) for dtype in ARITHMETICS),
    ]


def sampling(sizes: dict[str, Any]) -> list[Case]:
    """Cases that draw codes instead of training: none yet. Their ratios go into `ratios` below."""
    return []


def ratios() -> list[Ratio]:
    """What the report compares, and what each is to reach."""
    rows = []
    for batch in BATCHES:
        group = f"sparse-{batch}"
        peers = tuple(f"{group}/dalle-pytorch-{dtype}" for dtype in ARITHMETICS)
        what = f"sparse attention, batch {batch}"
        rows += [
            Ratio(f"{what}: tokens/s over DALLE-pytorch", "rate", f"{group}/ours", peers, 3.0),
            Ratio(
                f"{what}: share of the machine's bfloat16 rate",
                "share",
                f"{group}/ours",
                ("machine",),
                LEAST_SHARE[batch],
            ),
            Ratio(f"{what}: peak memory over DALLE-pytorch", "memory", f"{group}/ours", peers, 0.5),
        ]
    for batch in BATCHES:
        group = f"full-{batch}"
        what = f"full attention, batch {batch}"
        plain = (f"{group}/decoder", f"{group}/decoder-compiled")
        gpt2 = tuple(f"{group}/gpt2-{dtype}" for dtype in ARITHMETICS)
        rows += [
            Ratio(f"{what}: tokens/s over a plain decoder", "rate", f"{group}/ours", plain, 1.4),
            Ratio(f"{what}: tokens/s over transformers' GPT-2", "rate", f"{group}/ours", gpt2, 4.0),
            Ratio(f"{what}: share of the machine's bfloat16 rate", "share", f"{group}/ours", ("machine",), None),
        ]
    rows.append(Ratio("dVAE, 64 pixels: pictures/s over a plain module", "rate", "dvae/ours", ("dvae/plain",), 2.0))
    return rows
