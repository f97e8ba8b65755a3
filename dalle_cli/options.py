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


def _check_seed(value: int | None) -> int | None:
    """Refuse a seed out of range: typer's own `min` and `max` would do so, too, but fill the help with 19 digits."""
    if value is not None and not 0 <= value <= MAX_SEED:
        raise typer.BadParameter(f"{value} is not between 0 and {MAX_SEED}")
    return value


def opt(metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option: the word for its value, its help, its names if they are not the parameter's."""
    return typer.Option(*names, metavar=metavar, help=text, **more)


def sampling_opt(metavar: str, text: str, otherwise: str, **more: Any) -> Any:
    """An option that the header of weights has a default for: the word for its value, its help, the last default."""
    return opt(metavar, f"{text} Left out: what the weights say (see `info`), else {otherwise}.", **more)


def arg(metavar: str, text: str) -> Any:
    """A positional argument."""
    return typer.Argument(metavar=metavar, help=text)


OUT = ("-o", "--output")
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


DatasetArg = Annotated[str, arg("DATASET", "A folder, a manifest (.jsonl .csv .tsv .parquet) or tars.")]
LatentsArg = Annotated[
    Path | None,
    arg("LATENTS", "Codes or embeddings, from `sample` or `encode-images`; read from the pipe if left out."),
]
ImagesArg = Annotated[
    Path | None, arg("IMAGES", "From `decode`, `rerank` or `generate --images`; read from the pipe if left out.")
]
ImageArg = Annotated[str, arg("IMAGE", "PNG, JPEG, WebP or BMP. The square in its middle is used.")]
Prompts = Annotated[list[str] | None, arg("PROMPT...", "What to sample; quote each prompt.")]
PromptFile = Annotated[Path | None, opt("FILE", "Prompts, one per line.", "--prompts")]

OutFile = Annotated[Path, opt("FILE", "Where to write.", *OUT)]
Out = Annotated[Path | None, opt("FILE", "Where to write; named after the input if left out.", *OUT)]
SampledOut = Annotated[
    Path | None, opt("FILE", "Where to write; named after the prompt, or --prompts, if left out.", *OUT)
]
RowsOut = Annotated[
    Path | None,
    opt(
        "OUT", "Where to write: a .safetensors file, else a folder of shards; named after the input if left out.", *OUT
    ),
]
OutRows = Annotated[Path, opt("OUT", "Where to write: a .safetensors file, else a folder of shards.", *OUT)]
EditOut = Annotated[Path | None, opt("FILE", "Where to write the grid; named after the image if left out.", *OUT)]
KeepImages = Annotated[Path | None, opt("FILE", "Also write the images as an artifact here.")]
Force = Annotated[bool, opt(None, "Replace a file even if it is something else.", "--force")]
Fresh = Annotated[bool, opt(None, "Start over instead of resuming.", "--fresh")]
Init = Annotated[
    str | None,
    opt("MODEL", "Fine-tune from existing weights: a file, a checkpoint, or a bundle's. The model's sizes are theirs."),
]
ShardSize = Annotated[int, opt("N", "Rows per shard, when writing a folder of shards.", min=1)]

Model = Annotated[
    str | None,
    opt(
        "MODEL",
        "Weights: a file, a bundle (a folder, or the name of a shipped one), or hf://owner/repo[@revision].",
        "-m",
        "--model",
        envvar="DALLE_MODEL",
    ),
]
TokenizerFile = Annotated[Path, opt("FILE", "What `train-tokenizer` wrote.", "-t", "--tokenizer")]
Recipe = Annotated[Path | None, opt("FILE", "A recipe's TOML with hyper-parameters.", "--config")]
Sets = Annotated[list[str], opt("KEY=VALUE", "Override one hyper-parameter, as prior.n_layer=4.", "--set")]

Device = Annotated[str, opt("NAME", "auto, cpu, cuda or mps.")]
Dtype = Annotated[str, opt("NAME", "Arithmetic: auto, bfloat16, float16 or float32.")]
OptionalDtype = Annotated[str | None, opt("NAME", "Arithmetic: auto, bfloat16, float16 or float32.")]
Seed = Annotated[int, opt("N", "Same inputs, same seed, same machine: same bytes.", callback=_check_seed)]
OptionalSeed = Annotated[
    int | None, opt("N", "Same inputs, same seed, same machine: same bytes; 0 if left out.", callback=_check_seed)
]
BatchSize = Annotated[int, opt("N", "Rows at once; does not change the result.", min=1)]
SampleBatch = Annotated[
    int,
    opt(
        "N",
        "Candidates at once, or auto: as many as fit into half of the free memory; does not change the result.",
        parser=_parse_batch,
    ),
]
Int8 = Annotated[
    bool | None, opt(None, "Hold the prior's matrices in 8-bit integers: a quarter of the memory.", "--int8/--no-int8")
]
Compile = Annotated[
    bool,
    opt(None, "Compile the sampling of a code first (torch.compile): a minute or more, for long runs.", "--compile"),
]
Workers = Annotated[int, opt("N", "Threads that read images ahead.", min=0)]
Json = Annotated[bool, opt(None, "One JSON object on stdout.", "--json")]

Samples = Annotated[int, opt("N", "Candidates per prompt (the paper: 512).", "-n", "--samples", min=1)]
OptionalSamples = Annotated[
    int | None, opt("N", "Candidates per prompt; 16 if left out (the paper: 512).", "-n", "--samples", min=1)
]
Temperature = Annotated[
    float | None,
    sampling_opt("X", "Below 1 is safer, above 1 wilder; 0 takes the likeliest.", "1", min=0.0),
]
TopK = Annotated[int | None, sampling_opt("N", "Sample among the N likeliest codes only; 0 = all.", "0", min=0)]
TopP = Annotated[
    float | None,
    sampling_opt("X", "Sample among codes of this total probability; 1 = all.", "1", min=0.0, max=1.0),
]
Guidance = Annotated[
    float | None,
    sampling_opt(
        "X", "Classifier-free guidance; 1 = off. The prior must be trained with captions dropped.", "1", min=0.0
    ),
]
SketchGuidance = Annotated[
    float | None,
    sampling_opt("X", "Of a prior with a sketch: the guidance of the sketch.", "1", min=0.0),
]
GuidanceFrom = Annotated[
    float | None, opt("X", "Guide from this share of the grid on, in raster order; else 0.", min=0.0, max=1.0)
]
GuidanceTo = Annotated[float | None, opt("X", "Guide up to this share of the grid; else 1, its end.", min=0.0, max=1.0)]
SampleFrom = Annotated[
    Path | None,
    opt(
        "CODES",
        "Sample again what `sample` wrote here, with its own prompts and settings, which other options override.",
        "--from",
    ),
]
SampleRows = Annotated[str | None, opt("N,N", "Of --from, these rows only, counted from 0, as 3,17.")]
Keep = Annotated[int, opt("N", "Keep the best N per prompt; 0 keeps all, best first.", min=0)]
Columns = Annotated[int, opt("N", "Images in a row of the grid; 0 = as fits.", min=0)]
Terminal = Annotated[bool | None, opt(None, "Preview in the terminal, or not.", "--terminal/--no-terminal")]
Exclude = Annotated[Path | None, opt("FILE", "Leave out the ids in this file, as `overlap` writes it.", "--exclude")]
Limit = Annotated[int | None, opt("N", "Use at most N of them, spread over all.", min=1)]
ImageFile = Annotated[
    str | None,
    opt(
        "FILE",
        "Keep a part of this image, the square in its middle, and sample the rest: see --keep-rows and --mask. A "
        "code depends on the caption, the rows of codes above it and the codes left of it. It does not see what is "
        "kept to its right or below, so that may not fit.",
    ),
]
KeepRows = Annotated[
    int | None, opt("N", "Of --image, keep this many rows of codes from the top; else half of them.", min=0)
]
MaskFile = Annotated[
    str | None,
    opt(
        "FILE",
        "Of --image, sample what is white in this image (of any size, its middle square), and keep what is black. A"
        " code is sampled if white touches its patch anywhere.",
    ),
]
ClipFile = Annotated[
    str | None, opt("CLIP", "Also embed the captions with this CLIP, for a prior over its embeddings.", "-m", "--model")
]
SamplerName = Annotated[str | None, sampling_opt("NAME", "Of a diffusion prior: ddpm, ddim, dpm++ or heun.", "ddpm")]
SamplerSteps = Annotated[int | None, sampling_opt("N", "Of a diffusion prior: steps.", "64, the paper's", min=1)]
LatentsName = Annotated[
    str | None,
    opt(
        "NAME",
        "codes, as DALL-E, or embeddings, as DALL-E 2: which prior to sample where MODEL holds both; codes if left "
        "out.",
    ),
]
DecoderSteps = Annotated[int | None, sampling_opt("N", "Of a diffusion decoder: steps.", "20", min=1)]
DecoderSampler = Annotated[
    str | None, sampling_opt("NAME", "Of a diffusion decoder: ddpm, ddim, dpm++ or heun.", "dpm++")
]
DecoderGuidance = Annotated[
    float | None,
    sampling_opt("X", "Of a diffusion decoder: guidance towards embedding and caption; 1 = off.", "1", min=0.0),
]
DecoderEta = Annotated[
    float | None,
    opt(
        "X",
        "Of --decoder-sampler ddim: noise added at each step; 0 = none, 1 = as much as ddpm.",
        "--eta",
        min=0.0,
        max=1.0,
    ),
]
UpsamplerSteps = Annotated[int | None, sampling_opt("N", "Steps of each of the bundle's upsamplers.", "10", min=1)]
LowNoise = Annotated[
    float | None,
    sampling_opt("X", "Noise on the image that an upsampler enlarges: a share of its timesteps.", "0", min=0.0),
]
EditSteps = Annotated[int | None, opt("N", "DDIM steps, and as many back to an image's noise; else 50.", min=1)]

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
    """Which part of an existing image stays while codes are sampled for the rest."""

    image: ImageFile = None
    keep_rows: KeepRows = None
    mask: MaskFile = None

    def check(self) -> None:
        """Raises: DalleError for a mask or rows without an image, or both."""
        given = [flag(name) for name in ("keep_rows", "mask") if getattr(self, name) is not None]
        if given and self.image is None:
            raise DalleError(f"expected --image beside {given[0]}, found none; say of which image codes are kept")
        if len(given) == 2:
            raise DalleError("expected --keep-rows or --mask, found both; leave one out")


@dataclass(frozen=True)
class DeviceOptions:
    """Where to compute, and in which dtype."""

    device: Device = "auto"
    dtype: OptionalDtype = "float32"

    def open(self) -> "Arithmetic":
        """What they come to on this machine.

        Raises:
            DalleError: a device or a dtype that this machine lacks.
        """
        from dalle_cli.devices import arithmetic

        return arithmetic(self.device, self.dtype or "float32")


@dataclass(frozen=True)
class GridOptions:
    """How an image grid is laid out, and whether the terminal shows it, too."""

    columns: Columns = 0
    terminal: Terminal = None


@dataclass(frozen=True)
class EditOptions:
    """What `vary`, `interpolate`, `diff` and `reconstruct` have in common."""

    out: EditOut = None
    model: Model = None
    decoder_steps: EditSteps = None
    decoder_guidance: DecoderGuidance = None
    upsampler_steps: UpsamplerSteps = None
    seed: Seed = 0
    images: KeepImages = None
    batch_size: BatchSize = 64
    columns: Columns = 0
    terminal: Terminal = None
    device: Device = "auto"
    dtype: Dtype = "float32"
    force: Force = False


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
