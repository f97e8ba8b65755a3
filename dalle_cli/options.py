"""Options that several commands share, each spelled and explained once, and groups of options that go together.

A group is a frozen dataclass. A command takes one as a parameter, and `spread` makes an option of each of its fields;
the Python API takes the same objects. A field of None was not given: the weights, then the default, decide.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from dalle_cli.errors import DalleError

if TYPE_CHECKING:
    from dalle_cli.devices import Arithmetic

MAX_SEED = 2**63 - 1  # the largest that every generator takes


def _check_seed(value: int) -> int:
    """Refuse a seed out of range: typer's own `min` and `max` would do so, too, but fill the help with 19 digits."""
    if not 0 <= value <= MAX_SEED:
        raise typer.BadParameter(f"{value} is not between 0 and {MAX_SEED}")
    return value


AUTO = 0  # what a batch size of `auto` is read as


def _parse_batch(value: str) -> int:
    """A batch size, or `auto`."""
    if value == "auto":
        return AUTO
    try:
        size = int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise typer.BadParameter(f"{value} is neither auto nor a number of 1 or more")
    return size


DatasetArg = Annotated[
    str, typer.Argument(metavar="DATASET", help="A folder, a manifest (.jsonl .csv .tsv .parquet) or tars.")
]
LatentsArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="LATENTS",
        help="Codes or embeddings, from `sample` or `encode-images`; read from the pipe if left out.",
    ),
]
ImagesArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="IMAGES", help="From `decode`, `rerank` or `generate --images`; read from the pipe if left out."
    ),
]
ImageArg = Annotated[
    str, typer.Argument(metavar="IMAGE", help="PNG, JPEG, WebP or BMP. The square in its middle is used.")
]
Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to sample; quote each prompt.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one per line.")]

OutFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write.")]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Where to write; named after the input if left out."),
]
SampledOut = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Where to write; named after the prompt, or --prompts, if left out."
    ),
]
RowsOut = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="OUT",
        help="Where to write: a .safetensors file, else a folder of shards; named after the input if left out.",
    ),
]
OutRows = Annotated[
    Path,
    typer.Option("-o", "--output", metavar="OUT", help="Where to write: a .safetensors file, else a folder of shards."),
]
KeepImages = Annotated[
    Path | None, typer.Option("--images", metavar="FILE", help="Also write the images as an artifact here.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a file even if it is something else.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="MODEL",
        help="Fine-tune from existing weights: a file, a checkpoint, or a bundle's. The model's sizes are theirs.",
    ),
]
ShardSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows per shard, when writing a folder of shards.")]

Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        envvar="DALLE_MODEL",
        help="Weights: a file, a bundle (a folder, or the name of a shipped one), or hf://owner/repo[@revision].",
    ),
]
TokenizerFile = Annotated[Path, typer.Option("-t", "--tokenizer", metavar="FILE", help="What `train-tokenizer` wrote.")]
Recipe = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A recipe's TOML with hyper-parameters.")]
Sets = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one hyper-parameter, as prior.n_layer=4.")
]

Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="Arithmetic: auto, bfloat16, float16 or float32.")]
Seed = Annotated[
    int, typer.Option(metavar="N", callback=_check_seed, help="Same inputs, same seed, same machine: same bytes.")
]
OptionalSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        callback=lambda value: value if value is None else _check_seed(value),
        help="Same inputs, same seed, same machine: same bytes; 0 if left out.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows at once; does not change the result.")]
