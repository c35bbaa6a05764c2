"""The import walls, read from the source: which module may know of which."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sela_cli

ROOT = Path(sela_cli.__file__).parent
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in ROOT.rglob("*.py")
}
COMMANDS = [name for name in TREES if name.startswith("commands.")]
SHELL = {"cli", "options", "terminal", "__main__", *COMMANDS}
CORE = sorted(set(TREES) - SHELL)
QUICK = ["cli", "options", *COMMANDS]


def imported(tree: ast.AST, module_level: bool = False) -> Iterator[str]:
    """Dotted names of what is imported; of `from a import b` it is `a.b`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imported(node, module_level)


def packages(name: str) -> set[str]:
    return {item.split(".")[0] for item in imported(TREES[name])}


def siblings(name: str) -> set[str]:
    """`a` or `a.b` for everything imported from sela_cli."""
    parts = (item.split(".") for item in imported(TREES[name]))
    return {".".join(part[1:]) for part in parts if part[0] == "sela_cli"}


def calls(name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call))


def called(name: str) -> set[str]:
    return {ast.unparse(call.func) for call in calls(name)}


def test_the_walls_are_read_from_all_modules() -> None:
    assert {"cli", "formats", "commands.embed", "images.sources", "__init__"} <= set(TREES)
    assert set(imported(ast.parse("def f():\n  import a\nfrom b import c"))) == {"a", "b.c"}
    assert set(imported(ast.parse("def f():\n  import a\nimport d"), True)) == {"d"}


@pytest.mark.parametrize("name", QUICK)
def test_help_is_quick_because_nothing_heavy_is_imported_at_module_level(name: str) -> None:
    ours = ("sela_cli.options.", "sela_cli.errors.", "sela_cli.__version__")
    if name == "cli":
        ours += ("sela_cli.commands.",)
    for item in imported(TREES[name], module_level=True):
        package = item.split(".")[0]
        assert package in sys.stdlib_module_names or package == "typer" or item.startswith(ours)


@pytest.mark.parametrize("name", ["labels", "logits", "training", "loop", "probes"])
def test_a_stage_starts_without_what_only_some_of_its_options_need(name: str) -> None:
    code = f"import sys, sela_cli.{name}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = set(run.stdout.split())
    assert f"sela_cli.{name}" in modules
    assert not modules & {"sklearn", "scipy.stats", "torchvision", "matplotlib"}


@pytest.mark.parametrize("name", ["errors", "schedule", "interrupt", "presets"])
def test_imports_only_the_standard_library(name: str) -> None:
    assert packages(name) <= sys.stdlib_module_names


@pytest.mark.parametrize("name", CORE)
def test_core_does_not_know_how_it_is_shown(name: str) -> None:
    assert not packages(name) & {"typer", "click", "rich"}
    shown = {"cli", "options", "terminal", "commands"}
    assert not {item.split(".")[0] for item in siblings(name)} & shown
    assert "print" not in called(name)


@pytest.mark.parametrize(
    "name",
    [
        *("sinkhorn", "newton", "lbfgs", "curvature"),
        *("semidual", "plans", "dense", "marginals", "assignment", "tiles"),
    ],
)
def test_solvers_are_pure(name: str) -> None:
    assert not packages(name) & {"h5py", "typer", "rich", "pathlib", "io", "os", "shutil"}
    of_files = {"outputs", "envelope", "formats", "scores", "score_rows", "shares", "labels"}
    assert not {item.split(".")[0] for item in siblings(name)} & of_files
    assert not {func.rsplit(".", 1)[-1] for func in called(name)} & {"open", "load", "save"}


@pytest.mark.parametrize("name", ["outputs", "envelope", "formats", "metrics", "images.sources"])
def test_files_are_read_without_torch(name: str) -> None:
    assert "torch" not in packages(name)
    # Nor through another module of ours.
    assert not {item.split(".")[0] for item in siblings(name)} & {"networks", "training", "logits"}


@pytest.mark.parametrize("name", ["logits", "training", "probes"])
def test_stages_meet_in_files_only(name: str) -> None:
    others = {"logits", "training", "probes", "labels", "loop", "run_settings"} - {name}
    allowed = {"logits.forward"} if name == "probes" else set()
    met = {item for item in siblings(name) if item.split(".")[0] in others}
    assert met <= allowed


@pytest.mark.parametrize("name", sorted(TREES))
def test_nothing_unpickles(name: str) -> None:
    assert not packages(name) & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    assert not called(name) & {"eval", "exec", "compile"}
    for call in calls(name):
        if ast.unparse(call.func) == "torch.load":
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("weights_only") == "True"
        if ast.unparse(call.func) in ("np.load", "numpy.load"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert given.get("allow_pickle") == "False"


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("matplotlib", {"report.figures", "report.page"}),
        ("pyarrow", {"export_tables"}),
        ("tensorboard", set()),
        ("triton", {"fused"}),
    ],
)
def test_optional_packages_are_asked_for_in_one_place(package: str, modules: set[str]) -> None:
    assert {name for name in TREES if package in packages(name)} == modules


def test_init_imports_nothing() -> None:
    assert list(imported(TREES["__init__"])) == []
