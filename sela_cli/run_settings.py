"""The options of a run: presets, what is given over them, and what a dry run shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sela_cli import envelope, presets, schedule
from sela_cli.errors import UsageError
from sela_cli.formats import Checkpoint
from sela_cli.images.batches import Images
from sela_cli.labels import LabelSettings, check_memory
from sela_cli.logits import plan as embed_plan
from sela_cli.networks import Network, build, check_arch, parse_heads
from sela_cli.recipe import Recipe, check_rates
from sela_cli.training import check_views

# Fields of RunSettings that are settings in themselves, or are said in words in a plan.
_PARTS = ("recipe", "labels", "heads", "arch", "image_size", "start")


@dataclass(frozen=True)
class RunSettings:
    """Every option of a run that changes its result."""

    arch: str
    image_size: int
    heads: tuple[int, ...]
    opts: int
    relabel: str
    recipe: Recipe
    labels: LabelSettings
    store: str = "logits"
    dtype: str = "float32"
    view: str = "centre"
    views: int = 1
    relabel_heads: str = "all"
    # Digest of the checkpoint to begin with.
    start: str = ""

    def head_of(self, number: int) -> int | None:
        """The head that round `number` labels; None for all of them, as at first where they
        are not random ones."""
        first = number == 1 and (self.start or self.recipe.head_init != "random")
        if first or self.relabel_heads == "all":
            return None
        return (number - 1) % len(self.heads)

    @property
    def positions(self) -> list[float]:
        """Where the images are relabelled, in epochs."""
        return schedule.relabel_positions(self.recipe.epochs, self.opts, self.relabel)

    def network(self) -> Network:
        """A fresh one."""
        return build(self.arch, self.image_size, list(self.heads), self.recipe.seed)


def settings_of(
    preset_name: str | None,
    image_size: int | None,
    options: dict[str, Any],
    start: Checkpoint | None = None,
) -> RunSettings:
    """A preset (or the defaults) with options over it. An image size of 0 is to be seen.

    `start`: the checkpoint that a run is to begin with. Raises UsageError where an option
    has no meaning.
    """
    defaults: dict[str, Any] = {
        "arch": "alexnet",
        "image_size": 0,
        "heads": "128x10",
        "opts": 80,
        "relabel": "quadratic",
        "epochs": 160.0,
    }
    merged = defaults | presets.preset(preset_name)
    if start:
        assert start.header is not None
        if image_size is not None or options.keys() & {"arch", "heads"}:
            raise UsageError("--arch, --heads and --image-size are the checkpoint's")
        merged |= {
            "arch": start.arch,
            "heads": ",".join(map(str, start.heads)),
            "image_size": start.image_size,
            "start": start.header.digest,
            # Its heads stay as they are, whatever the preset says of fresh ones.
            "head_init": "random",
        }
    merged |= options
    if image_size is not None:
        merged["image_size"] = image_size
    check_arch(merged["arch"])
    recipe = Recipe.of(merged)
    recipe.check()
    check_rates(options, recipe)
    LabelSettings(**_fields_of(LabelSettings, options)).check()
    # A preset may name what the labels that are asked for have no use for.
    labels = LabelSettings(**_fields_of(LabelSettings, merged)).as_used()
    own = _fields_of(RunSettings, merged)
    own |= {"heads": tuple(parse_heads(merged["heads"])), "recipe": recipe, "labels": labels}
    settings = RunSettings(**own)
    check_views(settings.view, settings.views)
    return settings


def _fields_of(
    settings: type[RunSettings | LabelSettings], options: dict[str, Any]
) -> dict[str, Any]:
    """The options that are fields of these settings, which have defaults for the others."""
    names = [field.name for field in fields(settings)]
    return {name: options[name] for name in names if name in options}


def plan(images: Images, settings: RunSettings) -> tuple[dict[str, Any], str]:
    """What a dry run shows, as values and as text."""
    network = settings.network()
    count = len(images)
    shown = embed_plan(images, network, settings.store, settings.dtype) | {
        "rounds": len(settings.positions),
        "positions": settings.positions,
        "steps": settings.recipe.steps(settings.recipe.epochs, count),
        "settings": envelope.through_json(asdict(settings)),
    }
    lines = [
        f"{count} images, {settings.arch} at {settings.image_size} pixels, "
        + (f"begun from {settings.start}" if settings.start else "fresh"),
        f"heads {list(settings.heads)}",
        f"{shown['steps']} steps, {shown['rounds']} relabellings at epochs "
        + ", ".join(f"{position:.2f}" for position in settings.positions[:20])
        + (", ..." if len(settings.positions) > 20 else ""),
        f"{shown['megabytes']:.1f} MB of {settings.store} a round",
    ]
    flat = {name: value for name, value in asdict(settings).items() if name not in _PARTS}
    flat |= asdict(settings.recipe) | asdict(settings.labels)
    lines += [f"{name} = {value}" for name, value in flat.items()]
    return shown, "\n".join(lines)


def check_heads(images: Images, settings: RunSettings) -> None:
    """Raises UsageError where a head has more clusters than there are images, or takes more
    memory than labels may."""
    if max(settings.heads) > len(images):
        raise UsageError(
            f"--heads: {max(settings.heads)} clusters for {len(images)} images",
            "use at most as many clusters as images",
        )
    check_memory(len(images), max(settings.heads), settings.labels)
