"""A catalogue of eight items and a short way to write groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rollout.catalog import Catalog
from rollout.sid import letters_format
from rollout.types import Record, Rollout, RolloutGroup, Sample

# Items 0 to 7; items 4 and 5 share sid 4. Sid index = row of CODES without the repeat.
CODES = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 0), (2, 0, 0), (2, 2, 2)]
CATEGORIES = ["a", "a", "a", "b", "b", "c", "c", ""]
POPULARITY = [0, 1, 3, 7, 0, 15, 1, 0]
EMBEDDINGS = [[1, 0], [2, 0], [0, 1], [-1, 0], [0, 3], [1, 0], [0, 0], [1, 1]]

MakeGroup = Callable[..., RolloutGroup]


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Seven sids, of which sid 4 holds items 4 and 5."""
    return Catalog.build(
        letters_format((3, 3, 3)),
        [f"item{i}" for i in range(8)],
        np.array(CODES),
        categories=CATEGORIES,
        popularity_N=np.array(POPULARITY),
        embeddings_ND=np.array(EMBEDDINGS),
    )


@pytest.fixture(scope="session")
def make_group(catalog: Catalog) -> MakeGroup:
    """Groups from what each rollout wrote: a sid, some sids, or None for illegal. Without logps: likeliest first."""

    def make(
        written: Sequence[int | tuple[int, ...] | None],
        targets: Sequence[int],
        gains: Sequence[float] | None = None,
        logps: Sequence[float] | None = None,
        history: Sequence[int] = (),
    ) -> RolloutGroup:
        record = Record("train.csv:17", "u", tuple(history), tuple(targets), tuple(gains or [1.0] * len(targets)))
        rollouts = []
        for place, one in enumerate(written):
            sids = () if one is None else (one,) if isinstance(one, int) else one
            items = tuple(catalog.items_of_sid(sid) for sid in sids)
            logp = -float(place) if logps is None else logps[place]
            rollouts.append(Rollout((1,), (logp,), (True,), sids, items, 3, "item" if sids else "illegal"))
        return RolloutGroup(Sample(record, (5,)), tuple(rollouts))

    return make
