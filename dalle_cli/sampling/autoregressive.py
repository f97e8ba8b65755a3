"""Sample code grids from the token prior, batch by batch, with cached keys and values.

P captions, T their positions, N candidates, B of them in a batch, W side of the grid. The noise of a code depends on
(seed, candidate's index, position) alone, so a candidate is the same whatever is sampled beside it, in batches of any
size. Matrix products of different sizes round differently, which changes about one code in a million in float32, more
in bfloat16.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dalle_cli import devices
from dalle_cli.errors import DalleError
from dalle_cli.models.bart import CodePrior
from dalle_cli.models.cache import Cache, Prompt
from dalle_cli.models.prior import Prior
from dalle_cli.sampling.batches import evaluating, rows_of_captions
from dalle_cli.sampling.categorical import CategoricalOptions, choose, uniforms
from dalle_cli.sampling.sketches import sample_sketches

DEFAULTS = CategoricalOptions()


def sample_codes(
    prior: CodePrior, tokens: Tensor, lengths: Tensor, indices: Sequence[int], seed: int,
    options: CategoricalOptions = DEFAULTS, **more: Any,
) -> Tensor:  # fmt: skip
    """Sample one grid for each candidate index: (P, T), (P,) int64 -> (N, W, W) int64, on the prior's device.

    Arguments are those of `sample_batches`.

    Raises:
        DalleError: a setting out of range.
    """
    batches = sample_batches(prior, tokens, lengths, indices, seed, options, **more)
    empty = torch.empty(0, prior.config.grid, prior.config.grid, dtype=torch.int64, device=prior.device)
    return torch.cat([empty, *batches])


def sample_batches(
    prior: CodePrior, tokens: Tensor, lengths: Tensor, indices: Sequence[int], seed: int,
    options: CategoricalOptions = DEFAULTS, *, sketch_guidance: float = 1.0, captions: Sequence[int] | None = None,
    known: Tensor | None = None, keep: Tensor | None = None, batch_size: int = 16, compiled: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Sample as `sample_codes` does, and yield each batch (B, W, W) int64 as soon as it is sampled.

    `captions` are rows of `tokens`, one for each index; without it there is one caption, or one for each index. A
    caption is encoded once for all its candidates in consecutive whole batches, the null caption once per call.
    Inpainting: where `keep` (W, W) bool is true, the code of `known`, (W, W) or (N, W, W) int64, is used instead of a
    sampled one, and later positions see it. The noise of the other positions does not change.
    A prior with a sketch samples each candidate's sketch first, with `sketch_guidance`. Its null rows see the sketch,
    too, so that guidance is towards the caption.
    `compiled` runs the step through torch.compile, on a GPU as CUDA graphs; the prior must then not be packed, or be
    packed `plain`. The last batch is padded to the size of the others, which the program is made for.
    `progress` gets the number of codes sampled since its last call.

    Raises:
        DalleError: a setting out of range, or known codes that are not of the prior's grid and vocabulary.
    """
    captions, n_codes = rows_of_captions(captions, len(tokens), len(indices), batch_size), prior.config.grid**2
    device = prior.device
    tokens, lengths = tokens.to(device), lengths.to(device)
    grids, fixed = _known_codes(prior, known, keep, len(indices))
    guided = options.guided_positions(n_codes)
    halves = 2 if guided else 1
    step = devices.compiled(prior.step, device.type == "cuda") if compiled else prior.step
    null = _prefill(prior, tokens[:1], torch.zeros_like(lengths[:1])) if guided else None
    cache, cached = None, ([-1], 0)  # the captions in the cache, and the candidates of each
    for begin in range(0, len(indices), batch_size):
        rows = list(range(begin, min(begin + batch_size, len(indices))))
        n = len(rows)
        rows += rows[-1:] * (min(batch_size, len(indices)) - n) if compiled else []
        own = [captions[row] for row in rows]
        wanted = (own[:1], len(own)) if len(set(own)) == 1 else (own, 1)
        if cache is None or wanted != cached:
            cache = None  # free its memory before the next one is allocated
            cache = _open(prior, _prefill(prior, tokens[wanted[0]], lengths[wanted[0]]), null, wanted[1], compiled)
            cached = wanted
        noise = torch.stack([uniforms(seed, indices[row], n_codes) for row in rows]).to(device)
        codes = grids[rows].to(device)
        if isinstance(prior, Prior) and prior.config.sketch:
            partial = None if keep is None else (codes.view(-1, *keep.shape), keep.to(device))
            captioned = tokens[own], lengths[own], [indices[row] for row in rows]
            sketches = sample_sketches(prior, *captioned, seed, guidance_scale=sketch_guidance, known=partial)
            prior.show(sketches.repeat(halves, 1, 1, 1), cache)

        def choose_codes(logits: Tensor, position: int, noise: Tensor = noise) -> Tensor:
            return choose(options, logits, noise[:, position], position, guided)

        report = None if progress is None else lambda n=n: progress(n)
        codes = _sample_grids(prior, step, cache, halves, choose_codes, codes, fixed, report)
        yield codes[:n].view(-1, prior.config.grid, prior.config.grid).clone()


