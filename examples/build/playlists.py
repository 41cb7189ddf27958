"""Playlists: songs that share a Sid are a concept, and a list is a sequence of concepts.

A playlist's title is the prompt and its songs are the targets. Songs of one cluster are exchangeable: what is
recommended is a cluster, and each request draws a song of it. `expand` draws, `set_metrics` judges clusters by all of
their songs.

Input: JSON lines with `title` and `songs` (song ids); Sids of the songs from `examples.quantize`, collisions kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.build.rows import LeftOut, sid_format, write_data
from examples.quantize.sids import SemanticIds
from rollout.catalog import Catalog
from rollout.data.files import read_lines
from rollout.data.problems import DataError
from rollout.types import Record

TASK = "playlist"


def build_playlists(
    file: Path, sids: SemanticIds, out: Path, *, style: str = "letters", seed: int = 0
) -> tuple[dict[str, int], LeftOut]:
    """A data folder with a row for each playlist, 80 % to train; returns counts, and what was left out.

    Raises:
        DataError: when the file cannot be read, or no playlist is left.
    """
    left = LeftOut()
    catalog = Catalog.build(sid_format(sids.sizes, style), sids.item_ids, sids.codes_NL)
    records = []
    for number, line in read_lines(file):
        try:
            row = json.loads(line)
            title, songs = str(row["title"]).strip(), [str(song) for song in row["songs"]]
        except (ValueError, KeyError, TypeError) as error:
            left.add(file.name, number, "wrong-type", f"a playlist needs a title and songs: {error!r}")
            continue
        known = [song for song in dict.fromkeys(songs) if song in catalog.index_of]
        for song in set(songs) - set(known):
            left.add(file.name, number, "unknown-song", f"{song} has no Sid")
        if not title or not known:
            left.add(file.name, number, "empty-target", "no title, or no song that has a Sid")
            continue
        targets = tuple(catalog.index_of[song] for song in known)
        gains = (1.0,) * len(targets)
        records.append(Record(f"{file.name}:{number}", "", (), targets, gains, f"Playlist: {title}\n", TASK))
    if not records:
        raise DataError(f"{file}: no playlist is left; left out were {dict(left.counts) or 'none'}")
    order = np.random.default_rng(seed).permutation(len(records))
    parts = np.split(order, (round(0.8 * len(order)), round(0.9 * len(order))))
    splits = {
        name: tuple(records[row] for row in part) for name, part in zip(("train", "valid", "test"), parts, strict=True)
    }
    write_data(catalog, splits, out)
    clusters = sids.clusters
    found = {"songs": len(catalog), "concepts": len(clusters), "songs of the largest": int(clusters[0])}
    return found | {name: len(some) for name, some in splits.items()}, left


def expand(catalog: Catalog, sids: Sequence[int], seed: int) -> list[int]:
    """One song for each Sid of a list, drawn from its cluster, none twice while the cluster has another.

    Args:
        catalog: the songs.
        sids: indices of Sids, as rollouts have them; a cluster may stand several times.
        seed: another one gives another list.
    """
    rng = np.random.default_rng(seed)
    rest: dict[int, list[int]] = {}
    songs = []
    for sid in sids:
        if not rest.get(sid):
            rest[sid] = rng.permutation(catalog.items_of_sid(sid)).tolist()
        songs.append(rest[sid].pop())
    return songs


def set_metrics(catalog: Catalog, sids: Sequence[int], targets: Sequence[int]) -> dict[str, float]:
    """Precision, recall and F1 of all songs of the predicted clusters against a playlist's songs."""
    predicted = {song for sid in set(sids) for song in catalog.items_of_sid(sid)}
    hits = len(predicted & set(targets))
    precision, recall = hits / max(len(predicted), 1), hits / max(len(set(targets)), 1)
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / both if both else 0.0}
