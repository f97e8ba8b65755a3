"""Memory and arithmetic of one update, by torch's own means: fake tensors, which have shapes but no memory.

The real trainer runs the real task on a synthetic batch. `UpdateCounter` sums operations, by the formulas of torch's
`FlopCounterMode`, and the bytes of the storages that are alive. These two cannot be had from torch itself: with
recomputed blocks the counter's module tracker keeps tensors alive, and `MemTracker` refuses a module that is called
twice outside its parents, as the layers of a loss are.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from dalle_cli.devices import Arithmetic
from dalle_cli.models.clip import CLIP
from dalle_cli.models.decoder import Decoder
from dalle_cli.models.diffusion_prior import DiffusionPrior
from dalle_cli.models.dvae import DVAE
from dalle_cli.models.embedding_prior import AutoregressivePrior
from dalle_cli.models.fast import cpu_attention
from dalle_cli.models.patch_decoder import PatchDecoder
from dalle_cli.models.prior import Prior
from dalle_cli.models.upsampler import Upsampler
from dalle_cli.planning.workload import Workload
from dalle_cli.training.blocks import blocks
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run
from dalle_cli.training.task import Splits

aten = torch.ops.aten
FORMULAS = {  # of operations; torch's table lacks its own attention for CPUs
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
MASKED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
PARTS = (  # of a parameter's name, the first that occurs in it; a dVAE's are the two halves of the network
    ("encoder", ("encoder.",)),
    ("decoder", ("decoder.",)),
    ("text transformer", ("text.",)),
    ("norms", ("norm", "layrnorm")),
    ("attention", ("attn", "attention", "qkv")),
    ("MLP", ("mlp",)),
    ("heads", ("head", "projection", "logit_")),
    ("convolutions", ("conv", "shortcut")),
    ("timestep", ("time", "low_level")),
)


@dataclass(frozen=True)
class Estimate:
    """What one update needs: bytes that stay between updates, bytes that come and go, and operations.

    `copies` are the weights that autocast rounds to 16 bits. `activations` is their own largest sum, and `peak` the
    largest sum of activations, copies and gradients, which are not all alive at one time.
    """

    parameters: dict[str, int]  # by part of the model
    splits: bool  # whether a batch may be computed in parts
    block: int  # parameters of the largest block
    weights: int
    gradients: int
    moments: int
    average: int
    copies: int
    activations: int
    peak: int
    flops: int


class UpdateCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums operations, and bytes alive until the optimizer's step: all, and of gradients and copies of weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {t.untyped_storage()._cdata for t in weights}
        self.kinds = dict.fromkeys(self.weights, "weights")  # of each storage that is alive
        self.live = dict.fromkeys(("copies", "gradients", "activations"), 0)
        self.most = dict.fromkeys(("copies", "activations", "all"), 0)
        self.flops = 0
        self.flops_before_step: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _worst_case(func, args, kwargs)
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        copies = func is aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and self.flops_before_step is None:
                self._add(tensor.untyped_storage(), "copies" if copies else "activations")
        return out

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        if storage._cdata in self.kinds:
            return
        self.kinds[storage._cdata] = kind
        self.live[kind] += storage.nbytes()
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        for name, n in {**self.live, "all": sum(self.live.values())}.items():
            self.most[name] = max(self.most.get(name, 0), n)

    def _remove(self, key: int, n_bytes: int) -> None:
        self.live[self.kinds.pop(key)] -= n_bytes

    def optimizing(self, *_: object) -> None:
        """The step begins, in which an optimizer works matrix by matrix and takes little."""
        if self.flops_before_step is None:
            self.flops_before_step = self.flops

    def keep_gradient(self, parameter: Tensor) -> None:
        """A temporary of the backward pass became a gradient."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if self.kinds[storage._cdata] != "gradients":
            self.live[self.kinds[storage._cdata]] -= storage.nbytes()
            self.live["gradients"] += storage.nbytes()
            self.kinds[storage._cdata] = "gradients"


