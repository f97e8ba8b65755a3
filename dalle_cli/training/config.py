"""Hyper-parameters that every training stage shares; each model's own defaults are the paper's.

A hyper-parameter is one field with a default. A new field's default must be what was done before there was the field:
weights and checkpoints that lack it count as trained with the default.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from dalle_cli.data.augment import by_name
from dalle_cli.errors import DalleError
from dalle_cli.training.schedules import LEARNING_RATES

OPTIMIZERS = ("adamw", "muon")
PARALLEL = ("replicate", "shard")
SAVE_DTYPES = ("float32", "bfloat16", "float16", "int8")

C = TypeVar("C", bound="TrainConfig")


def setting(default: Any, *, affects: str = "updates", deterministic: Any = None) -> Any:
    """A field that needs more said than its default.

    `affects` says what the field changes: "updates"; "end", only what is written at the end, so that a run may resume
    with another value; "sampling", the same of the weights' sampling defaults, which the header holds in a table of
    their own; or "nothing". With the `deterministic` values a batch is its rows and nothing else.
    """
    return field(default=default, metadata={"affects": affects, "deterministic": deterministic})


def affecting(config: type, what: str) -> set[str]:
    """The fields of a config that affect "updates", "end", "sampling" or "nothing"."""
    return {f.name for f in fields(config) if f.metadata.get("affects", "updates") == what}


def with_defaults(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config as older weights record them, with the fields that came later."""
    return {**{f.name: f.default for f in fields(config)}, **values}


def header(config: "TrainConfig", inherited: Mapping[str, Any]) -> dict[str, Any]:
    """What weights record of their training: the tables `train`, and `sampling` if it has entries.

    `inherited` are the sampling defaults of the initial weights, which stay where the config has none of its own.
    """
    train, own = asdict(config), affecting(type(config), "sampling")
    sampling = {**inherited, **{name: train.pop(name) for name in own}}
    return {"train": train} | ({"sampling": sampling} if sampling else {})


def deterministic(config: C, n: int) -> C:
    """The same training on one batch of n rows, without augmentation, dropout of conditions, noise or validation."""
    values: dict[str, Any] = {f.name: f.metadata.get("deterministic") for f in fields(config)}
    values |= {name: n for name in ("batch_size", "sketch_batch", "max_validation") if name in values}
    return replace(config, **{name: value for name, value in values.items() if value is not None})


def check_at_least(config: object, least: float, *names: str) -> None:
    """Raises: DalleError if one of these fields is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise DalleError(f"expected {name} of at least {least}, found {getattr(config, name)}; raise it")


def check_share(config: object, *names: str) -> None:
    """Raises: DalleError if one of these fields is outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise DalleError(f"expected {name} in [0, 1], found {getattr(config, name)}; correct it")


def check_among(config: object, name: str, known: tuple[str, ...]) -> None:
    """Raises: DalleError if a field is none of the known words."""
    if getattr(config, name) not in known:
        raise DalleError(f"expected {name} among {', '.join(known)}, found {getattr(config, name)!r}; choose one")


def check_sampling(config: object, *names: str) -> None:
    """Raises: DalleError if one of these guidance scales or temperatures cannot be sampled with."""
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise DalleError(f"expected {name} of at least 0, found {value}; 1 changes nothing")


@dataclass(frozen=True)
class TrainConfig:
    """How to train: updates, batch, optimizer (AdamW), schedule, EMA, and how often to log, validate and save."""

    steps: int = 1000
    batch_size: int = 32
    lr: float = 1e-3
    final_lr: float = 0.0
    schedule: str = "cosine"  # or "trapezoid", "constant", "plateau"
    warmup: int = 0
    plateau_metric: str = "loss"  # of training, or of validation: "image_nats"; "-psnr_held_out" for one that rises
    plateau_patience: int = 5  # validations in a row without improvement before the rate is cut
    plateau_factor: float = 0.5  # a cut multiplies the rate by this
    plateau_least: float = 1 / 32  # share of lr below which the rate is not cut: the paper's five halvings
    optimizer: str = "adamw"  # or "muon" for the matrices
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # 0 = off
    ema: float = 0.999
    ema_every: int = 1
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500
    keep: int = 2
    validation: float = setting(0.05, deterministic=0.0)  # share of ids held out
    max_validation: int = 1024
    accumulate: int = setting(
        1, deterministic=1
    )  # parts that a batch is computed in, one after another, to save memory
    checkpoint_activations: bool = False  # compute each block again in the backward pass, to save memory
    # of the matrices of a model's blocks in training, of their gradients, moments and average; or "bfloat16", rounded
    # at random: less than half the memory, for fine-tuning large models
    weights_dtype: str = "float32"
    compile: bool = False  # the loss by torch.compile; needs a C++ compiler, on a GPU Triton
    tensorboard: bool = setting(False, affects="nothing")  # also write the log for TensorBoard, into the run's folder
    parallel: str = setting("replicate", affects="nothing")  # each process has whole weights; or "shard": FSDP
    powersgd_rank: int = 0  # PowerSGD compression of gradients after the warm-up (app. E); 0 = none
    timeout: int = setting(1800, affects="nothing")  # seconds that a process waits for the others before it gives up
    save_dtype: str = setting("float32", affects="end")  # of the final weights; checkpoints stay exact

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "batch_size", "ema_every", "log_every", "validate_every", "checkpoint_every")
        check_at_least(self, 1, "keep", "timeout", "plateau_patience")
        check_at_least(self, 0, "lr", "final_lr", "warmup", "eps", "weight_decay", "clip_norm", "max_validation")
        check_at_least(self, 0, "powersgd_rank")
        check_among(self, "optimizer", OPTIMIZERS)
        check_among(self, "save_dtype", SAVE_DTYPES)
        check_among(self, "schedule", LEARNING_RATES)
        check_among(self, "parallel", PARALLEL)
        check_among(self, "weights_dtype", ("float32", "bfloat16"))
        if self.weights_dtype != "float32" and (self.optimizer != "adamw" or self.parallel != "replicate"):
            found = f"found {self.optimizer!r} and {self.parallel!r}"
            raise DalleError(f"expected 'adamw' and 'replicate' beside weights_dtype = 'bfloat16', {found}; change one")
        for name in ("ema", "validation", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise DalleError(f"expected {name} in [0, 1), found {getattr(self, name)}; correct it")
        for name in ("plateau_factor", "plateau_least"):
            if not 0 < getattr(self, name) < 1:
                raise DalleError(f"expected {name} between 0 and 1, found {getattr(self, name)}; correct it")
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise DalleError(
                f"expected accumulate to divide batch_size {self.batch_size} into equal parts, "
                f"found {self.accumulate}; change one of them"
            )
        if self.powersgd_rank and self.parallel == "shard":
            raise DalleError('expected powersgd_rank = 0 with parallel = "shard", found both; use one of them')

    @property
    def schedule_steps(self) -> int:
        """Updates over which the learning rate comes down."""
        return self.steps


@dataclass(frozen=True)
class ImageTrainConfig(TrainConfig):
    """What every training on images shares."""

    augment: str = setting("center", deterministic="center")  # or "dvae", "prior"
    flip: bool = setting(False, deterministic=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_name(self.augment)
