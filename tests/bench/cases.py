"""What is measured, and the ratios that are made of it. No torch here: every case runs in a process of its own."""

from dataclasses import dataclass, field, replace
from itertools import product
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
# DALL-E mini, named as EncoderDecoderConfig has them.
MINI_SIZES = {
    "n_layer": 12, "n_head": 16, "n_embd": 1024, "n_hid": 2730, "n_text_vocab": 50264, "n_text": 64,
    "n_image_vocab": 16384, "grid": 16,
}  # fmt: skip
QUICK_MINI_SIZES = {**MINI_SIZES, "n_layer": 2, "n_embd": 128, "n_head": 2, "n_hid": 200, "n_text_vocab": 300}
# Karlo's decoder, named as DecoderConfig has them.
KARLO_SIZES = {
    "image_size": 64, "width": 320, "multipliers": [1, 2, 3, 4], "depth": 3, "attention": [32, 16, 8],
    "n_embedding": 768, "context_width": 1536, "head_width": 64,
}  # fmt: skip
QUICK_KARLO_SIZES = {**KARLO_SIZES, "width": 32, "context_width": 64, "n_embedding": 16, "head_width": 16}
DVAE_SIZES = {"image_size": 64, "n_hid": 64, "n_vocab": 2048, "batch": 32}
QUICK_DVAE_SIZES = {**DVAE_SIZES, "n_hid": 16, "batch": 2}
GRIDS = (16, 32, 64)  # of one layer's attention by itself
SIDE = 2048  # of the matrices whose product gives the machine's rate
# Of the models over CLIP embeddings, names as their configs have them; captions as CLIP reads them.
EMBEDDING_SIZES = {
    **{"n_layer": 6, "n_head": 8, "n_embd": 512, "n_text_vocab": 16384, "n_text": 77, "n_embedding": 512},
}
QUICK_EMBEDDING_SIZES = {**EMBEDDING_SIZES, "n_layer": 2, "n_head": 2, "n_embd": 64, "n_text": 8, "n_embedding": 64}
UNET_SIZES = {
    **{"image_size": 64, "width": 64, "multipliers": [1, 2, 3, 4], "depth": 2, "attention": [32, 16, 8]},
    **{"head_width": 32, "groups": 32, "context_width": 256, "text_heads": 1, "n_embedding": 512},
}
QUICK_UNET_SIZES = {**UNET_SIZES, "image_size": 16, "multipliers": [1, 2], "attention": [8], "n_embedding": 64}
PEER_WIDTH = 64  # of dalle2-pytorch's U-Net: then it has as many parameters
STEPS = 16  # in which embeddings are drawn: each of the peer's reads all captions again, and takes seconds
PASSES = (3_000, 30_000)  # pictures on each side, whose scores are to take the same memory
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
    measure: Literal["rate", "memory", "share", "bandwidth"]
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
    return cases + sampling(sizes, quick) + scores(quick) + unclip(quick) + published(quick)


def _sparse(group: str, settings: dict[str, Any]) -> list[Case]:
    peer = "bench.peers.dalle_pytorch"
    ours = Case(f"{group}/ours", "bench.prior", "ours", "tokens", {**settings, "attention": "sparse"})
    peers = [
        Case(f"{group}/dalle-pytorch-{dtype}", peer, "axial", "tokens", {**settings, "dtype": dtype})
        for dtype in ARITHMETICS
    ]
    return [ours, replace(ours, name=f"{group}/compiled", settings={**ours.settings, "compiled": True}), *peers]


def _full(group: str, settings: dict[str, Any]) -> list[Case]:
    decoder, gpt2 = "bench.peers.decoder", "bench.peers.gpt2"
    return [
        Case(f"{group}/ours", "bench.prior", "ours", "tokens", {**settings, "attention": "full"}),
        Case(f"{group}/compiled", "bench.prior", "ours", "tokens", {**settings, "attention": "full", "compiled": True}),
        Case(f"{group}/decoder", decoder, "decoder", "tokens", {**settings, "compiled": False}),
        Case(f"{group}/decoder-compiled", decoder, "decoder", "tokens", {**settings, "compiled": True}),
        *(Case(f"{group}/gpt2-{dtype}", gpt2, "gpt2", "tokens", {**settings, "dtype": dtype}) for dtype in ARITHMETICS),
    ]


