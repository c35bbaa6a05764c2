"""Option types that several commands share. Imports nothing heavy: --help must be quick."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal

import typer

from sela_cli.errors import UsageError

Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="Images: 'digits' (embedded), a folder (with or without class subfolders; linked "
        "folders are not entered), a .tar, a text list (.txt, .tsv or .lst: a path a line, "
        "relative to the list; a tab and a class may follow; # begins a comment), an HDF5 of "
        "images (FILE or FILE::/DATASET), or NAME:ROOT[@SPLIT] with NAME one of cifar10, "
        "cifar100, mnist, fashion-mnist, svhn, stl10, voc2007, imagenet, places365.",
    ),
]
Output = Annotated[
    str,
    typer.Option("--output", "-o", metavar="FILE", help="File to write; '-' is standard output."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and results only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", "-n", help="Print the plan: shapes, sizes, settings. Write nothing."),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=(1 << 63) - 1, help="Seed of every random draw.")
]
OptionalSeed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        max=(1 << 63) - 1,
        help="Seed of every random draw; default: the checkpoint's where there is one, else 0.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that can't be read.")]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch a NAME:ROOT data set where torchvision can.")
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use so many images, evenly spread.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Images a batch; default 256, to retrain with --rotation 64."
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        min=16,
        help="Side of the network's input; default 32 for small images, else 224.",
    ),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch", help="alexnet, alexnet-small, resnet18, resnet34, resnet50 or resnet50-v2."
    ),
]
Heads = Annotated[
    str | None,
    typer.Option(
        "--heads",
        help="Clusters of each head: 128x10 (ten heads of 128; the default of runs) or 128,256.",
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(
        "--epochs", min=0, help="Length of training; default 400, of a run 160, to retrain 90."
    ),
]
Lr = Annotated[float | None, typer.Option("--lr", help="Learning rate at the start; default 0.05.")]
LrSchedule = Annotated[
    str | None,
    typer.Option("--lr-schedule", help="step (default, the paper's), cosine or constant."),
]
LrMilestones = Annotated[
    str | None,
    typer.Option(
        "--lr-milestones",
        metavar="F,F..",
        help="Fractions of the epochs at which step lowers the rate; default 0.375,0.75,0.875, "
        "to retrain after each third.",
    ),
]
LrFactor = Annotated[
    float | None,
    typer.Option("--lr-factor", help="What step multiplies the rate by; default 0.1."),
]
Momentum = Annotated[float | None, typer.Option("--momentum", help="SGD momentum; default 0.9.")]
WeightDecay = Annotated[
    float | None, typer.Option("--weight-decay", help="SGD weight decay; default 1e-05.")
]
Aug = Annotated[
    str | None,
    typer.Option(
        "--aug",
        help="Augmentation: paper, imagenet (default), strong, crop, crop-flip, "
        "imagenet-crop-flip or none.",
    ),
]


# Choices; what each is for is said by its option.
PrecisionChoice = Literal["float32", "bfloat16", "auto"]
DtypeChoice = Literal["float32", "float16"]
StoreChoice = Literal["logits", "features"]
AssignChoice = Literal["balanced", "argmax", "random"]
LabelMethodChoice = Literal["sela", "kmeans"]
SolverChoice = Literal["auto", "newton", "lbfgs", "sinkhorn"]
InputKindChoice = Literal["logits", "probabilities"]
RelabelChoice = Literal["quadratic", "linear"]
RelabelHeadsChoice = Literal["all", "cycle"]
MethodChoice = Literal["linear", "knn", "both"]
TaskChoice = Literal["classification", "detection"]
PartChoice = Literal["fc", "all"]
ProtocolChoice = Literal["imagenet-linear", "places-linear", "small-linear", "knn"]
PresetChoice = Literal[
    "imagenet-alexnet", "imagenet-resnet50", "cifar10", "cifar100", "svhn", "digits"
]
HeadInitChoice = Literal["random", "kmeans"]
ViewChoice = Literal["centre", "random"]

HeadInit = Annotated[
    HeadInitChoice | None,
    typer.Option(
        "--head-init",
        help="How the heads of a fresh network begin: random (default, the paper's), or kmeans, "
        "as clusters of its features.",
    ),
]
View = Annotated[
    ViewChoice | None,
    typer.Option(
        "--view",
        help="How images are seen for labelling: the plain centre (default), or random, "
        "augmented as in training.",
    ),
]
Views = Annotated[
    int | None,
    typer.Option(
        "--views",
        min=1,
        help="Random views of each image, whose mean logits are labelled; default 1. The time "
        "goes up with them.",
    ),
]
_ARITHMETIC = (
    "Arithmetic of the network: float32, the often faster bfloat16, or auto, the faster one, "
    "measured at the start"
)
Precision = Annotated[
    PrecisionChoice | None,
    typer.Option(
        "--precision",
        help=f"{_ARITHMETIC}; default: the checkpoint's where there is one, else float32.",
    ),
]
# A run takes no more than the weights of the checkpoint that it begins with.
RunPrecision = Annotated[
    PrecisionChoice | None,
    typer.Option(
        "--precision",
        help=f"{_ARITHMETIC}; default: the preset's where there is one, else float32.",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the training step with torch.compile: a minute at the start, then faster on "
        "most GPUs; on a CPU hardly.",
    ),
]
Dtype = Annotated[
    DtypeChoice | None,
    typer.Option("--dtype", help="Storage of logits or features; default float32."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Memory of the label stage at most, such as 900M or 4G (default 4G). Scores that fit "
        "are kept; others are read again in each pass.",
    ),
]
Store = Annotated[
    StoreChoice | None,
    typer.Option(
        "--store", help="logits (default), or features and heads: smaller with many heads."
    ),
]
Lamb = Annotated[
    float | None,
    typer.Option(
        "--lamb",
        help="Lambda, inverse of the entropic regularisation: larger is sharper; default 25.",
    ),
]
Tol = Annotated[
    float | None,
    typer.Option(
        "--tol",
        help="Residual to reach, the share of the images by which soft sizes are off; "
        "default 0.0001.",
    ),
]
MaxIter = Annotated[
    int | None, typer.Option("--max-iter", min=1, help="Iterations at most; default 2000.")
]
Marginal = Annotated[
    str | None,
    typer.Option(
        "--marginal",
        metavar="KIND",
        help="Cluster sizes: uniform (default), zipf:S (the k-th is as k^-S), gaussian:S (spread "
        "about 1/K by S/K) or a file of K weights.",
    ),
]
Assign = Annotated[
    AssignChoice | None,
    typer.Option(
        "--assign",
        help="balanced: sizes floor or ceiling of N/K exactly (default). argmax: what each row "
        "prefers. random: balanced and drawn by --seed, the loop's start.",
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given (not None)."""
    return {name: value for name, value in options.items() if value is not None}


