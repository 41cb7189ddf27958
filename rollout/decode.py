"""From token ids back to items: what an engine's tokens mean in the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rollout.catalog import Catalog
from rollout.sid import SidVocab
from rollout.trie import SidTrie
from rollout.types import Record, Rollout, RolloutGroup, Sample
from rollout.views import Restriction, Views


@dataclass(frozen=True)
class Decoder:
    """A catalogue and its trie over one tokenizer's ids; leaves of the trie are the catalogue's sid indices.

    Attributes:
        catalog: the items.
        trie: the token paths of their Sids.
        marks: tokens that the format writes between one item and the next.
        sid_tokens: ranges [first, last + 1) of the tokens that write Sids, marks included.
    """

    catalog: Catalog
    trie: SidTrie
    marks: tuple[int, ...] = ()
    sid_tokens: tuple[tuple[int, int], ...] = ()

    @classmethod
    def build(cls, catalog: Catalog, vocab: SidVocab, vocab_size: int) -> Decoder:
        """The trie of every distinct Sid of the catalogue. Raises ValueError when a token id is >= vocab_size."""
        trie = SidTrie.from_paths(vocab.paths(catalog.sids_SL), vocab_size)
        tokens = np.unique(np.concatenate([*vocab.level_ids, (*vocab.begin_ids, *vocab.end_ids)]).astype(np.int64))
        return cls(catalog, trie, (*vocab.end_ids, *vocab.begin_ids), ranges_of(tokens))

    @property
    def paths(self) -> np.ndarray:
        """Token ids of every leaf in order, int64 [leaves, L]."""
        return self.trie.paths()

    def completion_tokens(self, items: int) -> int:
        """Tokens of a completion of so many items, the marks between them included."""
        return items * self.trie.depth + (items - 1) * len(self.marks)

    def path_of(self, sid: int) -> tuple[int, ...]:
        """Token ids of a Sid of the catalogue."""
        return tuple(self.trie.paths(self.trie.leaves([sid]))[0].tolist())

    def paths_of_items(self, items: Sequence[int]) -> np.ndarray:
        """Token ids of items, int64 [N, L]."""
        return self.trie.paths(self.trie.leaves(self.catalog.sid_index_N[list(items)]))

    def views(self, samples: Sequence[Sample]) -> Views | None:
        """What each sample may recommend as views 1, 2, … of the trie; None when all may recommend everything.

        Raises:
            ValueError: naming a sample that has nothing left to recommend.
        """
        if not any(sample.record.restricted for sample in samples):
            return None
        views = Views.build(self.trie, [self._restriction(sample.record) for sample in samples])
        for sample, size in zip(samples, views.sizes_V[1:], strict=True):
            if not size:
                raise ValueError(f"{sample.record.source}: no item is left that may be recommended")
        return views

    def items(self, record: Record, sid: int) -> tuple[int, ...]:
        """The items of a Sid that a record may be recommended."""
        cluster = self.catalog.items_of_sid(sid)
        return tuple(item for item in cluster if record.allows(item)) if record.restricted else cluster

    def _restriction(self, record: Record) -> Restriction:
        sid_of = self.catalog.sid_index_N
        if record.candidates is not None:
            left = sorted(set(record.candidates) - set(record.excluded))
            return Restriction(only=self.trie.leaves(np.unique(sid_of[left])))
        sids, counts = np.unique(sid_of[sorted(set(record.excluded))], return_counts=True)
        gone = sids[counts == self.catalog.cluster_sizes_S[sids]]  # a Sid goes with the last of its items
        return Restriction(without=self.trie.leaves(gone))

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
        groups = []
        for row, sample in enumerate(samples):
            there = leaves_BW[row] >= 0
            tokens_WL = self.trie.paths(leaves_BW[row][there])
            inclusion = None if inclusion_BW is None else inclusion_BW[row][there]
            groups.append(self.group(sample, tokens_WL, logps_BWL[row][there], True, policy_version, inclusion))
        return groups

    def group(
        self,
        sample: Sample,
        tokens_GT: np.ndarray,
        logps_GT: np.ndarray,
        constrained: bool,
        policy_version: int,
        inclusion_G: np.ndarray | None = None,
    ) -> RolloutGroup:
        """One group from the tokens [G, T], log-probabilities [G, T] and, of a draw without replacement, inclusions.

        A completion of several items has the catalogue's marks between them; a view's items only count.
        """
        if inclusion_G is None:
            inclusion_G = np.zeros(len(tokens_GT))
        depth, period = self.trie.depth, self.trie.depth + len(self.marks)
        starts = range(0, tokens_GT.shape[1], period)
        sids_GK = np.stack([self.trie.rows(self.trie.walk(tokens_GT[:, s : s + depth])[:, -1]) for s in starts], axis=1)
        on_trie = tuple(constrained and step % period < depth for step in range(tokens_GT.shape[1]))
        forced = () if len(starts) == 1 else tuple(not on for on in on_trie)
        rollouts = tuple(
            Rollout(
                token_ids=tuple(tokens),
                logps_sampler=tuple(logps),
                on_trie=on_trie,
                sids=tuple(sids) if min(sids) >= 0 else (),
                items=tuple(self.items(sample.record, sid) for sid in sids) if min(sids) >= 0 else (),
                policy_version=policy_version,
                finish_reason="item" if min(sids) >= 0 else "illegal",
                logp_inclusion=inclusion,
                forced=forced,
            )
            for tokens, logps, sids, inclusion in zip(
                tokens_GT.tolist(), logps_GT.tolist(), sids_GK.tolist(), inclusion_G.tolist(), strict=True
            )
        )
        return RolloutGroup(sample, rollouts)


def ranges_of(tokens: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Distinct, ascending tokens as ranges [first, last + 1)."""
    breaks = np.flatnonzero(np.diff(tokens) > 1)
    firsts, lasts = tokens[np.concatenate([[0], breaks + 1])], tokens[np.concatenate([breaks, [len(tokens) - 1]])]
    return tuple((int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True))
