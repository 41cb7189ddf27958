"""The built-in demo world: a small book shop whose readers follow series, so that there is something to learn.

Every book belongs to a genre (first code), a shelf of that genre (second code) and stands somewhere on it (third code).
A shelf is one series, read in an order of places that each genre has of its own. Readers mostly take the next book of
the series, sometimes the book on another shelf that this one recommends, and sometimes something popular. So the shelf
is soon learned, the order takes longer: what a short warm-up leaves to RL. A few books share a Sid, as in real
catalogues.
"""

from __future__ import annotations

import numpy as np

from rollout.catalog import Catalog
from rollout.data.world import World
from rollout.sid import letters_format
from rollout.types import Record

GENRES = ("Crime", "Fantasy", "History", "Romance", "Science", "Travel", "Poetry", "Cooking")
SHELVES, PLACES = 8, 10
NEXT, CROSS = 0.7, 0.15  # probabilities of the next book of the series and of the one it recommends


def demo_world(seed: int = 0, users: int = 2400, valid: int = 400, test: int = 1000) -> World:
    """The world of a seed: about 640 books, and rows of train, valid and test from different readers."""
    rng = np.random.default_rng(seed)
    catalog, successor, recommended, popularity = _shop(rng)
    splits = {}
    for split, count in (("train", users), ("valid", valid), ("test", test)):
        records = []
        for number in range(count):
            walk = _reader(rng, successor, recommended, popularity)
            # Training readers give a row for each of their later books, the others one row.
            ends = range(len(walk) - 3, len(walk)) if split == "train" else [len(walk) - 1]
            records += [
                Record(f"{split}:{number}:{end}", f"{split}-{number}", tuple(walk[:end]), (walk[end],), (1.0,))
                for end in ends
            ]
        splits[split] = tuple(records)
    return World(catalog, splits, (), "sidrl")


def _shop(rng: np.random.Generator) -> tuple[Catalog, np.ndarray, np.ndarray, np.ndarray]:
    codes, titles, categories = [], [], []
    for genre, name in enumerate(GENRES):
        for shelf in range(SHELVES):
            for place in range(PLACES):
                codes.append((genre, shelf, place))
                titles.append(f"{name} {shelf + 1}, volume {place + 1}")
                categories.append(name)
    twins = rng.choice(len(codes), 12, replace=False)  # second editions share their Sid
    codes += [codes[twin] for twin in twins]
    titles += [f"{titles[twin]} (second edition)" for twin in twins]
    categories += [categories[twin] for twin in twins]
    count = len(codes)
    successor = np.arange(count)
    for genre in range(len(GENRES)):
        places = rng.permutation(PLACES)
        for shelf in range(SHELVES):
            series = (genre * SHELVES + shelf) * PLACES + places
            successor[series] = np.roll(series, -1)
    successor[-len(twins) :] = successor[twins]
    recommended = rng.permutation(count)
    popularity = rng.zipf(1.6, count).clip(max=200).astype(float)
    catalog = Catalog.build(
        letters_format((len(GENRES), SHELVES, PLACES)),
        [f"book-{index}" for index in range(count)],
        np.array(codes),
        titles=titles,
        categories=categories,
        popularity_N=popularity,
    )
    return catalog, successor, recommended, popularity / popularity.sum()


def _reader(
    rng: np.random.Generator, successor: np.ndarray, recommended: np.ndarray, popularity: np.ndarray
) -> list[int]:
    walk = [int(rng.choice(len(popularity), p=popularity))]
    for _ in range(int(rng.integers(4, 9))):
        draw = rng.random()
        if draw < NEXT:
            walk.append(int(successor[walk[-1]]))
        elif draw < NEXT + CROSS:
            walk.append(int(recommended[walk[-1]]))
        else:
            walk.append(int(rng.choice(len(popularity), p=popularity)))
    return walk
