"""What pyproject.toml promises about versions is what is tested."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from sela_cli.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# They check the sources, or measure; the package works without them.
TOOLS = {"mypy", "ruff", "POT", "ott-jax", "sela"}


def bounds() -> dict[str, Version]:
    """Lower bound of each requirement, extras included."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found: dict[str, Version] = {}
    for requirement in (Requirement(line) for group in groups for line in group):
        if requirement.name not in TOOLS:
            (lowest,) = (s.version for s in requirement.specifier if s.operator == ">=")
            assert found.setdefault(requirement.name, Version(lowest)) == Version(lowest)
    return found


def test_lowest_versions_are_the_bounds() -> None:
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pins.items()} == bounds()


def test_the_docker_image_has_the_compiler_that_triton_and_torch_call() -> None:
    """g++ brings gcc."""
    installed = re.search(r"apt-get install (.*)", (ROOT / "Dockerfile").read_text())
    assert installed and "g++" in installed[1].split()


def imported() -> set[str]:
    """Top-level modules that our code imports anywhere, but for its own."""
    found: set[str] = set()
    for path in (ROOT / "sela_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    return found - {"sela_cli"}


def test_a_system_that_lacks_what_is_imported_is_not_promised() -> None:
    assert {"fcntl", "resource"} <= imported()
    systems = [line for line in PROJECT["classifiers"] if line.startswith("Operating System")]
    assert systems == ["Operating System :: POSIX"]


def test_what_is_imported_is_required() -> None:
    """Pillow, for instance, which torchvision would bring; and nothing else is."""
    # torch brings Triton where there is a GPU for it.
    others = {"triton"}.union(sys.stdlib_module_names, *EXTRAS.values())
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    required = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert {names.get(name, name) for name in imported() - others} == required