SampleBatch = Annotated[
    int,
    typer.Option(
        parser=_parse_batch,
        metavar="N",
        help="Candidates at once, or auto: as many as fit into half of the free memory; does not change the result.",
    ),
]
Int8 = Annotated[
    bool | None,
    typer.Option("--int8/--no-int8", help="Hold the prior's matrices in 8-bit integers: a quarter of the memory."),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the sampling of a code first (torch.compile): a minute or more, for long runs."
    ),
]
Workers = Annotated[int, typer.Option(min=0, metavar="N", help="Threads that read images ahead.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Samples = Annotated[
    int, typer.Option("-n", "--samples", min=1, metavar="N", help="Candidates per prompt (the paper: 512).")
]
OptionalSamples = Annotated[
    int | None,
    typer.Option("-n", "--samples", min=1, metavar="N", help="Candidates per prompt; 16 if left out (the paper: 512)."),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        help="Below 1 is safer, above 1 wilder; 0 takes the likeliest. Left out: what the weights say, as `info` "
        "shows, else 1.",
    ),
]
TopK = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Sample among the N likeliest codes only; 0 = all, the default.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="X", help="Sample among codes of this total probability; 1 = all, the default."
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        help="Classifier-free guidance; 1 = off. The prior must be trained with captions dropped. Left out: what the "
        "weights say, as `info` shows, else 1.",
    ),
]
SketchGuidance = Annotated[
    float | None,
    typer.Option(
        "--sketch-guidance",
        min=0.0,
        metavar="X",
        help="Of a prior with a sketch: the guidance of the sketch. Left out: what the weights say.",
    ),
]
GuidanceFrom = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, metavar="X", help="Guide from this share of the grid on, in raster order; else 0."),
]
GuidanceTo = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, metavar="X", help="Guide up to this share of the grid; else 1, its end."),
]
SampleFrom = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="CODES",
        help="Sample again what `sample` wrote here, with its own prompts and settings, which other options override.",
    ),
]
SampleRows = Annotated[
    str | None,
    typer.Option(metavar="N,N", help="Of --from, these rows only, counted from 0, as 3,17."),
]
Keep = Annotated[int, typer.Option(min=0, metavar="N", help="Keep the best N per prompt; 0 keeps all, best first.")]
Columns = Annotated[int, typer.Option(min=0, metavar="N", help="Images in a row of the grid; 0 = as fits.")]
Terminal = Annotated[
    bool | None,
    typer.Option("--terminal/--no-terminal", help="Preview in the terminal, or not."),
]
Exclude = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Leave out the ids in this file, as `overlap` writes it."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use at most N of them, spread over all.")]
ImageFile = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Keep a part of this image, the square in its middle, and sample the rest: see --keep-rows and --mask. A "
        "code depends on the caption, the rows of codes above it and the codes left of it. It does not see what is "
        "kept to its right or below, so that may not fit.",
    ),
]
KeepRows = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Of --image, keep this many rows of codes from the top; else half of them."),
]
MaskFile = Annotated[
    str | None,
    typer.Option(
        "--mask",
        metavar="FILE",
        help="Of --image, sample what is white in this image (of any size, its middle square), and keep what is black. "
        "A code is sampled if white touches its patch anywhere.",
    ),
]
ClipFile = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="CLIP",
        help="Also embed the captions with this CLIP, for a prior over its embeddings.",
    ),
]
SamplerName = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help="Of a diffusion prior: ddpm (the default), ddim, dpm++ or heun."),
]
SamplerSteps = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Of a diffusion prior: steps; else 64, the paper's.")
]
LatentsName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="codes, as DALL-E, or embeddings, as DALL-E 2: which prior to sample where MODEL holds both; codes if "
        "left out.",
    ),
]
DecoderSteps = Annotated[
    int | None, typer.Option("--decoder-steps", min=1, metavar="N", help="Of a diffusion decoder: steps; else 20.")
]
DecoderSampler = Annotated[
    str | None,
    typer.Option(
        "--decoder-sampler", metavar="NAME", help="Of a diffusion decoder: ddpm, ddim, dpm++ (the default) or heun."
    ),
]
DecoderGuidance = Annotated[
    float | None,
    typer.Option(
        "--decoder-guidance",
        min=0.0,
        metavar="X",
        help="Of a diffusion decoder: guidance towards embedding and caption; 1 = off, the default.",
    ),
]
DecoderEta = Annotated[
    float | None,
    typer.Option(
        "--eta",
        min=0.0,
        max=1.0,
        metavar="X",
        help="Of --decoder-sampler ddim: noise added at each step; 0 = none, 1 = as much as ddpm.",
    ),
]
UpsamplerSteps = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Steps of each of the bundle's upsamplers; else 10.")
]
LowNoise = Annotated[
    float | None,
    typer.Option(
        "--low-noise",
        min=0.0,
        metavar="X",
        help="Gaussian noise added to the image that an upsampler enlarges, in units of [-1, 1]; else 0.",
    ),
]
EditingSteps = Annotated[
    int | None,
    typer.Option(
        "--decoder-steps", min=1, metavar="N", help="DDIM steps, and as many back to an image's noise; else 50."
    ),
]

# Groups


