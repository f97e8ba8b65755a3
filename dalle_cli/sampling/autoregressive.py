"""Draw code grids from the token prior: guidance, temperature, truncation, and noise that belongs to the candidate.

N candidates, W side of the grid, V image vocabulary, B candidates of one batch. The noise of a code is a function of
(seed, candidate's index, position) and of nothing else, so a candidate is the same whatever is drawn beside it, in
batches of any size. Matrix products of different sizes round differently, which moves a boundary between two codes past
the noise about once in a million codes in float32, more often in bfloat16.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dalle_cli import devices
from dalle_cli.errors import DalleError
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.prior import Prior
from dalle_cli.sampling.sketches import sample_sketches
from dalle_cli.sampling.truncation import top_k as keep_top_k
from dalle_cli.sampling.truncation import top_p as keep_top_p

_LEVELS = 3  # uniforms for each code
_BRANCH = 32  # children of a node in the tree that `draw` descends


def sample_codes(
    prior: Prior,
    tokens: Tensor,
    lengths: Tensor,
    indices: Sequence[int],
    seed: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    guidance_span: tuple[float, float] = (0.0, 1.0),
    sketch_guidance: float = 1.0,
    captions: Sequence[int] | None = None,
    given: Tensor | None = None,
    kept: Tensor | None = None,
    batch_size: int = 16,
    compiled: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw one grid for every candidate index, of one caption, of one caption each, or of those that `captions` names.

    (P, T), (P,) int64 -> (N, W, W) int64, on the prior's device. Arguments as `sample_batches`.

    Raises: DalleError where a setting is out of its range.
    """
    batches = sample_batches(
        prior,
        tokens,
        lengths,
        indices,
        seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance_scale=guidance_scale,
        guidance_span=guidance_span,
        sketch_guidance=sketch_guidance,
        captions=captions,
        given=given,
        kept=kept,
        batch_size=batch_size,
        compiled=compiled,
        progress=progress,
    )
    empty = torch.empty(0, prior.config.grid, prior.config.grid, dtype=torch.int64, device=prior.start.device)
    return torch.cat([empty, *batches])