def sampling(sizes: dict[str, Any], quick: bool) -> list[Case]:
    """Cases that draw codes, and that turn pictures into codes and back."""
    made = [Case("copy", "bench.machine", "copy", "B", {"mebibytes": 16 if quick else 512})]
    for batch in (1, 16):
        given: dict[str, Any] = {"sizes": sizes, "batch": batch, "one_caption": True}
        made += [_draw(f"draw-{batch}/ours", given), _draw(f"draw-{batch}/ours-float32", given, dtype="float32")]
        made += [_draw(f"draw-{batch}/guided", given, guidance=3.0), _draw(f"draw-{batch}/int8", given, int8=True)]
        made += [_draw(f"draw-{batch}/modern", given, block="modern")]
        made += _peers(f"draw-{batch}", given)
        made += [_draw("draw-16/captions", given, one_caption=False)] if batch == 16 else []
        made += [_draw(f"draw-full-{batch}/ours", given, attention="full")]
        made += [
            Case(
                f"draw-full-{batch}/gpt2-{cache}",
                "bench.peers.gpt2",
                "drawn",
                "codes",
                {"sizes": sizes, "batch": batch, "dtype": "bfloat16", "cache": cache},
            )
            for cache in ("dynamic", "static")
        ]
    many = {"sizes": sizes, "batch": 4 if quick else 64, "one_caption": True}
    made += [_draw("draw-64/ours", many), *_peers("draw-64", many)]
    made += [_draw("draw-1/compiled", {"sizes": sizes, "batch": 1}, compiled=True)]
    for grid in (4, 8) if quick else GRIDS:
        each = {"sizes": {**sizes, "grid": grid}, "batch": 2}
        made += [_draw(f"draw-grid-{grid}/{kind}", each, attention=kind) for kind in ("sparse", "full")]
    small = {"batch": 1, "side": 64, "n_hid": 64} if quick else {}
    for work, dtype in product(("encode", "decode"), ARITHMETICS):
        codec: dict[str, Any] = {"work": work, "dtype": dtype, **small}
        made += [
            Case(f"{work}/ours-{dtype}", "bench.codec", "ours", "pictures", codec),
            Case(f"{work}/dall-e-{dtype}", "bench.peers.dall_e", "published", "pictures", codec),
        ]
    return made


def scores(quick: bool) -> list[Case]:
    """Cases that score pictures: their features, the arithmetic on those, and a pass over few and over many."""
    peer, width = "bench.peers.torchmetrics", 64 if quick else 2048
    looked = {"pictures": 4 if quick else 64, "batch": 2 if quick else 32, "size": 64, "width": width}
    given = {"rows": 200 if quick else 5_000, "width": width}
    made = [
        Case("scores/ours", "bench.scores", "ours", "pictures", looked),
        Case("scores/torchmetrics", peer, "pictures", "pictures", looked),
        Case("statistics/ours", "bench.scores", "statistics", "pictures", given),
        *(
            Case(f"statistics/torchmetrics-{block}", peer, "statistics", "pictures", {**given, "block": block})
            for block in (64, 1024)
        ),
    ]
    for name, pictures in zip(PASSES, (100, 200) if quick else PASSES, strict=True):
        made.append(Case(f"scores-memory/{name}", "bench.scores", "memory", "pictures", {"pictures": pictures}))
    return made


