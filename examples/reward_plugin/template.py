"""Start here: copy this file, rename the class, change `__call__`.

A reward sees one whole group: `group.sample.record` (history, targets, gains, user, task, candidates) and
`group.rollouts` (per rollout: `legal`, `sids`, `items`, `token_ids`, `logp`). Items are rows of the catalogue
(`catalog.titles[item]`, `categories`, `popularity_N`, `embeddings_ND`, `item(i)`). Types are in `rollout/types.py`.
"""

from rewards.protocol import RewardResult
from rollout.catalog import Catalog
from rollout.types import RolloutGroup


class Template:
    """First line: what it pays; `python -m rewards` shows it.

    Say here the formula, where it comes from, and what happens at the edges: illegal rollouts, sids that several items
    share, a group of one.

    Args:
        illegal: Value of an illegal rollout. Declare it: nothing is filled in for you.
    """

    def __init__(self, illegal: float = 0.0) -> None:
        """Params of the configuration arrive here, once. Load models and tables here, not at import."""
        self.illegal = illegal

    def __call__(self, group: RolloutGroup, catalog: Catalog) -> RewardResult:
        """Exactly one finite number per rollout, in the order of `group.rollouts`."""
        place_of = {sid: place for place, sid in enumerate(group.ranking(), start=1)}  # likeliest first
        places = [place_of[rollout.sids[0]] if rollout.legal else 0 for rollout in group.rollouts]
        values = [1 / place if place else self.illegal for place in places]
        # Parts are logged next to the reward and do not count. Without parts, return the list of values alone.
        return RewardResult(values, parts={"place": places})