def sample_batches(
    prior: Prior,
    tokens: Tensor,
    lengths: Tensor,
    indices: Sequence[int],
    seed: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float = 1.0,
    guidance_span: tuple[float, float] = (0.0, 1.0),
    sketch_guidance: float = 1.0,
    captions: Sequence[int] | None = None,
    given: Tensor | None = None,
    kept: Tensor | None = None,
    batch_size: int = 16,
    compiled: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:
    """Draw as `sample_codes` does, and give each batch (B, W, W) int64 as soon as it is drawn.

    The logits are guided, null + guidance_scale * (conditional - null), divided by `temperature` (0: the likeliest
    code), cut to `top_k` and then to `top_p` (None or 0: not), and drawn from. `guidance_span` is the part of the grid
    that is guided, from and to as shares of its codes in raster order; elsewhere the logits are the conditional ones.
    A prior that sketches draws each candidate's sketch first, with `sketch_guidance`; its null rows see it, too, so
    that guidance is towards the caption.
    `captions` are the rows of `tokens`, one for each index; without it there is one caption, or one for each. A caption
    is read once for all its candidates that follow one another in whole batches, the null caption once a call.
    Where `kept` (W, W) bool is true, the code of `given`, (W, W) or (N, W, W) int64, stands instead of a drawn one, and
    is seen by what is drawn after it. The noise of the others stays theirs.
    `compiled` has torch.compile make one program of a step, on a GPU as CUDA graphs; the prior is then not packed, or
    packed `plain`. The last batch is filled up to the size of the others, for which the program is.
    `progress` is told the number of codes drawn since it was last called.

    Raises: DalleError where a setting is out of its range.
    """
    if captions is None:
        captions = [0] * len(indices) if len(tokens) == 1 else range(len(tokens))
    _check(len(captions), len(indices), temperature, top_k, top_p, guidance_span, batch_size)
    device = prior.start.device
    tokens, lengths = tokens.to(device), lengths.to(device)
    grids, fixed = _kept_codes(prior, given, kept, len(indices))
    span = guided_positions(guidance_span, prior.config.grid**2) if guidance_scale != 1 else range(0)

    def choose(logits: Tensor, uniforms: Tensor, position: int) -> Tensor:
        if span:
            logits = guide(logits, guidance_scale) if position in span else logits.chunk(2)[0]
        if temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits / temperature
        logits = keep_top_k(logits, top_k) if top_k else logits
        return draw(keep_top_p(logits, top_p) if top_p else logits, uniforms)

    step = devices.compiled(prior.step, device.type == "cuda") if compiled else prior.step
    null = _prefill(prior, tokens[:1], torch.zeros_like(lengths[:1])) if span else None
    cache, held = None, ([-1], 0)  # and the captions, and the candidates of each, that the cache is of
    for begin in range(0, len(indices), batch_size):
        rows = list(range(begin, min(begin + batch_size, len(indices))))
        n = len(rows)
        rows += rows[-1:] * (min(batch_size, len(indices)) - n) if compiled else []
        own = [captions[row] for row in rows]
        wanted = (own[:1], len(own)) if len(set(own)) == 1 else (own, 1)
        if cache is None or wanted != held:
            cache = None  # before the next one takes as much memory again
            cache = _open(prior, _prefill(prior, tokens[wanted[0]], lengths[wanted[0]]), null, wanted[1], compiled)
            held = wanted
        noise = torch.stack([uniforms(seed, indices[row], prior.config.grid**2) for row in rows]).to(device)
        own_codes = grids[rows].to(device)
        if prior.config.sketch:
            numbers = [indices[row] for row in rows]
            seen = None if kept is None else (own_codes.view(-1, *kept.shape), kept.to(device))
            captioned = tokens[own], lengths[own], numbers
            sketches = sample_sketches(prior, *captioned, seed, guidance_scale=sketch_guidance, kept=seen)
            prior.show(sketches.repeat(2 if span else 1, 1, 1, 1), cache)
        yield _draw_grids(prior, step, cache, noise, 2 if span else 1, choose, own_codes, fixed, n, progress).clone()


def guided_positions(span: tuple[float, float], n_positions: int) -> range:
    """The positions j with from <= j / n_positions < to, so that spans which meet share no position."""
    begin, end = (math.ceil(round(share * n_positions, 6)) for share in span)  # 0.07 * 100 is a little above 7
    return range(begin, end)


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, null + scale * (conditional - null): (2B, V) -> (B, V), conditional rows first.

    At scale 1 it is the identity, (B, V) -> (B, V): no null rows are computed.
    """
    if scale == 1:
        return logits
    conditional, null = logits.chunk(2)
    return null + scale * (conditional - null)


def uniforms(seed: int, index: int, n_positions: int) -> Tensor:
    """The noise of one candidate, in [0, 1) by steps of 2**-24: (n_positions, 3) float32.

    It is the SHAKE-256 stream of (seed, index): the same on every machine and device, and position j's numbers do not
    depend on how many positions are asked for.
    """
    stream = hashlib.shake_256(f"{seed} {index}".encode()).digest(3 * _LEVELS * n_positions)
    high, middle, low = torch.frombuffer(bytearray(stream), dtype=torch.uint8).view(-1, _LEVELS, 3).long().unbind(-1)
    return (high << 16 | middle << 8 | low).float() / 2**24


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw from the softmax of logits by inversion: (B, V), (B, 3) in [0, 1) -> (B,) int64.

    The vocabulary is a tree of depth 3, descended with a number of its own at each level: to invert one distribution
    over the whole vocabulary would let rounding move one of thousands of boundaries past the number far more often.
    """
    weights = torch.softmax(logits.float(), dim=-1)
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BRANCH**2))
    leaves = weights.view(len(weights), -1, _BRANCH, _BRANCH)
    twigs = leaves.sum(-1)
    rows = torch.arange(len(weights), device=weights.device)
    first = _invert(twigs.sum(-1), noise[:, 0])
    second = _invert(twigs[rows, first], noise[:, 1])
    third = _invert(leaves[rows, first, second], noise[:, 2])
    return (first * _BRANCH + second) * _BRANCH + third


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """The first value whose cumulated share exceeds the noise, so never one of weight 0: (B, M), (B,) -> (B,)."""
    mass = weights.cumsum(dim=-1)
    # divided, the last share is 1 exactly; noise * total could be rounded up to the total
    return (mass / mass[:, -1:] <= noise[:, None]).sum(dim=-1)


