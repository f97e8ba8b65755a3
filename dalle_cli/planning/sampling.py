"""What sampling with a bundle takes: memory, operations and time of each model, from the headers of its weights.

N candidates of one prompt, K of them kept, S side in pixels, D embedding width.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle_cli.artifacts import Artifact, open_artifact
from dalle_cli.devices import Arithmetic, arithmetic, peak_flops
from dalle_cli.errors import DalleError
from dalle_cli.hub import bundles
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.options import DecoderOptions
from dalle_cli.pipelines import loading
from dalle_cli.pipelines.decoder import decoder_config, upsampler_config
from dalle_cli.planning.estimate import UpdateCounter, fresh_caches
from dalle_cli.sampling.defaults import sampling_defaults

STEPS = 64  # of a diffusion prior whose weights do not say
UTILIZATION = 0.75  # share of a matrix product's rate that U-Nets reach in sampling: 0.69 and 0.81 measured on a CPU
READING = 10e9  # bytes of weights a second that a processor reads in a step of few rows, assumed
Call = Callable[[Any], object]


@dataclass(frozen=True)
class SamplingPlan:
    """One model in sampling: its calls, bytes of weights and of the largest call, operations of all calls, seconds."""

    name: str
    calls: int
    weights: int
    activations: int
    flops: int
    seconds: float


def plan_sampling(model: str | None, n: int, keep: int, device: str, rate: float | None = None) -> list[SamplingPlan]:
    """Plan `generate` for one prompt with the bundle `model`; `rate` is operations a second, by default measured.

    Raises:
        DalleError: no such bundle, or it holds no weights to sample with.
    """
    machine = arithmetic(device, "auto")
    path = bundles.locate(model)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = [artifact for artifact in map(open_artifact, files) if artifact.kind in loading.NETWORKS]
    if not found:
        raise DalleError(f"expected a recipe's TOML or a bundle of weights, found neither: {model}")
    speed = rate or UTILIZATION * peak_flops(machine)
    order = list(loading.NETWORKS)
    return [_plan(weights, n, keep, machine, speed) for weights in sorted(found, key=lambda a: order.index(a.kind))]


def _plan(weights: Artifact, n: int, keep: int, machine: Arithmetic, speed: float) -> SamplingPlan:
    model = loading.on_meta(loading.network(weights), weights).eval()
    held = loading.matrices(model, weights) if machine.dtype == torch.bfloat16 else set()
    with warnings.catch_warnings(), fresh_caches(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        _materialize(model, held)
        calls = list(_calls(weights, model, n, keep))
        counter = UpdateCounter([*model.parameters(), *model.buffers()])
        total, flops = 0, 0
        for times, call in calls:
            before = counter.flops
            with counter, torch.autocast("cpu", machine.dtype, enabled=machine.dtype != torch.float32):
                call(model)
            total, flops = total + times, flops + times * (counter.flops - before)
    n_bytes = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    seconds = max(flops / speed, total * n_bytes / READING)
    return SamplingPlan(weights.path.stem, total, n_bytes, counter.most["all"], flops, seconds)


def _materialize(model: nn.Module, held: set[str]) -> None:
    """Tensors without memory, of the dtypes that loading gives them."""
    names = {id(p): name for name, p in model.named_parameters()}

    def fake(t: torch.Tensor) -> torch.Tensor:
        floats = torch.bfloat16 if names.get(id(t)) in held else torch.float32
        return torch.empty(t.shape, dtype=floats if t.is_floating_point() else t.dtype)

    model._apply(fake)  # type: ignore[no-untyped-call]
    model.requires_grad_(False)


def _calls(weights: Artifact, model: Any, n: int, keep: int) -> Iterator[tuple[int, Call]]:
    """How many times a model is called, and a call on random inputs of the right shapes."""
    c, defaults = model.config, sampling_defaults(weights)
    guided = 2 if defaults.get("guidance", 1.0) != 1 else 1
    if weights.kind == "weights.clip":
        yield 1, lambda m: m.encode_text(torch.zeros(1, c.n_text).long(), torch.ones(1).long())
        if c.vision_layers:
            yield 1, lambda m: m.encode_image(torch.zeros(n, 3, c.image_size, c.image_size))
    elif weights.kind == "weights.dvae":
        yield 1, lambda m: m.decode(torch.zeros(n, c.grid, c.grid).long())
    elif weights.kind == "weights.autoencoder":
        yield 1, lambda m: m.decode(torch.zeros(n, c.latent_channels, c.latent_size, c.latent_size))
    elif weights.kind == "weights.prior.codes":
        yield from _code_calls(c, guided, n)
    elif isinstance(model, DiffusionPrior):
        yield from _embedding_calls(c, guided, n, defaults)
    elif weights.kind == "weights.decoder":
        yield from _decoder_calls(c, n, decoder_config(DecoderOptions(), defaults))
    elif weights.kind == "weights.upsampler":
        config = upsampler_config(DecoderOptions(), defaults)
        x, t = torch.zeros(keep, 3, c.image_size, c.image_size), torch.zeros(keep).long()
        yield config.steps, lambda m: m(x, t, x)


def _code_calls(c: Any, guided: int, n: int) -> Iterator[tuple[int, Call]]:
    tokens, lengths = torch.zeros(guided, c.n_text).long(), torch.ones(guided).long()
    kept: list[Any] = []
    yield 1, lambda m: kept.append(m.cache(m.prefill(tokens, lengths), n))
    yield c.grid**2 - 1, lambda m: m.step(torch.zeros(guided * n).long(), kept[0])


def _embedding_calls(c: Any, guided: int, n: int, defaults: dict[str, Any]) -> Iterator[tuple[int, Call]]:
    states = c.captions == "states"
    shape = (guided, c.n_text, c.text_width) if states else (guided, c.n_text)
    captions = torch.zeros(shape) if states else torch.zeros(shape).long()
    rows, kept = guided * n * defaults.get("best_of", 2), list[Any]()
    yield 1, lambda m: kept.append(m.prefill(captions, torch.ones(guided).long(), torch.zeros(guided, c.n_embedding)))
    x, t = torch.zeros(rows, c.n_embedding), torch.zeros(rows).long()
    yield defaults.get("steps", STEPS) if c.time else 1, lambda m: m.step(x, t, kept[0])


def _decoder_calls(c: Any, n: int, config: Any) -> Iterator[tuple[int, Call]]:
    rows = n * (2 if config.guidance != 1 else 1)
    given, lengths = torch.ones(rows, dtype=torch.bool), torch.ones(rows).long()
    states = c.captions == "states"
    text = torch.zeros(rows, c.n_text, c.text_width) if states else torch.zeros(rows, c.n_text).long()
    more = (torch.zeros(rows, c.n_embedding),) if states else ()
    kept: list[Any] = []
    yield 1, lambda m: kept.append(m.condition(torch.zeros(rows, c.n_embedding), given, text, lengths, *more))
    x, t = torch.zeros(rows, c.channels, c.image_size, c.image_size), torch.zeros(rows).long()
    yield config.steps, lambda m: m(x, t, kept[0])