@dataclass(frozen=True)
class PromptOptions:
    """Prompts as arguments, from a file, or both."""

    prompts: Prompts = None
    prompts_file: PromptFile = None


@dataclass(frozen=True)
class SamplingOptions:
    """How a prior is sampled. Codes take temperature, top-k, top-p; a diffusion prior takes sampler and steps."""

    seed: OptionalSeed = None
    temperature: Temperature = None
    top_k: TopK = None
    top_p: TopP = None
    guidance: Guidance = None
    guidance_from: GuidanceFrom = None
    guidance_to: GuidanceTo = None
    sketch_guidance: SketchGuidance = None
    sampler: SamplerName = None
    steps: SamplerSteps = None
    int8: Int8 = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "guidance", "sketch_guidance"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise DalleError(f"expected a finite {flag(name)}, found {value}; give a number")
        first, last = self.guidance_span
        if first > last:
            found = f"{first} and {last}"
            raise DalleError(f"expected --guidance-from no more than --guidance-to, found {found}; exchange them")

    @property
    def guidance_span(self) -> tuple[float, float]:
        """The share of the latent at which guidance begins, and at which it ends."""
        return self.guidance_from or 0.0, 1.0 if self.guidance_to is None else self.guidance_to


@dataclass(frozen=True)
class DecoderOptions:
    """How a diffusion decoder and its upsamplers are sampled; a dVAE takes none of these."""

    decoder_steps: DecoderSteps = None
    decoder_sampler: DecoderSampler = None
    decoder_guidance: DecoderGuidance = None
    eta: DecoderEta = None
    upsampler_steps: UpsamplerSteps = None
    low_noise: LowNoise = None


@dataclass(frozen=True)
class InpaintingOptions:
    """Which part of an existing image stays while codes are sampled for the rest.

    Raises:
        DalleError: a mask or rows without an image, or both.
    """

    image: ImageFile = None
    keep_rows: KeepRows = None
    mask: MaskFile = None

    def __post_init__(self) -> None:
        given = [flag(name) for name in ("keep_rows", "mask") if getattr(self, name) is not None]
        if given and self.image is None:
            raise DalleError(f"expected --image beside {given[0]}, found none; say of which image codes are kept")
        if len(given) == 2:
            raise DalleError("expected --keep-rows or --mask, found both; leave one out")


@dataclass(frozen=True)
class DeviceOptions:
    """Where to compute, and in which dtype."""

    device: Device = "auto"
    dtype: Dtype = "float32"

    def open(self) -> "Arithmetic":
        """What they come to on this machine.

        Raises:
            DalleError: a device or a dtype that this machine lacks.
        """
        from dalle_cli.devices import arithmetic

        return arithmetic(self.device, self.dtype)


@dataclass(frozen=True)
class GridOptions:
    """How an image grid is laid out, and whether the terminal shows it, too."""

    columns: Columns = 0
    terminal: Terminal = False


def flag(name: str) -> str:
    """What a field is called on the command line: `top_k` is `--top-k`."""
    return f"--{name.replace('_', '-')}"


def given(group: object) -> dict[str, Any]:
    """The fields of a group that are not None."""
    return {f.name: value for f in dataclasses.fields(group) if (value := getattr(group, f.name)) is not None}  # type: ignore[arg-type]


def refuse_given(group: object, model: str, *names: str) -> None:
    """Raises: DalleError if one of these fields of a group was given, which `model` has no use for."""
    for name in names or given(group):
        if getattr(group, name) is not None:
            raise DalleError(f"expected no {flag(name)} for {model}, found one; leave it out")


def spread(run: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are groups of options became one parameter for each field of the group."""
    hints = get_type_hints(run, include_extras=True)
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(run).parameters.values():
        group = hints[parameter.name]
        if not dataclasses.is_dataclass(group):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=group))
            continue
        defaults, of = parameter.default, get_type_hints(group, include_extras=True)
        names = [field.name for field in dataclasses.fields(group)]
        groups[parameter.name] = (group, names)
        parameters += [
            inspect.Parameter(n, parameter.KEYWORD_ONLY, default=getattr(defaults, n), annotation=of[n]) for n in names
        ]

    @functools.wraps(run)
    def command(**values: Any) -> None:
        made = {name: group(**{n: values.pop(n) for n in names}) for name, (group, names) in groups.items()}
        run(**values, **made)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