def unclip(quick: bool) -> list[Case]:
    """Cases over CLIP embeddings: updates of the diffusion prior and of the decoder, and drawing embeddings."""
    peer = "bench.peers.dalle2_pytorch"
    pairs = {"sizes": QUICK_EMBEDDING_SIZES if quick else EMBEDDING_SIZES, "batch": 4 if quick else 32}
    drawn = {**pairs, "batch": 4 if quick else 64, "steps": 4 if quick else STEPS}
    painted = {"sizes": QUICK_UNET_SIZES if quick else UNET_SIZES, "batch": 2 if quick else 8}
    made = [
        Case("diffusion-prior/ours", "bench.unclip", "prior", "pairs", pairs),
        Case("unet/ours", "bench.unclip", "unet", "pictures", painted),
        Case("embeddings/ours", "bench.unclip", "embeddings", "embeddings", drawn),
        Case("embeddings/ours-float32", "bench.unclip", "embeddings", "embeddings", {**drawn, "dtype": "float32"}),
        Case("embeddings/one-caption", "bench.unclip", "embeddings", "embeddings", {**drawn, "one_caption": True}),
    ]
    for dtype in ARITHMETICS:
        end = f"dalle2-pytorch-{dtype}"
        wide = {**painted, "width": PEER_WIDTH, "dtype": dtype}
        made += [
            Case(f"diffusion-prior/{end}", peer, "prior", "pairs", {**pairs, "dtype": dtype}),
            Case(f"unet/{end}", peer, "unet", "pictures", wide),
            Case(f"embeddings/{end}", peer, "embeddings", "embeddings", {**drawn, "dtype": dtype}),
        ]
    return made


def published(quick: bool) -> list[Case]:
    """Cases of models at their published sizes, with random weights, beside the publishers' own code."""
    peer, sizes = "bench.peers.min_dalle", QUICK_MINI_SIZES if quick else MINI_SIZES
    shown: dict[str, Any] = {"batch": 1, "sizes": {"width": 32, "multipliers": (1, 1, 1, 1, 1)} if quick else {}}
    drawn, karlo = {"sizes": sizes, "batch": 1}, {"sizes": QUICK_KARLO_SIZES if quick else KARLO_SIZES}
    return [
        Case("karlo/ours", "bench.karlo", "unet", "rows", karlo),
        Case("karlo/diffusers", "bench.karlo", "diffusers_unet", "rows", karlo),
        Case("karlo/diffusers-float32", "bench.karlo", "diffusers_unet", "rows", {**karlo, "dtype": "float32"}),
        Case("mini/ours", "bench.published", "codes", "codes", drawn),
        Case("mini/ours-float32", "bench.published", "codes", "codes", {**drawn, "dtype": "float32"}),
        Case("mini/min-dalle", peer, "codes", "codes", drawn),
        *(
            Case(f"mini-pixels/ours-{dtype}", "bench.published", "pixels", "pictures", {**shown, "dtype": dtype})
            for dtype in ARITHMETICS
        ),
        Case("mini-pixels/min-dalle", peer, "pixels", "pictures", {"batch": 1}),
    ]


def _draw(name: str, given: dict[str, Any], **settings: Any) -> Case:
    """`one_caption`: candidates of one caption, which each peer reads again for every candidate."""
    return Case(name, "bench.sampling", "ours", "codes", {"attention": "sparse", **given, **settings})


def _peers(group: str, given: dict[str, Any]) -> list[Case]:
    return [
        Case(f"{group}/dalle-pytorch-{dtype}", "bench.peers.dalle_pytorch", "drawn", "codes", {**given, "dtype": dtype})
        for dtype in ARITHMETICS
    ]


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
    return rows + drawing_ratios() + score_ratios() + unclip_ratios() + published_ratios()


def drawing_ratios() -> list[Ratio]:
    """The same for drawing codes and for the dVAE at work."""
    rows = []
    for batch, over_peer, over_gpt2, guided in ((1, 3.0, 2.0, 0.45), (16, 6.0, 2.5, 0.5)):
        group, what = f"draw-{batch}", f"drawing, batch {batch}"
        peers = tuple(f"{group}/dalle-pytorch-{dtype}" for dtype in ARITHMETICS)
        gpt2 = tuple(f"draw-full-{batch}/gpt2-{cache}" for cache in ("dynamic", "static"))
        rows += [
            Ratio(f"{what}: codes/s over DALLE-pytorch", "rate", f"{group}/ours", peers, over_peer),
            Ratio(f"{what}, full attention: codes/s over GPT-2", "rate", f"draw-full-{batch}/ours", gpt2, over_gpt2),
            Ratio(f"{what}: guided over unguided", "rate", f"{group}/guided", (f"{group}/ours",), guided),
        ]
    peers = tuple(f"draw-16/dalle-pytorch-{dtype}" for dtype in ARITHMETICS)
    rows += [Ratio("drawing, 16 captions: codes/s over DALLE-pytorch", "rate", "draw-16/captions", peers, None)]
    peers = tuple(f"draw-64/dalle-pytorch-{dtype}" for dtype in ARITHMETICS)
    rows += [
        Ratio("drawing, batch 1: matrices read over the copy's rate", "bandwidth", "draw-1/ours", ("copy",), 0.5),
        Ratio("drawing, 64 of one caption: codes/s over DALLE-pytorch", "rate", "draw-64/ours", peers, 6.0),
        Ratio("drawing, 64 of one caption: memory over DALLE-pytorch", "memory", "draw-64/ours", peers, 0.25),
    ]
    for work, limits in (("encode", (1.2, 4.0)), ("decode", (1.3, 4.0))):
        for dtype, limit in zip(ARITHMETICS, limits, strict=True):
            name = f"{work} at 256 pixels, {dtype}: pictures/s over DALL-E in float32"
            rows.append(Ratio(name, "rate", f"{work}/ours-{dtype}", (f"{work}/dall-e-float32",), limit))
    return rows


