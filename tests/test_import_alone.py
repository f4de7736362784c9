"""The wheel carries what it must, and each leaf works from it with everything else out of reach."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.sources import PACKAGES, ROOT

BASE = frozenset({"fsspec", "pyarrow", "xxhash"})
"""What the wheel depends on besides torch, which every leaf has, and numpy."""
EXTRAS = frozenset({"deepspeed", "psutil", "pydantic", "ray", "rich", "typer", "wandb"}) | frozenset(
    {"safetensors", "tokenizers", "transformers"}
)
"""What no leaf may need."""
ALONE = {
    "checkpoint": frozenset({"pyarrow", "fsspec", "xxhash"}),
    "parallel": frozenset[str](),
    "offload": frozenset[str](),
    "faulttol": frozenset({"pyarrow"}),
    "launch": frozenset({"faulttol"}),
}
"""Package -> what it may have besides torch to import every one of its modules."""

_PROGRAM = '''
"""Import every module of a package with other modules unimportable; fail if one got in anyhow."""
import importlib, importlib.abc, os, pkgutil, sys

package, blocked = sys.argv[1], set(sys.argv[2].split(","))


class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is blocked: not a dependency of {package}", name=name)


sys.meta_path.insert(0, Block())
root = importlib.import_module(package)
print(os.path.dirname(root.__file__))
for module in pkgutil.walk_packages(root.__path__, package + "."):
    importlib.import_module(module.name)
leaked = blocked & {name.partition(".")[0] for name in sys.modules}
sys.exit(f"leaked: {leaked}" if leaked else 0)
'''


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the build backend of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("trainsys-*-py3-none-any.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into an empty folder."""
    folder = tmp_path_factory.mktemp("installed")
    _run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, wheel)
    return folder


def _run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, env=os.environ | environment
    )


def _import_alone(package: str, folder: Path, cwd: Path, may_have: frozenset[str]) -> subprocess.CompletedProcess[str]:
    """Import `package` from `folder` in a bare process that stands in the empty `cwd`."""
    blocked = (BASE | EXTRAS | set(PACKAGES) | {"tests"}) - {package} - may_have
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, package, ",".join(sorted(blocked))],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("module", [*PACKAGES, "trainsys.cli", "trainsys.session", "trainsys.submission"])
def test_a_recipe_is_read_and_its_ranks_are_started_without_torch(module: str) -> None:
    """Torch takes seconds of CPU to import: not before a mistake in a recipe is told, nor before ranks are started."""
    program = f"import sys, {module}; print(*{{*sys.modules}} & {{'torch', 'numpy', 'pyarrow', 'ray'}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", ["checkpoint", "offload"])
def test_a_package_that_imports_late_says_what_it_has(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


@pytest.mark.parametrize("package", ALONE)
def test_a_leaf_imports_alone_from_the_wheel(package: str, installed: Path, tmp_path: Path) -> None:
    done = _import_alone(package, installed, tmp_path, ALONE[package])
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == installed / package


def test_a_leaf_that_needs_a_sibling_does_not_import_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/__init__.py").touch()
    (tmp_path / "checkpoint/deep.py").write_text("import parallel")
    done = _import_alone("checkpoint", tmp_path, tmp_path, frozenset())
    assert done.returncode != 0
    assert "parallel is blocked: not a dependency of checkpoint" in done.stderr


def test_the_wheel_carries_the_packages_their_types_and_the_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    recipes = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainsys/recipes").glob("*.toml")}
    assert recipes
    assert recipes <= names
    modules = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_wheel_offers_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        assert b"trainsys = trainsys.__main__:main" in archive.read(name)
