"""Where things that are made once are kept, and how they are never seen half made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """`$SIDRL_CACHE`, or `~/.cache/sidrl`."""
    return Path(os.environ.get("SIDRL_CACHE") or "~/.cache/sidrl").expanduser()


def make_once(name: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """The cached folder `name`; when it is not there, `make` fills an empty folder that is then renamed into place.

    Returns:
        the folder, and whether it was made now. A run that dies half-way leaves nothing under `name`.
    """
    target = cache_root() / name
    if target.is_dir():
        return target, False
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        make(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:  # another process made it in the meantime
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target, True


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(data, indent=2) + "\n")
    scratch.replace(path)


def files_fingerprint(folder: Path) -> str:
    """A digest of the names and contents of every file under a folder."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}:{path.stat().st_size};".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