def _worst_case(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result; where shapes or values depend on values, which fake tensors lack, at its largest."""
    if func is aten._local_scalar_dense.default:
        return 0.5 if args[0].is_floating_point() else args[0].dtype != torch.bool
    if func is aten.bincount.default:
        return args[0].new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0))
    if func is aten.nonzero.default:
        return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
    if func in MASKED:  # a mask that chooses rows: all are chosen
        places: list[Tensor | None] = []
        for index in args[1]:
            masks = index.ndim if index is not None and index.dtype in (torch.bool, torch.uint8) else 0
            places += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(masks)] if masks else [index]
        args = (args[0], places, *args[2:])
    return func(*args, **kwargs)


def estimate(workload: Workload, train: TrainConfig, dtype: torch.dtype, accelerator: bool) -> Estimate:
    """One update by these training settings.

    `accelerator` takes attention as one fused kernel, as CUDA has it, else as this package computes it on a CPU.
    """
    few = min(train.accumulate, 2)  # further parts are like the second
    some = replace(train, batch_size=train.batch_size // train.accumulate * few, accumulate=few, compile=False)
    with _fused_attention() if accelerator else nullcontext(), _fake_trainer(workload, some, dtype) as trainer:
        counter = UpdateCounter([*trainer.model.parameters(), *trainer.model.buffers()])
        for parameter in (p for p in trainer.model.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(counter.keep_gradient)  # type: ignore[no-untyped-call]
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(counter.optimizing)
        batch = workload.batch(some.batch_size)
        with counter:
            trainer.update(batch)
        before = counter.flops_before_step or 0
        return _collected(trainer, counter, before * train.accumulate // few + counter.flops - before)


@contextmanager
def _fake_trainer(workload: Workload, train: TrainConfig, dtype: torch.dtype) -> Iterator[Trainer]:
    """A trainer whose tensors have no memory, and the mode in which it works."""
    with warnings.catch_warnings(), fresh_caches():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        with models_on_meta():
            task = workload.task(train)
        with FakeTensorMode(allow_non_fake_inputs=True):
            task.model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))  # type: ignore[no-untyped-call]
            vars(task.model)["to"] = lambda *_: task.model  # fake tensors are where they should be
            with UpdateCounter([]):  # answers where values are needed
                trainer = Trainer(task, train, Run(Path(), "", {}, []), Arithmetic(torch.device("cpu"), dtype), 0)
            trainer.step = 1  # the first update may do what is done once in a hundred
            yield trainer


def _collected(trainer: Trainer, counter: UpdateCounter, flops: int) -> Estimate:
    model, average = trainer.model, trainer.ema.model
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    return Estimate(
        count_parts(model),
        isinstance(trainer.task, Splits),
        max(sum(p.numel() for p in block.parameters()) for block in blocks(model).values()),
        sum(p.nbytes for p in model.parameters()),
        sum(p.nbytes for p in model.parameters() if p.requires_grad),
        sum(t.nbytes for state in states for key, t in state.items() if isinstance(t, Tensor) and key != "step"),
        sum(t.nbytes for t in (*average.parameters(), *average.buffers())),
        counter.most["copies"],
        counter.most["activations"],
        counter.most["all"],
        flops,
    )


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters by part, embeddings first."""
    counts: dict[str, int] = {"embeddings": 0}
    halves = any(name.startswith("decoder.") for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        rules = PARTS[:2] if halves else PARTS[2:]
        part = next((part for part, signs in rules if any(sign in name for sign in signs)), "embeddings")
        counts[part] = counts.get(part, 0) + parameter.numel()
    return {part: n for part, n in counts.items() if n}


@contextmanager
def models_on_meta() -> Iterator[None]:
    """Build models on the meta device, and all else as usual: a noise schedule must have its values."""

    def on_meta(initialize: Callable[..., None]) -> Callable[..., None]:
        def initialize_on_meta(self: nn.Module, *args: Any) -> None:
            with torch.device("meta"):
                initialize(self, *args)

        return initialize_on_meta

    with ExitStack() as stack:
        for model in (DVAE, CLIP, Prior, DiffusionPrior, AutoregressivePrior, Decoder, PatchDecoder, Upsampler):
            stack.enter_context(mock.patch.object(model, "__init__", on_meta(model.__init__)))
        yield


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Masks that models cache must not pass between fake and real tensors."""
    modules = [module for name, module in sys.modules.items() if name.startswith("dalle_cli.models.")]
    caches = [f for module in modules for f in vars(module).values() if hasattr(f, "cache_clear")]
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """One fused kernel, CUDA's, in place of the three forms of attention for CPUs."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        y: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return y

    with ExitStack() as stack:
        for function in (cpu_attention._Dense, cpu_attention._Causal, cpu_attention._LineAttention):
            stack.enter_context(mock.patch.object(function, "apply", attend))
        yield
