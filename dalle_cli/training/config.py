"""Numbers that every training stage shares; each model's own defaults are the paper's."""

import math
from dataclasses import dataclass

from dalle_cli.errors import DalleError
from dalle_cli.training.schedules import LEARNING_RATES

OPTIMIZERS = ("adamw", "muon")
PARALLEL = ("replicate", "shard")
SAVE_DTYPES = ("float32", "bfloat16", "float16", "int8")


def check_drawing(**settings: float) -> None:
    """Raises: DalleError if a prior's weights cannot be drawn with this guidance, or at this temperature."""
    for name, value in settings.items():
        if not (math.isfinite(value) and value >= 0):
            raise DalleError(f"expected {name} of at least 0, found {value}; 1 changes nothing")


@dataclass(frozen=True)
class TrainConfig:
    """How to train: updates, batch, optimiser (AdamW), schedule, EMA, and how often to look and to save."""

    steps: int = 1000
    batch_size: int = 32
    lr: float = 1e-3
    final_lr: float = 0.0
    schedule: str = "cosine"  # or "trapezoid", "constant", "plateau"
    warmup: int = 0
    plateau_figure: str = "loss"  # of training, or of the validation: "image_nats"; "-psnr_held_out" is one that rises
    plateau_patience: int = 5  # validations in a row that are none the better before the rate is cut
    plateau_factor: float = 0.5  # what a cut multiplies the rate by
    plateau_least: float = 1 / 32  # share of lr below which it is not cut: the paper's five halvings
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
    validation: float = 0.05  # share of ids held out
    max_validation: int = 1024
    accumulate: int = 1  # parts that a batch is computed in, one after another, for less memory
    checkpoint_activations: bool = False  # compute each block again in the backward pass, for less memory
    compile: bool = False  # the loss by torch.compile; needs a C++ compiler, on a GPU Triton
    tensorboard: bool = False  # write the log for TensorBoard, too, into the run's folder
    parallel: str = "replicate"  # of several processes: each a whole model, or "shard": each a piece of all weights
    powersgd_rank: int = 0  # of the matrices that gradients travel as, after the warm-up (app. E); 0 = as they are
    timeout: int = 1800  # seconds that a process waits for the others before it gives up
    save_dtype: str = "float32"  # of the weights at the end; checkpoints keep all bits

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "ema_every",
            "log_every",
            "validate_every",
            "checkpoint_every",
            "keep",
            "timeout",
        ):
            if getattr(self, name) < 1:
                raise DalleError(f"expected {name} of at least 1, found {getattr(self, name)}; raise it")
        self._check_plateau()
        self._check_accumulate()
        self._check_parallel()
        if self.optimizer not in OPTIMIZERS:
            raise DalleError(f"expected optimizer among {', '.join(OPTIMIZERS)}, found {self.optimizer!r}")
        if self.save_dtype not in SAVE_DTYPES:
            raise DalleError(f"expected save_dtype among {', '.join(SAVE_DTYPES)}, found {self.save_dtype!r}; pick one")
        if self.schedule not in LEARNING_RATES:
            raise DalleError(f"expected schedule among {', '.join(LEARNING_RATES)}, found {self.schedule!r}")
        for name in ("ema", "validation", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise DalleError(f"expected {name} in [0, 1), found {getattr(self, name)}")
        for name in ("lr", "final_lr", "warmup", "eps", "weight_decay", "clip_norm", "max_validation"):
            if getattr(self, name) < 0:
                raise DalleError(f"expected {name} of at least 0, found {getattr(self, name)}; raise it")

    def _check_plateau(self) -> None:
        if self.plateau_patience < 1:
            raise DalleError(f"expected plateau_patience of at least 1, found {self.plateau_patience}; raise it")
        for name in ("plateau_factor", "plateau_least"):
            if not 0 < getattr(self, name) < 1:
                raise DalleError(f"expected {name} between 0 and 1, found {getattr(self, name)}; correct it")

    def _check_accumulate(self) -> None:
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise DalleError(
                f"expected accumulate to divide batch_size {self.batch_size} into equal parts, "
                f"found {self.accumulate}; change one of them"
            )

    def _check_parallel(self) -> None:
        if self.parallel not in PARALLEL:
            raise DalleError(f"expected parallel among {', '.join(PARALLEL)}, found {self.parallel!r}; pick one")
        if self.powersgd_rank < 0:
            raise DalleError(f"expected powersgd_rank of at least 0, found {self.powersgd_rank}; raise it")
        if self.powersgd_rank and self.parallel == "shard":
            raise DalleError('expected powersgd_rank = 0 with parallel = "shard", found both; use one of them')

    @property
    def schedule_steps(self) -> int:
        """Updates that the learning rate takes to come down."""
        return self.steps
