"""Rows that restrict what may be recommended: their candidates scored exactly, each by its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from rl.batch import BatchScorer
from rollout.decode import Decoder
from rollout.types import Rollout, RolloutGroup, Sample


def item_groups(
    samples: Sequence[Sample], sids_of: Sequence[Sequence[int]], decoder: Decoder, policy_version: int
) -> list[RolloutGroup]:
    """Groups of one item a rollout, to be scored; shorter ones are filled up with their first item.

    Scores are log-probabilities under the whole trie, so the samples are without their restrictions. A candidate list
    that names some items of a Sid only restricts that Sid's cluster to them.
    """
    longest = max(map(len, sids_of))
    groups = []
    for sample, sids in zip(samples, sids_of, strict=True):
        items = [_item(sample, int(sid), decoder, policy_version) for sid in sids]
        whole = replace(sample, record=replace(sample.record, candidates=None, excluded=()))
        groups.append(RolloutGroup(whole, (*items, *items[:1] * (longest - len(items)))))
    return groups


def candidate_sids(sample: Sample, decoder: Decoder) -> list[int]:
    """The distinct sids of a sample's candidates that it may be recommended, ascending."""
    left = [item for item in sample.record.candidates or () if item not in sample.record.excluded]
    return np.unique(decoder.catalog.sid_index_N[left]).tolist()


def rank_candidates(
    model: torch.nn.Module, scorer: BatchScorer, samples: Sequence[Sample], batch_prompts: int
) -> Iterator[list[int]]:
    """Each sample's candidates as sid indices, likeliest first by their exact log-probabilities."""
    for start in range(0, len(samples), batch_prompts):
        some = samples[start : start + batch_prompts]
        sids_of = [candidate_sids(sample, scorer.task.decoder) for sample in some]
        groups = item_groups(some, sids_of, scorer.task.decoder, 0)
        logps = scorer.logps(model, scorer.batch(groups), len(groups[0])).sum(dim=1).view(len(some), -1).cpu().numpy()
        for sids, row in zip(sids_of, logps, strict=True):
            yield [sids[place] for place in np.argsort(-row[: len(sids)], kind="stable")]


def _item(sample: Sample, sid: int, decoder: Decoder, policy_version: int) -> Rollout:
    path, cluster = decoder.path_of(sid), decoder.items(sample.record, sid)
    return Rollout(path, (0.0,) * len(path), (True,) * len(path), (sid,), (cluster,), policy_version, "item")
