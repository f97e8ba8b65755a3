"""The table of stages. A stage's module is imported only when it is called; an error becomes an exit status."""

import errno
import importlib
import io
import keyword
import os
import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dalle_cli import __version__
from dalle_cli.errors import DalleError
from dalle_cli.options import spread

# Command, and the first line of its help, so that `dalle --help` imports none of them.
STAGES: dict[str, dict[str, str]] = {
    "Data": {
        "train-tokenizer": "Train a byte-level BPE tokenizer on a data set's captions.",
        "tokenize": "Turn a data set's captions into tokens, and with a CLIP into embeddings, too.",
        "encode-images": "Encode a data set's images: with a dVAE to codes, with a CLIP to embeddings.",
        "overlap": "Find the images of one data set that are in another, too.",
    },
    "Train": {
        "plan": "Estimate memory and time of a recipe's training on a machine, or of sampling with a bundle.",
        "train-dvae": "Train a discrete VAE: images to codes and back.",
        "train-clip": "Train a CLIP, which scores how well an image fits a caption.",
        "train-prior": "Train a prior over codes, or over CLIP embeddings, given captions.",
        "train-decoder": "Train a diffusion decoder of CLIP embeddings, or an upsampler.",
        "plot": "Plot the metrics of training runs, several in one chart.",
    },
    "Draw": {
        "sample": "Sample codes, or CLIP embeddings, for a prompt from a prior.",
        "decode": "Decode codes with a dVAE, or CLIP embeddings with a diffusion decoder, to images.",
        "rerank": "Score images against their prompts, by CLIP or by a prior, and keep the best.",
        "generate": "Sample, decode, rerank and show images for a prompt, in one go.",
        "vary": "Sample variations of an image, with the same CLIP embedding.",
        "interpolate": "Sample what lies between two images, from the one's CLIP embedding to the other's.",
        "diff": "Sample an image again with the change from one caption to another: a text diff.",
        "reconstruct": "Sample what the first principal components of an image's CLIP embedding hold.",
        "show": "Show images as an image grid.",
    },
    "Judge": {
        "doctor": "Check a trained model for the usual failures; the exit status is 0 whatever it finds.",
        "evaluate": "Score images against real ones, or a dVAE or a prior on data.",
        "score": "Score codes or images by a prior: log p(codes | caption).",
        "report": "Write one HTML page about a run: charts, images, metrics, and each artifact's history.",
        "survey": "Let people compare two sets of images: one HTML page, and the tally of their votes.",
    },
    "Share": {
        "export": "Write images as PNG files with a manifest, which is a data set again.",
        "import": "Turn published weights into a bundle like our own, recognized by their files.",
        "info": "Describe an artifact and how it was made; of a bundle, each of its weights.",
        "pull": "Download a bundle from a hub, and check it.",
        "push": "Upload a bundle to a hub, with a model card.",
    },
}
GRACE = 3.0  # seconds
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # also where no file is named


def load_stage(name: str) -> Any:
    """The module of a stage: `train-prior` is dalle_cli/commands/train_prior.py, and `import` is import_.py."""
    file = f"{name}_" if keyword.iskeyword(name) else name.replace("-", "_")
    return importlib.import_module(f"dalle_cli.commands.{file}")


class Stage(TyperCommand):
    """A command whose help can be read and copied: plain arguments, and the example in lines that are not wrapped."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]  # typer's mark of what is required

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            example = "".join(f"  {line}\n" for line in self.epilog.splitlines())
            formatter.write(f"\nExample:\n{example}")


class Stages(TyperGroup):
    """A group whose commands are imported when called, and listed by group in `--help` without being imported."""

    def __init__(self, **attrs: Any):
        super().__init__(**attrs)
        self.commands = {name: None for group in STAGES.values() for name in group}  # type: ignore[misc]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            return None
        stage = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        module = load_stage(cmd_name)
        stage.command(cmd_name, cls=Stage, epilog=module.EXAMPLE)(spread(module.run))
        return typer.main.get_command(stage)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        for group, stages in STAGES.items():
            with formatter.section(group):
                formatter.write_dl(list(stages.items()), col_max=20)
        self.format_options(ctx, formatter)
        self.format_epilog(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = [record for p in self.get_params(ctx) if (record := p.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(records, col_max=20)


app = typer.Typer(
    name="dalle", cls=Stages, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Each stage reads and writes ordinary safetensors files. `dalle STAGE --help` shows an example of each.",
)  # fmt: skip


def _version(value: bool) -> None:
    if value:
        print(f"dalle {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """DALL-E as a chain of small commands: images to codes, captions to codes, codes to images."""


def _out_of_memory(error: Exception) -> bool:
    """Whether numpy or torch, which is not imported for this, found too little memory."""
    torch_says = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    return isinstance(error, MemoryError) or torch_says


def _let_the_first_speak(error: DalleError) -> None:
    """Of several processes most find the same fault: the first tells of it, and the launcher ends the others."""
    if _launched() and os.environ.get("RANK") != "0" and not hasattr(error, "at_once"):
        time.sleep(GRACE)


def _launched() -> bool:
    """Whether this is one of several processes that torchrun or another launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def main() -> None:
    """Run the command line. Exit status: 0; 1 for a DalleError; 2 for usage; 130 when interrupted."""
    from dalle_cli import console, cut_files

    cut_files.explain()
    if _launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: else each process warns of its own
    console.show_library_messages()
    for stream in (sys.stdin, sys.stdout):  # paths may hold bytes that are no UTF-8, and go through pipes as they are
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    try:
        app(prog_name="dalle")
    except DalleError as error:
        _let_the_first_speak(error)
        console.error(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        console.error(f"expected more memory, found {error}; lower --batch-size or the sizes of the model")
        sys.exit(1)
    except OSError as error:
        if error.filename is None and error.errno not in MENDABLE:
            raise
        console.error(f"expected to read or write {error.filename or 'a file'}, found {error.strerror}; mend that")
        sys.exit(1)