def score_ratios() -> list[Ratio]:
    """The same for scores of pictures."""
    few, many = (f"scores-memory/{pictures}" for pictures in PASSES)
    blocks = tuple(f"statistics/torchmetrics-{block}" for block in (64, 1024))
    what = "Frechet distance"
    return [
        Ratio(
            f"{what}, Inception-v3: pictures/s over torchmetrics", "rate", "scores/ours", ("scores/torchmetrics",), 0.9
        ),
        Ratio(f"{what}, 2,048 features given: pictures/s over torchmetrics", "rate", "statistics/ours", blocks, 1.0),
        Ratio(f"all scores: memory for {PASSES[1]:,} pictures a side over {PASSES[0]:,}", "memory", many, (few,), 1.1),
    ]


def unclip_ratios() -> list[Ratio]:
    """The same for the models over CLIP embeddings."""

    def against(group: str, what: str, ours: str = "ours") -> Ratio:
        peers = tuple(f"{group}/dalle2-pytorch-{dtype}" for dtype in ARITHMETICS)
        return Ratio(f"{what} over dalle2-pytorch", "rate", f"{group}/{ours}", peers, 3.0 if ours == "ours" else None)

    share = "diffusion prior, batch 32: share of the machine's bfloat16 rate"
    return [
        against("diffusion-prior", "diffusion prior, batch 32: pairs/s"),
        Ratio(share, "share", "diffusion-prior/ours", ("machine",), None),
        against("unet", "decoder at 64 pixels, batch 8: pictures/s"),
        against("embeddings", "drawing 64 embeddings, 64 captions: embeddings/s"),
        against("embeddings", "drawing 64 embeddings of one caption: embeddings/s", "one-caption"),
    ]


def published_ratios() -> list[Ratio]:
    """The same for published models."""
    pixels = tuple(f"mini-pixels/ours-{dtype}" for dtype in ARITHMETICS)
    what, peers = "DALL-E mini at full size, guided", ("karlo/diffusers", "karlo/diffusers-float32")
    return [
        Ratio("Karlo's U-Net, a guided call: rows/s over diffusers", "rate", "karlo/ours", peers, 1.2),
        Ratio("Karlo's U-Net, a guided call: memory over diffusers", "memory", "karlo/ours", peers, 1.0),
        Ratio(f"{what}: codes/s over min-dalle", "rate", "mini/ours", ("mini/min-dalle",), 2.0),
        Ratio(f"{what}, float32: codes/s over min-dalle", "rate", "mini/ours-float32", ("mini/min-dalle",), None),
        Ratio(f"{what}: matrices read over the copy's rate", "bandwidth", "mini/ours", ("copy",), None),
        Ratio(f"{what}: memory over min-dalle", "memory", "mini/ours", ("mini/min-dalle",), 1.0),
        Ratio("DALL-E mini's VQGAN: pictures/s over min-dalle", "rate", pixels[1], ("mini-pixels/min-dalle",), None),
        Ratio("DALL-E mini's VQGAN, float32", "rate", pixels[0], ("mini-pixels/min-dalle",), None),
    ]