def _prefill(prior: CodePrior, tokens: Tensor, lengths: Tensor) -> Prompt:
    with torch.inference_mode(), evaluating(prior):
        return prior.prefill(tokens, lengths)


@torch.inference_mode()
def _open(prior: CodePrior, prompt: Prompt, null: Prompt | None, candidates: int, static: bool = False) -> Cache:
    """A cache of conditional rows and, for guidance, as many null rows."""
    if null is not None:
        prompt = Prompt.join([prompt, null.repeat(len(prompt.logits))])
    return prior.cache(prompt, candidates, static)


@torch.inference_mode()
def _sample_grids(
    prior: CodePrior, step: Callable[[Tensor, Cache], Tensor], cache: Cache, halves: int,
    choose_codes: Callable[[Tensor, int], Tensor], codes: Tensor, fixed: Sequence[bool],
    report: Callable[[], None] | None,
) -> Tensor:  # fmt: skip
    """Sample the positions of one batch (B, W*W) that are not fixed, one after the other.

    With two halves the null rows get the codes of the conditional ones.
    """
    with evaluating(prior):
        cache.restart()
        logits, codes = cache.logits, codes.clone()
        last = max((position for position, known in enumerate(fixed) if not known), default=0)  # no logits after it
        for position in range(codes.shape[1]):
            if 0 < position <= last:
                logits = step(codes[:, position - 1].repeat(halves), cache)
            if not fixed[position]:
                codes[:, position] = choose_codes(logits, position)
            if report is not None:
                report()
    return codes


def _known_codes(prior: CodePrior, known: Tensor | None, keep: Tensor | None, n: int) -> tuple[Tensor, list[bool]]:
    """Codes of n grids (n, W*W) int64, and for each of the W*W positions whether its code is kept.

    Raises:
        DalleError: codes that are not of the prior's grid and vocabulary.
    """
    config = prior.config
    grid, side = (config.grid, config.grid), f"{config.grid} x {config.grid}"
    if known is None and keep is None:
        return torch.zeros(n, config.grid**2, dtype=torch.int64), [False] * config.grid**2
    if known is None or keep is None:
        raise DalleError("expected codes and which of them are kept, found one without the other; give both")
    found = f"{tuple(known.shape)}, of which {tuple(keep.shape)} are kept"
    if known.shape not in (grid, (n, *grid)) or keep.shape != grid:
        raise DalleError(f"expected {side} codes to keep some of, found {found}; use codes of the prior's own dVAE")
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < config.n_image_vocab:
        vocab = f"below {config.n_image_vocab}, found {int(known.min())} to {int(known.max())}"
        raise DalleError(f"expected codes {vocab}; use codes of the prior's own dVAE")
    return known.flatten(-2).expand(n, -1), keep.flatten().tolist()
