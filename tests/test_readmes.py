"""What the READMEs tell a reader to run does run.

The first Python block of a package's README is executed as it stands, in an empty folder. Every `make`,
`trainsys` and `python -m` command in a shell block must exist.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import PACKAGES, ROOT

READMES = [ROOT / "README.md", *(ROOT / package / "README.md" for package in PACKAGES)]


def blocks(text: str, *languages: str) -> list[str]:
    """Return the bodies of the fenced blocks in one of the languages, in order."""
    found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def run_first_block(readme: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Execute the first Python block of a README as a script in an empty folder."""
    script = folder / "block.py"
    script.write_text(blocks(readme.read_text(), "python")[0])
    work = folder / "empty"
    work.mkdir()
    return subprocess.run(
        [sys.executable, script],
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def commands(text: str) -> list[list[str]]:
    """Return the commands of the shell blocks as words, without prompt, comment, leading assignments."""
    found = []
    for body in blocks(text, "sh", "bash", "shell", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def fault(words: list[str], make_targets: set[str], subcommands: set[str]) -> str:
    """Return what is wrong with a command of ours, or nothing."""
    line = " ".join(words)
    match words:
        case ["make", *rest]:
            targets = [word for word in rest if "=" not in word and not word.startswith("-")]
            return "".join(f"`{line}`: no such target" for target in targets if target not in make_targets)
        case ["trainsys", subcommand, *_] if not subcommand.startswith("-"):
            return "" if subcommand in subcommands else f"`{line}`: no such command"
        case ["python" | "python3", "-m", module, *_] if module.partition(".")[0] in PACKAGES:
            return "" if _is_runnable(module) else f"`{line}`: no such module"
    return ""


def _is_runnable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module if "." in module else f"{module}.__main__") is not None
    except ModuleNotFoundError:  # of a package above it
        return False


@pytest.fixture(scope="module")
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.fixture(scope="module")
def subcommands() -> set[str]:
    """Ask the command line itself: the first word of each row of its help."""
    done = subprocess.run(
        [sys.executable, "-m", "trainsys", "--help"], check=True, capture_output=True, text=True, timeout=60
    )
    return set(re.findall(r"^[│|\s]+([a-z][a-z-]*)\s{2,}\S", done.stdout, flags=re.MULTILINE))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_first_block_of_a_package_readme_runs(package: str, tmp_path: Path) -> None:
    done = run_first_block(ROOT / package / "README.md", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_commands_of_a_readme_exist(readme: Path, make_targets: set[str], subcommands: set[str]) -> None:
    faults = [fault(words, make_targets, subcommands) for words in commands(readme.read_text())]
    assert not list(filter(None, faults))


def test_the_root_readme_shows_the_two_commands() -> None:
    shown = commands((ROOT / "README.md").read_text())
    assert ["make", "run"] in shown
    assert ["make", "test"] in shown


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("Text\n\n```python\nimport nowhere\n```\n\n```python\nprint('not the first')\n```\n")
    done = run_first_block(readme, tmp_path)
    assert done.returncode != 0
    assert "No module named 'nowhere'" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("make run", ""),
        ('make run ARGS="--steps=50"', ""),
        ("make everything", "no such target"),
        ("trainsys launch tiny", ""),
        ("$ X=1 trainsys fly tiny  # a comment", "no such command"),
        ("python -m offload probe", ""),
        ("python -m offload.bench.nowhere --json x.json", "no such module"),
        ("cd somewhere", ""),
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, message: str) -> None:
    (words,) = commands(f"Text\n```sh\n{line}\n```\n")
    found = fault(words, {"run", "test"}, {"launch"})
    assert found.endswith(message)
    assert bool(found) == bool(message)