def fractions(text: str | None) -> tuple[float, ...] | None:
    """`0.6,0.8` as numbers; a usage error otherwise."""
    return None if text is None else tuple(numbers(text, "--lr-milestones"))


def numbers(text: str, option: str) -> list[float]:
    """`200,50,10` as numbers; a usage error otherwise."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        told = f"{text}: write numbers such as 200,50,10"
        raise typer.BadParameter(told, param_hint=f"'{option}'") from None


def whole_numbers(text: str, option: str) -> list[int]:
    """`200,50,10` as integers; a usage error otherwise."""
    values = numbers(text, option)
    if not all(value.is_integer() for value in values):
        told = f"{text}: write whole numbers such as 200,50,10"
        raise typer.BadParameter(told, param_hint=f"'{option}'")
    return [int(value) for value in values]


def size_in_bytes(text: str | None) -> int | None:
    """`500M`, `1.5G` or a number of bytes; a usage error otherwise."""
    if text is None:
        return None
    powers = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", text.upper())
    size = int(Decimal(found[1]) * (1 << powers[found[2]])) if found else 0
    if size == 0:
        told = f"{text}: write a size such as 500M or 1.5G"
        raise typer.BadParameter(told, param_hint="'--max-memory'")
    return size


def device_name(device: str, dry_run: bool = False) -> str:
    """A torch device for `auto`, cpu, cuda, cuda:N, a GPU made the current one.

    `cuda` is the process's own GPU. A dry run needs none, and has what it was given. Raises
    UsageError where there is none such.
    """
    if dry_run:
        return device
    import torch

    from sela_cli import job

    # UsageError, not typer's: of a job's processes, only the first could tell that.
    if device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is none of auto, cpu, cuda and cuda:N", "use auto")
    if device.startswith("cuda:") and job.has_neighbours():
        raise UsageError(
            f"--device {device} is one GPU for several processes", "use cuda: each has its own"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = job.device()
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from None
    if found.type == "cuda":
        # Pinned memory takes some of the current GPU, which else is the first in every process.
        torch.cuda.set_device(found)
    return device
