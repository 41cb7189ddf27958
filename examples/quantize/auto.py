"""Sids wherever a pipeline needs them: read where they are, made where they are not.

Axes: N items, D dimensions, L levels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from examples.quantize.features import Features
from examples.quantize.quality import draw, quality
from examples.quantize.sids import FILE, QuantizeSettings, SemanticIds, prepared, quantise
from rl.cache import write_json
from rl.progress import Progress
from rollout.data.problems import DataError

FORBID = "SIDRL_NO_SID_GENERATION"
"""Environment variable: set to 1, missing Sids are an error instead of being made (production)."""

SHOWN = 10
"""Rows left out that are told one by one."""


def ensure_sids(
    folder: Path,
    features: Callable[[], Features | None],
    item_ids: Sequence[str],
    settings: QuantizeSettings,
    progress: Progress,
    *,
    force: bool = False,
) -> SemanticIds:
    """The Sids of a catalogue: read where they are, made and saved with their report where they are not.

    Args:
        folder: where they are kept.
        features: the embeddings, asked for only if they are needed; None where there are none.
        item_ids: the catalogue. An item without an embedding is quantised as the mean of all; without any embeddings
            items are numbered (`default_sids`). Both are told as a warning.
        settings: how they are made.
        progress: is told what happens.
        force: make them anew.

    Raises:
        DataError: when they are damaged, lack items, or are missing while `SIDRL_NO_SID_GENERATION=1`.
        ValueError: when there are fewer items than codes of a level.
    """
    if (folder / FILE).exists() and not force:
        return _found(folder, item_ids, settings, progress)
    if os.environ.get(FORBID) == "1":
        raise DataError(f"{folder / FILE} is not there, and {FORBID}=1 forbids making it")
    found = features()
    if found is None and not item_ids:
        raise DataError(f"{folder}: neither Sids, nor embeddings, nor a list of items to number")
    (folder / FILE).unlink(missing_ok=True)
    if found is None:
        progress.say(f"warning: no embeddings: {len(item_ids):,} items are numbered, so that Sids carry no meaning")
        sids = default_sids(item_ids, settings)
    else:
        for problem in found.problems[:SHOWN]:
            progress.say(f"left out: {problem}")
        if len(found.problems) > SHOWN:
            progress.say(f"left out: {len(found.problems) - SHOWN:,} more rows")
        whole = completed(found, item_ids, progress.say)
        quantised = quantise(whole, settings, lambda *now: progress.update(*now))
        sids, figures = quantised.sids, quality(quantised, prepared(whole, settings), settings.seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "quality.json", figures)
        draw(figures, sids.sizes, folder / "report.png")
    sids.save(folder)
    progress.say(f"made Sids for {len(sids.item_ids):,} items in {sids.made.get('seconds', 0):g} s, saved in {folder}")
    return sids


def _found(folder: Path, item_ids: Sequence[str], settings: QuantizeSettings, progress: Progress) -> SemanticIds:
    start, sids = time.perf_counter(), SemanticIds.load(folder)
    known = set(sids.item_ids)
    lacking = [item for item in item_ids if item not in known]
    if lacking:
        raise DataError(
            f"{folder / FILE}: {len(lacking):,} items have no Sid, such as {lacking[:3]}; make them anew (force)"
        )
    if sids.made.get("settings") != asdict(settings):
        progress.say(f"warning: the Sids in {folder} were made with other settings; force makes them anew")
    progress.say(f"found {len(sids.item_ids):,} Sids in {folder} ({time.perf_counter() - start:.1f} s)")
    return sids


def default_sids(item_ids: Sequence[str], settings: QuantizeSettings) -> SemanticIds:
    """Sids without a meaning, for a catalogue without features: items are numbered, and the number's digits are codes.

    Every item gets a Sid of its own, and codes of a level are used evenly; but what is alike is not near.

    Raises:
        ValueError: when there are more items than Sids.
    """
    sizes = (settings.codes,) * settings.levels
    if len(item_ids) > settings.codes**settings.levels:
        raise ValueError(f"{len(item_ids)} items, and {settings.levels} levels of {settings.codes} codes are fewer")
    codes_NL = np.stack(np.unravel_index(np.arange(len(item_ids)), sizes[::-1]), axis=1)[:, ::-1]
    return SemanticIds(tuple(item_ids), codes_NL, sizes, {"settings": asdict(settings), "defaults": True})


def completed(features: Features, item_ids: Sequence[str], say: Callable[[str], None]) -> Features:
    """Embeddings of the whole catalogue; items without one get the mean of all."""
    known = set(features.item_ids)
    lacking = [item for item in dict.fromkeys(item_ids) if item not in known]
    if not lacking:
        return features
    say(f"warning: {len(lacking):,} items have no embedding and take the mean of all, such as {lacking[:3]}")
    mean_D = features.vectors_ND.mean(axis=0, keepdims=True)
    vectors_ND = np.concatenate([features.vectors_ND, mean_D.repeat(len(lacking), axis=0)])
    return Features((*features.item_ids, *lacking), vectors_ND, features.problems)
