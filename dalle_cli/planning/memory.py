"""An update on tensors that have shapes and no memory: how much it would hold, and how much it would compute.

torch's fake tensors run the training loop itself, at any size; a ledger adds up the bytes that are alive and the
multiply-adds of every product. So nothing here knows what a model saves for its backward pass.
"""

import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dalle_cli.devices import Arithmetic
from dalle_cli.models import clip
from dalle_cli.models.attention import Pattern
from dalle_cli.planning.heap import ORDERS, Heap
from dalle_cli.planning.standin import Subject, stand_in
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.loop import Trainer
from dalle_cli.training.run import Run

aten = torch.ops.aten
DRAWN = (aten.exponential_.default, aten.normal_.default, aten.uniform_.default, aten.bernoulli_.float)
BY_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
# What oneDNN compiles for each new shape of a product in 16 bits, and keeps: kernels, and bytes of one, as traces of
# malloc and free showed them in updates of four models (1.9 on average).
KERNELS, KERNEL = 2, 258376


@dataclass(frozen=True)
class Rehearsal:
    """What an update takes beyond weights, moments and average, in bytes, and its operations.

    `activations` are at their own fullest moment, `copies` are the weights in 16 bits that autocast makes in every
    update, and `peak` is the fullest moment of all three and the gradients, which do not all come at once. A CPU also
    keeps `kernels` that it compiled, and its heap reaches by `holes` further than all that is in use at that moment.
    """

    activations: int
    copies: int
    peak: int
    holes: int
    kernels: int
    flops: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what every operation makes and what is given back, and the multiply-adds of products, times two."""

    def __init__(self, weights: list[Tensor]) -> None:
        """`weights` are there before and are not counted; what is made of them in another dtype is told apart."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {t.untyped_storage()._cdata for t in weights}
        self.entries: dict[int, tuple[int, bool]] = dict.fromkeys(self.weights, (0, False))
        self.live = self.copies = self.gradients = self.gradient_flops = self.step_flops = 0
        self.peak = self.activations = self.most_copies = 0
        self.kept: set[int] = set()
        self.closed = False
        self.taken: list[tuple[int, bool]] = []  # bytes of whatever was made, and whether later updates find it there
        self.events: list[tuple[int, bool]] = []  # which of them came, or went
        self.products: set[tuple[Any, ...]] = set()  # in 16 bits, by their shapes
        self.places: dict[int, int] = {}  # the last of `taken` in a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _whole(func, args), kwargs or {}
        if func in PRODUCTS and args[0].dtype.itemsize == 2:
            self._compile(func, args)
        out = _known(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if count := flop_registry.get(func._overloadpacket):
            if self.closed:
                self.step_flops += count(*args, **kwargs, out_val=out)
            else:
                self.gradient_flops += count(*args, **kwargs, out_val=out)
        copy = func is aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), copy)
        return out

    def _compile(self, func: Any, args: Any) -> None:
        product = (func, *((a.shape, a.stride()) for a in args))
        if product not in self.products:
            self.products.add(product)
            for _ in range(KERNELS):
                self._take(KERNEL, True)

    def _take(self, n_bytes: int, stays: bool) -> None:
        self.events.append((len(self.taken), True))
        self.taken.append((n_bytes, stays))

    def _enter(self, storage: torch.UntypedStorage, copy: bool) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self.entries:
            return
        self.entries[key] = n_bytes, copy
        self.places[key] = len(self.taken)
        self._take(n_bytes, self.closed)
        self.live += n_bytes
        self.copies += n_bytes * copy
        weakref.finalize(storage, self._leave, key)
        if not self.closed:
            self.peak = max(self.peak, self.live)
            self.activations = max(self.activations, self.live - self.copies - self.gradients)
            self.most_copies = max(self.most_copies, self.copies)

    def _leave(self, key: int) -> None:
        n_bytes, copy = self.entries.pop(key)
        self.events.append((self.places.pop(key), False))
        self.live -= n_bytes
        self.copies -= n_bytes * copy

    def keep(self, parameter: Tensor) -> None:
        """What was a temporary of the backward pass is a gradient from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        n_bytes, _ = self.entries[storage._cdata]
        if storage._cdata not in self.kept:  # the second part of a batch adds to the first one's
            self.kept.add(storage._cdata)
            self.gradients += n_bytes

    def close(self, *_: object) -> None:
        """Gradients are there: what follows is the optimiser's, which works matrix by matrix and so takes little."""
        self.closed = True

    def reach(self, standing: list[int], order: int) -> int:
        """How far a CPU's heap reaches after two such updates, in bytes; `standing` is what was there before.

        In the first, moments come to lie where activations were; the second has to find other places for those.
        """
        heap = Heap(order)
        for number, n_bytes in enumerate(standing):
            heap.take(("standing", number), n_bytes)
        left = {number for number, _ in self.events} - {number for number, came in self.events if not came}
        stay = {number for number in left if self.taken[number][1]}
        for update in range(2):
            for came, together in groupby(self.events, key=itemgetter(1)):
                for number, _ in together if came else sorted(together):  # autocast's copies go in no certain order
                    if not came:
                        heap.give_back(number)
                    elif update == 0 or number not in stay:
                        heap.take(number, self.taken[number][0])
            for number in sorted(left - stay):  # gradients go before the next update
                heap.give_back(number)
        return heap.most


