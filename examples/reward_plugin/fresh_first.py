"""A reward in ten lines: a hit pays more when its category is new to the user."""

from rollout.catalog import Catalog
from rollout.types import RolloutGroup


def fresh_first(group: RolloutGroup, catalog: Catalog, *, bonus: float = 0.5) -> list[float]:
    """A hit is worth 1, and `bonus` more when the user's history has no item of its category."""
    known = {catalog.categories[item] for item in group.sample.record.history}

    def worth(item: int) -> float:
        return 1 + bonus * (catalog.categories[item] not in known) if item in group.sample.targets else 0.0

    # Items that share a sid are a fair draw: the mean over them. An illegal rollout has none and gets 0.
    return [sum(sum(map(worth, items)) / len(items) for items in rollout.items) for rollout in group.rollouts]
