"""Options that several stages share, so that each is spelled and explained once."""

from pathlib import Path
from typing import Annotated

import typer

from dalle_cli.errors import DalleError

MAX_SEED = 2**63 - 1  # the largest that every generator takes


def _check_seed(value: int) -> int:
    """Refuse a seed out of range: typer's own `min` and `max` would do so, too, but fill the help with 19 digits."""
    if not 0 <= value <= MAX_SEED:
        raise typer.BadParameter(f"{value} is not between 0 and {MAX_SEED}")
    return value


AUTO = 0  # the batch size that `auto` is read as


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


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line itself, by the name of its parameter."""
    return getattr(ctx.get_parameter_source(name), "name", "DEFAULT") == "COMMANDLINE"


def refuse(ctx: typer.Context, model: str, *names: str) -> None:
    """Raises: DalleError if one of these options, which `model` has no use for, stands on the command line."""
    for name in names:
        if is_given(ctx, name):
            said = f"--{'compile' if name == 'compiled' else name.replace('_', '-')}"
            raise DalleError(f"expected no {said} for {model}, found one; leave it out")


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
Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="One prompt a line.")]

OutFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write.")]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", help="Where to write; named after the input if left out."),
]
DrawnOut = Annotated[
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
Force = Annotated[bool, typer.Option("--force", help="Replace a file even if it is something else.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Init = Annotated[
    str | None,
    typer.Option(
        "--init",
        metavar="MODEL",
        help="Begin with weights that there are: a file, a checkpoint, a bundle's; the model's sizes are theirs.",
    ),
]
ShardSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows in a shard, when writing a folder of shards.")]

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
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="How many at once; does not change the result.")]
DrawBatch = Annotated[
    int,
    typer.Option(
        parser=_parse_batch,
        metavar="N",
        help="How many at once, or auto: as fit into half of the free memory; does not change the result.",
    ),
]
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8/--no-int8", help="Hold the prior's matrices as whole numbers of 8 bits: a quarter of the memory."
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="Compile the drawing of a code first (torch.compile): a minute or more, for long runs."
    ),
]
Workers = Annotated[int, typer.Option(min=0, metavar="N", help="Threads that read pictures ahead.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]

Samples = Annotated[
    int, typer.Option("-n", "--samples", min=1, metavar="N", help="Candidates per prompt (the paper: 512).")
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        help="Below 1 is safer, above 1 wilder; 0 takes the likeliest. Left out: what the prior was made for, as "
        "`info` tells, else 1.",
    ),
]
TopK = Annotated[int, typer.Option(min=0, metavar="N", help="Draw among the N likeliest codes only; 0 = all.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="X", help="Draw among codes of this total probability; 1 = all.")
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        help="Classifier-free guidance; 1 = off. The prior must be trained with captions dropped. Left out: what the "
        "prior was made for, as `info` tells, else 1.",
    ),
]
SketchGuidance = Annotated[
    float | None,
    typer.Option(
        "--sketch-guidance",
        min=0.0,
        metavar="X",
        help="Of a prior that sketches first: what the sketch is guided by. Left out: what the prior was made for.",
    ),
]
GuidanceFrom = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="X", help="Guide from this share of the grid on, in raster order.")
]
GuidanceTo = Annotated[
    float, typer.Option(min=0.0, max=1.0, metavar="X", help="Guide up to this share of the grid; 1 = to its end.")
]
DrawnFrom = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="CODES",
        help="Draw again what `sample` wrote here, by its own prompts and settings, which options given override.",
    ),
]
DrawnRows = Annotated[
    str | None,
    typer.Option(metavar="N,N", help="Of --from, these rows only, counted from 0, as 3,17."),
]
Keep = Annotated[int, typer.Option(min=0, metavar="N", help="Keep the best N per prompt; 0 keeps all, best first.")]
Columns = Annotated[int, typer.Option(min=0, metavar="N", help="Pictures in a row of the sheet; 0 = as fits.")]
Terminal = Annotated[bool, typer.Option("--terminal", help="Also preview in the terminal.")]
Without = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Leave out the ids in this file, as `overlap` writes it."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Look at N of them at most, spread over all.")]
PictureFile = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="FILE",
        help="Keep a part of this picture, its middle square, and draw the rest: see --keep-rows and --mask. A code is "
        "drawn by the caption, the rows of codes above it and the codes left of it, kept or drawn. It cannot see what "
        "is kept to its right or below, so that may not fit it.",
    ),
]
KeepRows = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="Of --image, keep so many rows of codes from the top; else half of them."),
]
MaskFile = Annotated[
    str | None,
    typer.Option(
        "--mask",
        metavar="FILE",
        help="Of --image, draw anew what is white in this picture (of any size, its middle square), and keep what is "
        "black. A code whose patch white touches anywhere is drawn anew.",
    ),
]
ClipFile = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="CLIP",
        help="Also embed the captions by this CLIP, for a prior over its embeddings.",
    ),
]
SamplerName = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help="Of a diffusion prior: ddpm (the default), ddim, dpm++ or heun."),
]
SamplerSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Of a diffusion prior: in how many steps; 64, the paper's, if left out."
    ),
]
PaintSteps = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Of embeddings: paint in so many steps; else in 20.")
]
PaintSampler = Annotated[
    str | None,
    typer.Option("--sampler", metavar="NAME", help="Of embeddings: ddpm, ddim, dpm++ (the default) or heun."),
]
PaintGuidance = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        min=0.0,
        metavar="X",
        help="Of embeddings: classifier-free guidance towards embedding and caption; 1 = off, the default.",
    ),
]
PaintEta = Annotated[
    float | None,
    typer.Option(
        "--eta", min=0.0, max=1.0, metavar="X", help="Of ddim: noise added on the way; 0 is none, 1 as much as ddpm."
    ),
]
UpsamplerSteps = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Of embeddings: steps of each of the bundle's upsamplers; else 10."),
]
PaintSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        callback=lambda value: value if value is None else _check_seed(value),
        help="Of embeddings: the noise is a function of it and of the row; else 0.",
    ),
]