def _whole(func: Any, args: Any) -> Any:
    """Where a mask chooses rows, all are chosen: shapes may not depend on values, and a plan is for the worst."""
    if func not in BY_INDEX:
        return args
    places: list[Tensor | None] = []
    for index in args[1]:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            places.append(index)
        else:
            places += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.ndim)]
    return (args[0], places, *args[2:])


def _known(func: Any, args: Any, kwargs: Any) -> Any:
    """Results whose shape or value would depend on values, at their largest; None for any other operation."""
    if func in DRAWN:
        return args[0]
    if func is aten.bincount.default:
        return args[0].new_empty(kwargs.get("minlength", args[2] if len(args) > 2 else 0))
    if func is aten.nonzero.default:
        return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
    if func is aten._local_scalar_dense.default:
        return 1.0 if args[0].is_floating_point() else 1
    return None


def rehearse(subject: Subject, train: TrainConfig, dtype: torch.dtype, accelerator: bool = False) -> Rehearsal:
    """What one update takes by the settings of `train`, in the arithmetic of `dtype`.

    `accelerator` takes attention for one fused kernel, as CUDA has it; else it is that of a CPU.
    """
    parts = train.accumulate
    few = min(parts, 2)  # the others are as the second
    some = replace(train, batch_size=train.batch_size // parts * few, accumulate=few, compile=False, ema_every=2)
    with torch.device("meta"):
        model = subject.build()
    machine = Arithmetic(torch.device("cpu"), dtype)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
        stack.enter_context(_fresh_caches())
        stack.enter_context(FakeTensorMode())
        if accelerator:
            stack.enter_context(_fused_attention())
        model._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))  # type: ignore[no-untyped-call]
        vars(model)["to"] = lambda *_: model  # it is there already, and fake tensors will not be moved
        trainer = Trainer(stand_in(subject, model), some, Run(Path(), "", {}, []), machine, 0)
        ledger = Ledger([*model.parameters(), *model.buffers()])
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(ledger.keep)  # type: ignore[no-untyped-call]
        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(ledger.close)
        with ledger:
            trainer.update(subject.batch(some.batch_size))
        kernels = 0 if accelerator else KERNELS * KERNEL * len(ledger.products)
        holes = 0 if accelerator else _holes(trainer, ledger, kernels)
    flops = ledger.gradient_flops * parts // few + ledger.step_flops
    return Rehearsal(ledger.activations, ledger.most_copies, ledger.peak, holes, kernels, flops)


def _holes(trainer: Trainer, ledger: Ledger, kernels: int) -> int:
    """What a CPU's heap has beyond the fullest moment of an update that was rehearsed."""
    models = (trainer.model, trainer.ema.model)
    standing = [t.nbytes for model in models for t in (*model.parameters(), *model.buffers())]
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    moments = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))
    reach = sum(ledger.reach(standing, order) for order in range(ORDERS)) // ORDERS
    return max(reach - sum(standing) - moments - ledger.peak - kernels, 0)


@contextmanager
def _fresh_caches() -> Iterator[None]:
    """Masks that models keep between calls must not pass between tensors with memory and those without."""
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
    """A CUDA kernel's attention in place of a CPU's, for tensors that say that they are on a CPU."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
        y: Tensor = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return y

    places: dict[tuple[Any, str], Any] = {
        (Pattern, "attend"): lambda self, q, k, v: attend(q, k, v),
        (clip, "batched_attention"): attend,
    }
    kept = {(owner, name): getattr(owner, name) for owner, name in places}
    for (owner, name), value in places.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in kept.items():
            setattr(owner, name, value)
