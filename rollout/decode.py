"""From token ids back to items: what an engine's tokens mean in the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rollout.catalog import Catalog
from rollout.sid import SidVocab
from rollout.trie import SidTrie
from rollout.types import Rollout, RolloutGroup, Sample


@dataclass(frozen=True)
class Decoder:
    """A catalogue and its trie over one tokenizer's ids; leaves of the trie are the catalogue's sid indices."""

    catalog: Catalog
    trie: SidTrie

    @classmethod
    def build(cls, catalog: Catalog, vocab: SidVocab, vocab_size: int) -> Decoder:
        """The trie of every distinct Sid of the catalogue. Raises ValueError when a token id is >= vocab_size."""
        return cls(catalog, SidTrie.from_paths(vocab.paths(catalog.sids_SL), vocab_size))

    @cached_property
    def paths(self) -> np.ndarray:
        """Token ids of every leaf in order, int64 [leaves, L]."""
        return self.trie.paths()

    @cached_property
    def path_of_sid(self) -> np.ndarray:
        """Token ids of every Sid of the catalogue, int64 [S, L]."""
        by_sid = np.empty_like(self.paths)
        by_sid[self.trie.row_of_leaf] = self.paths
        return by_sid

    def groups_of_leaves(
        self,
        samples: Sequence[Sample],
        leaves_BW: np.ndarray,
        logps_BWL: np.ndarray,
        inclusion_BW: np.ndarray | None = None,
        *,
        policy_version: int,
    ) -> list[RolloutGroup]:
        """Groups from what a search found: leaf nodes, -1 where a prompt has fewer."""
        first_leaf = self.trie.level_start[-2]
        groups = []
        for row, sample in enumerate(samples):
            there = leaves_BW[row] >= 0
            tokens_WL = self.paths[leaves_BW[row][there] - first_leaf]
            inclusion = None if inclusion_BW is None else inclusion_BW[row][there]
            groups.append(self.group(sample, tokens_WL, logps_BWL[row][there], True, policy_version, inclusion))
        return groups

    def group(
        self,
        sample: Sample,
        tokens_GL: np.ndarray,
        logps_GL: np.ndarray,
        constrained: bool,
        policy_version: int,
        inclusion_G: np.ndarray | None = None,
    ) -> RolloutGroup:
        """One group from the tokens [G, L], log-probabilities [G, L] and, of a draw without replacement, inclusions."""
        if inclusion_G is None:
            inclusion_G = np.zeros(len(tokens_GL))
        sids_G = self.trie.rows(self.trie.walk(tokens_GL)[:, -1])
        rollouts = tuple(
            Rollout(
                token_ids=tuple(tokens),
                logps_sampler=tuple(logps),
                on_trie=(constrained,) * len(tokens),
                sids=(sid,) if sid >= 0 else (),
                items=(self.catalog.items_of_sid(sid),) if sid >= 0 else (),
                policy_version=policy_version,
                finish_reason="item" if sid >= 0 else "illegal",
                logp_inclusion=inclusion,
            )
            for tokens, logps, sid, inclusion in zip(
                tokens_GL.tolist(), logps_GL.tolist(), sids_G.tolist(), inclusion_G.tolist(), strict=True
            )
        )
        return RolloutGroup(sample, rollouts)
