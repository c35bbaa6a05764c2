"""The documentation says what is so: its commands are run, its pages are current."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from sela_cli import cli, errors, formats, job, networks
from sela_cli.images.augment import AUGMENTATIONS
from sela_cli.images.sources import open_source

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# Too long for a test: shown to be understood, by its plan.
HEAVY = "sela run --data photos/"
# The tutorial on fewer images, and for shorter: options that are added to its commands.
BOUNDS = {
    "run": "--limit 120 --epochs 1 --opts 2 --heads 5,8,8,10 --device cpu",
    "probe": "--limit 120 --epochs 1 --device cpu",
    "embed": "--limit 120 --device cpu",
    "retrain": "--limit 120 --epochs 1 --device cpu",
}


def shell_blocks(text: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def make_cli() -> Any:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "sela.1"])
def test_pages_written_from_the_help_are_current(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == make_cli().PAGES[page](), "run `make docs`"


@pytest.mark.skipif(not shutil.which("mandoc"), reason="no mandoc to read the man page with")
def test_the_man_page_is_one() -> None:
    page = str(ROOT / "docs" / "sela.1")
    lint = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", page], capture_output=True)
    complaints = [line for line in lint.stdout.decode().splitlines() if "missing date" not in line]
    assert complaints == []
    shown = subprocess.run(["mandoc", "-T", "utf8", page], capture_output=True, check=True)
    text = re.sub(".\x08", "", shown.stdout.decode())
    module = make_cli()
    for name in module.COMMANDS:
        assert f"sela {name}" in text
        for option in module.GROUP.commands[name].params:
            assert all(opt in text for opt in option.opts if opt.startswith("-"))


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_targets_of_the_readme_exist_and_the_demo_is_the_main_job() -> None:
    wanted = set(re.findall(r"make ([a-z-]+)", README))
    assert {"demo", "test", "check"} <= wanted <= targets()
    assert "sela run --data digits --out runs/demo" in (ROOT / "Makefile").read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's reader has: photos, and scores of several kinds."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "photos").mkdir()
    source = open_source("digits")
    for number in range(128):
        Image.fromarray(source.image(number)).save(folder / "photos" / f"{number}.png")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60, 5))
    np.save(folder / "scores.npy", scores)
    np.save(folder / "probabilities.npy", np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
    with h5py.File(folder / "features.h5", "w") as file:
        file["similarity"] = scores
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("block", shell_blocks(README)[1:])
def test_the_commands_of_the_readme_run(block: str, world: Path) -> None:
    """Each block as it stands, in one folder; the package is installed already."""
    lines = [line for line in block.splitlines() if not line.startswith("pip install")]
    lines = [f"{line} --dry-run" if line.startswith(HEAVY) else line for line in lines]
    tools = Path(sys.executable).parent
    assert shutil.which("sela", path=tools), "install the package first: make test does"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(lines)],
        cwd=world,
        env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr.decode()
    if "--out runs/demo" in block:
        assert (world / "runs" / "demo" / "labels.h5").exists()


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_the_cifar_example_is_understood(on: str, world: Path, tmp_path: Path) -> None:
    """By its plan: training takes an hour."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "cifar10.sh"), "--dry-run"],
        env={**os.environ, "PATH": tools, "ON": on, "DATA": "photos", "OUT": str(tmp_path / "run")},
        cwd=world,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resnet18 at 32 pixels" in done.stdout and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_cifar_example_probes_in_the_end(world: Path, tmp_path: Path) -> None:
    """In little: what is given to the script goes to `sela run`, over its recipe."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for name in "ab":
        shutil.copytree(world / "photos", tmp_path / "data" / name)
    data = dict.fromkeys(("DATA", "TEST"), str(tmp_path / "data"))
    given = "--image-size 16 --heads 2 --epochs 1 --opts 1 --lr 0.001 --device cpu"
    done = subprocess.run(
        ["bash", str(ROOT / "examples" / "cifar10.sh"), *given.split()],
        env={**os.environ, "PATH": tools, **data, "OUT": str(tmp_path / "run")},
        cwd=world,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Nothing is trained again.
    trained = (tmp_path / "run" / "checkpoint.h5").stat().st_mtime_ns
    again = subprocess.run(
        ["bash", str(ROOT / "examples" / "cifar10.sh")],
        env={**os.environ, "PATH": tools, **data, "OUT": str(tmp_path / "run")},
        check=False,
    )
    assert again.returncode == 0
    assert (tmp_path / "run" / "checkpoint.h5").stat().st_mtime_ns == trained
    rows = formats.read_probe(str(tmp_path / "run" / "test.h5"))
    assert {row["layer"] for row in rows} == {"features", "layer4"}


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few filters: the tutorial's test is about its commands."""
    monkeypatch.setitem(networks._FILTERS, "alexnet-small", (4, 6, 6, 6, 4))


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(
    world: Path, small_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn, in this process: they build on one another, and not on the README's."""
    shutil.copytree(world / "photos", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sela_cli.interrupt.listen", lambda: None)
    lines = "".join(shell_blocks((ROOT / "docs" / "tutorial.md").read_text())).splitlines()
    verbs = {line.split()[1] for line in lines}
    assert {"run", "report", "probe", "export-labels", "label", "retrain", "metrics"} <= verbs
    for line in lines:
        program, verb, *arguments = shlex.split(line)
        assert program == "sela"
        bounds = "" if "--dry-run" in arguments else BOUNDS.get(verb, "")
        monkeypatch.setattr(sys, "argv", [program, verb, *arguments, *bounds.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, line
    made = "report.html figures/loss.png labels.csv labels.npy logits.npy trace.png hand-network.h5"
    assert all((tmp_path / name).stat().st_size > 0 for name in made.split())


def test_the_readme_has_every_exit_code() -> None:
    (line,) = re.findall(r"Exit codes: .*?\.\n", README, re.DOTALL)
    codes = {int(code) for code in re.findall(r"\d+", line)}
    assert codes == {int(code) for code in re.findall(r"\d+", cli.EXIT_CODES)}
    assert {kind.exit_code for kind in errors.SelaError.__subclasses__()} < codes


def test_what_becomes_of_a_stopped_command_is_told_of_all_that_take_long() -> None:
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "reliability.md").read_text(), re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(table))) == {*job.VERBS, "pack", "finetune"}


def test_every_augmentation_is_described() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in AUGMENTATIONS if f"`{name}`" not in text] == []


def test_the_citation_is_that_of_the_paper() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    title = re.search(r'^  title: "(.*)"$', citation, re.MULTILINE)
    method = (ROOT / "docs" / "method.md").read_text()
    assert title and title[1] in " ".join(method.split())


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, check=True)
    listed = {line.split()[0] for line in done.stdout.decode().splitlines()}
    assert listed == targets()