@torch.inference_mode()
def _prefill(prior: Prior, tokens: Tensor, lengths: Tensor) -> Prompt:
    training = prior.training
    prior.eval()
    prompt = prior.prefill(tokens, lengths)
    prior.train(training)
    return prompt


@torch.inference_mode()
def _open(prior: Prior, prompt: Prompt, null: Prompt | None, candidates: int, static: bool = False) -> Cache:
    """A cache of conditional rows and, for guidance, as many null rows: each half has keys of its own."""
    if null is not None:
        prompt = Prompt.join([prompt, null.repeat(len(prompt.logits))])
    return prior.cache(prompt, candidates, static)


@torch.inference_mode()
def _draw_grids(
    prior: Prior,
    step: Callable[[Tensor, Cache], Tensor],
    cache: Cache,
    noise: Tensor,
    halves: int,
    choose: Callable[[Tensor, Tensor, int], Tensor],
    codes: Tensor,
    fixed: Sequence[bool],
    n_wanted: int,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """Draw what is not fixed of one batch (B, W*W), code by code, with noise (B, W*W, 3) -> (n_wanted, W, W).

    A null half is fed the codes of the other.
    """
    training = prior.training
    prior.eval()
    cache.restart()
    logits, codes = cache.logits, codes.clone()
    last = max((position for position, keep in enumerate(fixed) if not keep), default=0)  # after which nothing is read
    for position in range(noise.shape[1]):
        if 0 < position <= last:
            logits = step(codes[:, position - 1].repeat(halves), cache)
        if not fixed[position]:
            codes[:, position] = choose(logits, noise[:, position], position)
        if progress is not None:
            progress(n_wanted)
    prior.train(training)
    return codes[:n_wanted].view(-1, prior.config.grid, prior.config.grid)


def _kept_codes(prior: Prior, given: Tensor | None, kept: Tensor | None, n: int) -> tuple[Tensor, list[bool]]:
    """Codes of n grids, of which those that are kept count, and whether a position is: (n, W*W) int64, W*W.

    Raises: DalleError where these are no codes of the prior's grid and vocabulary.
    """
    config = prior.config
    grid, side = (config.grid, config.grid), f"{config.grid} x {config.grid}"
    if given is None and kept is None:
        return torch.zeros(1, 1, dtype=torch.int64).expand(n, config.grid**2), [False] * config.grid**2
    if given is None or kept is None:
        raise DalleError("expected codes and which of them are kept, found one without the other; give both")
    found = f"{tuple(given.shape)}, of which {tuple(kept.shape)} are kept"
    if given.shape not in (grid, (n, *grid)) or kept.shape != grid:
        raise DalleError(f"expected {side} codes to keep some of, found {found}; use codes of the prior's own dVAE")
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < config.n_image_vocab:
        vocab = f"below {config.n_image_vocab}, found {int(given.min())} to {int(given.max())}"
        raise DalleError(f"expected codes {vocab}; use codes of the prior's own dVAE")
    return given.flatten(-2).expand(n, -1), kept.flatten().tolist()


def _check(
    n_captions: int,
    n_indices: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    span: tuple[float, float],
    batch_size: int,
) -> None:
    if n_captions != n_indices:
        raise DalleError(f"expected 1 caption or {n_indices}, found {n_captions}; give one for all or one for each")
    if not temperature >= 0:
        raise DalleError(f"expected a temperature of 0 or more, found {temperature}; 1 draws as the model was trained")
    if top_k is not None and top_k < 0:
        raise DalleError(f"expected top-k of 0 or more, found {top_k}; 0 keeps all codes")
    if top_p is not None and not 0 <= top_p <= 1:
        raise DalleError(f"expected top-p in [0, 1], found {top_p}; 0 and 1 keep all codes")
    if not 0 <= span[0] <= span[1] <= 1:
        found = f"{span[0]} to {span[1]}"
        raise DalleError(f"expected guidance from a share of the grid to a later one, found {found}; 0 to 1 is all")
    if batch_size < 1:
        raise DalleError(f"expected a batch size of 1 or more, found {batch_size}; try 16")
