"""Options that several stages share, so that each is spelled and explained once."""

from pathlib import Path
from typing import Annotated

import typer

DatasetArg = Annotated[
    str, typer.Argument(metavar="DATASET", help="A folder, a manifest (.jsonl .csv .tsv .parquet) or tars.")
]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write; named after the input if left out.")]
OutFile = Annotated[Path, typer.Option("-o", "--output", help="Where to write.")]
Model = Annotated[
    str | None,
    typer.Option("-m", "--model", envvar="DALLE_MODEL", help="Weights: a file, a bundle folder, or hf://owner/repo."),
]
Recipe = Annotated[Path | None, typer.Option("--config", help="A recipe's TOML with hyper-parameters.")]
Sets = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override one hyper-parameter, as prior.n_layer=4.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="Arithmetic: auto, bfloat16 or float32.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same inputs, same seed, same machine: same bytes.")]
BatchSize = Annotated[int, typer.Option(min=1, help="How many at once; does not change the result.")]
Workers = Annotated[int, typer.Option(min=0, help="Threads that read pictures ahead.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file even if it is something else.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
ShardSize = Annotated[int, typer.Option(min=1, help="Rows in a shard, when writing a folder of shards.")]
CodesArg = Annotated[Path | None, typer.Argument(metavar="CODES", help="From `sample` or `encode-images`; else piped.")]
ImagesArg = Annotated[Path | None, typer.Argument(metavar="IMAGES", help="From `decode` or `rerank`; else piped.")]
Prompts = Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.")]
PromptFile = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="One prompt a line.")]
Samples = Annotated[int, typer.Option("-n", "--samples", min=1, help="Candidates per prompt (the paper: 512).")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Below 1 is safer, above 1 wilder; 0 takes the likeliest.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw among the k likeliest codes only; 0 = all.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among codes of this total probability; 1 = all.")]
Guidance = Annotated[
    float,
    typer.Option(min=0.0, help="Classifier-free guidance; 1 = off. The prior must be trained with captions dropped."),
]
SampleDtype = Annotated[str, typer.Option("--dtype", help="Arithmetic: auto, bfloat16 or float32.")]
Keep = Annotated[int, typer.Option(min=0, help="Keep the best so many per prompt; 0 keeps all, best first.")]
Columns = Annotated[int, typer.Option(min=0, help="Pictures in a row of the sheet; 0 = as fits.")]
Terminal = Annotated[bool, typer.Option("--terminal", help="Also preview in the terminal.")]
