"""`load_world`: a data folder of any known format as one World."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from rollout.catalog import Catalog
from rollout.data import minionerec, native, openonerec
from rollout.data.problems import DataError, Problem
from rollout.types import Record

LOADERS = {"sidrl": native, "minionerec": minionerec, "openonerec": openonerec}


@dataclass(frozen=True, eq=False)
class World:
    """Catalogue and rows of a data folder.

    Attributes:
        catalog: the items.
        splits: rows of train, valid and test, those that the folder has.
        problems: every row that was left out.
        format: name of the format that was read.
    """

    catalog: Catalog
    splits: dict[str, tuple[Record, ...]]
    problems: tuple[Problem, ...]
    format: str


def load_world(path: str | Path, format: str = "auto") -> World:
    """Read a data folder.

    Args:
        path: the folder; for MiniOneRec also the `*.index.json` of one catalogue among several.
        format: sidrl, minionerec, openonerec, or auto, which looks at the files.

    Raises:
        DataError: when the folder or one of its files cannot be read. Bad rows raise nothing, they become
            `World.problems`.
    """
    path = Path(path)
    if format != "auto" and format not in LOADERS:
        raise DataError(f"data.format={format!r} must be one of auto, {', '.join(LOADERS)}")
    _require_exists(path)
    name = detect(path) if format == "auto" else format
    if path.is_file() and name != "minionerec":
        raise DataError(f"{path}: is a file; the format {name} is a folder")
    loaded = LOADERS[name].load(path)
    return World(loaded.catalog, loaded.splits, loaded.problems, name)


def detect(path: str | Path) -> str:
    """The format of a folder, by its files. DataError when no format or more than one fits."""
    path = Path(path)
    _require_exists(path)
    if path.is_file():
        if path.name.endswith(".index.json"):
            return "minionerec"
        raise DataError(f"{path}: is a file; give the folder of the data")
    fits = ["sidrl"] if native.is_native(path) else []
    if minionerec.index_files(path):
        fits.append("minionerec")
    if not fits and openonerec.map_files(path):
        fits.append("openonerec")
    if len(fits) == 1:
        return fits[0]
    seen = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    shown = ", ".join(seen[:12]) + (f" and {len(seen) - 12} more" if len(seen) > 12 else "")
    expected = "\n".join(f"  {name}: {loader.EXPECTS}" for name, loader in LOADERS.items())
    said = f"fits {' and '.join(fits)}; say which with data.format" if fits else "has no known format"
    raise DataError(f"{path}: {said}. It holds: {shown or 'nothing'}. Expected is one of\n{expected}")


def _require_exists(path: Path) -> None:
    if path.exists():
        return
    parent = next(folder for folder in path.parents if folder.is_dir())
    wanted = path.relative_to(parent).parts[0]
    close = difflib.get_close_matches(wanted, [entry.name for entry in parent.iterdir()], n=3, cutoff=0.5)
    meant = " or ".join(str(parent / name) for name in close)
    hint = f"did you mean {meant}?" if close else f"{parent} has no {wanted}"
    raise DataError(f"{path}: does not exist; {hint}")
