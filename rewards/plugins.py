"""Rewards that live outside this package: by entry point, by `package.module:Name`, by `path/to/file.py:Name`.

What goes wrong on the way is a RewardError that says which file, line or name it was.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.protocol import RewardError, describe

GROUP = "sidrl.rewards"


def installed() -> dict[str, list[EntryPoint]]:
    """Entry points of installed packages by name; several of one name are for the caller to refuse."""
    found: dict[str, list[EntryPoint]] = {}
    for point in sorted(set(entry_points(group=GROUP)), key=lambda point: (point.name, point.value)):
        found.setdefault(point.name, []).append(point)
    return found


def origin(point: EntryPoint) -> str:
    """An entry point in words: what it points to and the package that brings it."""
    package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return f"{point.value}{package}"


def load(place: str) -> Any:
    """The object at `package.module:Name` or `path/to/file.py:Name` (a relative path starts at the working folder).

    Raises:
        RewardError: module or file missing, failing at import, or without that name.
    """
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise RewardError(f"{place!r} must be package.module:Name or path/to/file.py:Name")
    module = _from_file(Path(where)) if where.endswith(".py") or "/" in where else _from_name(where)
    try:
        return getattr(module, name)
    except AttributeError:
        names = [known for known in vars(module) if not known.startswith("_")]
        raise RewardError(f"{where} has no {name!r}{did_you_mean(name, names)}") from None


def did_you_mean(name: str, known: list[str]) -> str:
    """`; did you mean 'a' or 'b'?` for close names, else nothing."""
    close = get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _from_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise RewardError(f"no module {error.name!r} (looked for {name!r} on the Python path)") from error
        raise RewardError(f"importing {name} failed: {describe(error)}") from error
    except Exception as error:
        raise RewardError(f"importing {name} failed: {describe(error)}") from error


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise RewardError(f"no file {path}")
    # Registered under a name of its own, so that dataclasses and pickle find it and two entries share one module.
    name = f"sidrl_reward_file:{path}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewardError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"importing {path} failed: {describe(error)}") from error
    return module
