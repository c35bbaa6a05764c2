"""A run's folder: which files are the run's, whose run it is, and that one process has it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sela_cli import envelope, outputs
from sela_cli.errors import BadData, CannotCreate
from sela_cli.locks import locked

if TYPE_CHECKING:
    from sela_cli.images.batches import Images
    from sela_cli.run_settings import RunSettings

# Whole, unfinished, being written or locked: a run touches no file of another name.
_OWN = re.compile(
    r"\.?(run\.json|predictions\.json|rounds\.csv"
    r"|(labels|logits|checkpoint|probe)(-\d{3,})?\.h5((\.\d+)?\.unfinished)?)(\.partial|\.lock)?"
)
# Settings that are named where two runs differ, at most.
_TOLD = 3
# What settings were that runs of earlier versions do not name.
_LATER = {"views": 1}


def precision_of(folder: Path) -> str | None:
    """The arithmetic that the run in the folder has begun in."""
    try:
        return json.loads((folder / "run.json").read_text())["settings"]["recipe"]["precision"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else runs there meanwhile. Raises CannotCreate where somebody does."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / ".lock"))
        except BlockingIOError:
            raise CannotCreate(
                f"{folder}: another `sela run` is at work there",
                "wait for it, or choose another --out",
            ) from None
        except OSError as error:
            raise CannotCreate(f"{folder}: {error.strerror}", "choose another --out") from error
        yield


def claim(images: Images, folder: Path, settings: RunSettings, force: bool, resume: bool) -> None:
    """Make sure that what lies in the folder is a beginning of this very run.

    Raises CannotCreate where it is something else and `force` is off, BadData where run.json
    is damaged.
    """
    path = folder / "run.json"
    identity = envelope.through_json(
        {
            "dataset-id": images.dataset_id,
            "classes": images.truth_digest,
            "settings": asdict(settings),
        }
    )
    if not path.exists():
        # Hidden ones may be a run's that was killed before it had its run.json.
        if found := [*own_files(folder, "[!.]*"), *_events(folder)]:
            name = found[0].relative_to(folder)
            raise CannotCreate(f"{folder} holds {name} and no run", "choose another --out")
    elif force:
        # From here on no run goes on with what is left of the old one.
        write_json(path, {})
        for leftover in [*own_files(folder, "*"), *_events(folder)]:
            if leftover != path:
                leftover.unlink()
    else:
        try:
            before = json.loads(path.read_text())
            if before.get("classes") is None:
                # Runs of earlier versions have no note of them.
                del identity["classes"]
            there, here = _compared(before), _compared(identity)
            same = here.items() <= there.items()
        except (ValueError, AttributeError, TypeError) as error:
            raise BadData(f"{path}: damaged ({error})", "start over with --force") from error
        if not same:
            raise CannotCreate(
                f"{folder} holds a run with other {_differing(there, here)}",
                "choose another --out, or --force",
            )
        if not resume or (folder / "rounds.csv").exists():
            state = "a finished" if (folder / "rounds.csv").exists() else "an unfinished"
            raise CannotCreate(f"{folder} holds {state} run", "choose another --out, or --force")
    # The report finds the images by `data`; a run may go on with them in another place.
    write_json(path, identity | {"data": images.spec})


def _compared(run: dict[str, Any]) -> dict[str, Any]:
    """What makes it that run: another machine may have another memory."""
    settings: dict[str, Any] = _LATER | dict(run.get("settings", {}))
    settings["labels"] = dict(settings.get("labels", {}))
    settings["labels"].pop("max_memory", None)
    return run | {"settings": settings}


def _differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two runs differ in, in words."""
    old, new = dict(envelope.leaves(there)), dict(envelope.leaves(here))
    names = [name for name in new if name in old and old[name] != new[name]]
    if not names:
        return "settings or images"
    if "dataset-id" in names:
        return "images"
    if "classes" in names:
        return "true classes (if unfinished, it goes on with those of then)"
    told = [f"{name} {old[name]} there, {new[name]} here" for name in names[:_TOLD]]
    return f"settings ({'; '.join(told)})"


def own_files(folder: Path, pattern: str) -> list[Path]:
    """The files in a run's folder that are the run's, of those that match `pattern`."""
    return [path for path in folder.glob(pattern) if _OWN.fullmatch(path.name)]


def is_own(folder: Path, path: str) -> bool:
    """Whether `path` is a file of the run in the folder."""
    return any(outputs.same_file(path, str(own)) for own in own_files(folder, "*.h5"))


def _events(folder: Path) -> list[Path]:
    return list(folder.glob("tensorboard/events.*"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole, in place of what was there."""
    with outputs.replacing(str(path), force=True) as file:
        file.write_text(json.dumps(values, indent=1))
