"""The options of every training command, and keywords of the functions in `training`."""

from dataclasses import dataclass, field

from dalle_cli.options import Device, Dtype, Exclude, Force, Fresh, Init, Recipe, Seed, Sets


@dataclass(frozen=True)
class TrainingOptions:
    """What every training takes beside its inputs. In Python `config` may also be a dict of a recipe's tables."""

    config: Recipe = None
    sets: Sets = field(default_factory=list)
    init: Init = None
    exclude: Exclude = None
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "auto"
    fresh: Fresh = False
    force: Force = False
