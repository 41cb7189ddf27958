"""PL: SidTrainer on whole rankings, each one rollout that writes K items in order.

Axes: P prompts, M rankings of a prompt (`rollout.group_size`), K items of a ranking, U distinct items of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from rl.batch import Batch
from rl.candidates import candidate_sids, item_groups
from rl.plackett_luce import draw_rankings, logp_among_candidates, logp_in_catalogue
from rl.trl_trainer import SidTrainer
from rollout.search import sample_seed
from rollout.types import Rollout, RolloutGroup, Sample, Sampling


class RankingTrainer(SidTrainer):
    """Policy gradient on Plackett–Luce rankings (Plackett 1975, Luce 1959; cf. PL-Rank, arXiv 2204.10872).

    The score of an item is its log-probability under the trie. Rows with `candidates` rank all of them, scored exactly
    by the trainer; rows without rank the first `rl.ranking_length` draws without replacement from the catalogue, made
    by the engines. Rewards see each ranking as a slate, so that NDCG@K is the ranking's own. The ratio of PPO's clipped
    loss is that of the rankings' probabilities.
    """

    def generate(self, samples: list[Sample], again: int = 0) -> Iterator[list[RolloutGroup]]:
        """M rankings for each sample."""
        groups: dict[int, RolloutGroup] = {}
        for rows, drawn in (
            ([row for row, s in enumerate(samples) if s.record.candidates is None], self._from_catalogue),
            ([row for row, s in enumerate(samples) if s.record.candidates is not None], self._among_candidates),
        ):
            if rows:
                with self.phase("rollout"):
                    groups.update(zip(rows, drawn([samples[row] for row in rows], again), strict=True))
        self.note(legal_rate=1.0)
        self.note(policy_version=float(self.fleet.version))
        yield [groups[row] for row in range(len(samples))]

    def pack(self, groups: list[RolloutGroup]) -> Batch:
        """Each prompt's distinct items as rows [P·U, …], and the rankings as places among them."""
        sids_of = [sorted({sid for rollout in group.rollouts for sid in rollout.sids}) for group in groups]
        items = item_groups([group.sample for group in groups], sids_of, self.task.decoder, groups[0].policy_version)
        batch = self.scorer.batch(items)
        longest = max(len(rollout.sids) for group in groups for rollout in group.rollouts)
        orders_PMK = torch.full((len(groups), self.num_generations, longest), -1)
        sampler_PMK = torch.zeros(orders_PMK.shape)
        for row, (group, sids) in enumerate(zip(groups, sids_of, strict=True)):
            place_of = {sid: place for place, sid in enumerate(sids)}
            for column, rollout in enumerate(group.rollouts):
                orders_PMK[row, column, : len(rollout.sids)] = torch.tensor([place_of[sid] for sid in rollout.sids])
                logps = np.array(rollout.logps_sampler).reshape(len(rollout.sids), -1).sum(axis=1)
                sampler_PMK[row, column, : len(rollout.sids)] = torch.from_numpy(logps)
        device = self.accelerator.device
        batch["orders"] = orders_PMK.to(device)
        batch["among"] = torch.tensor([g.sample.record.candidates is not None for g in groups], device=device)
        batch["sampler_ranking_logps"] = _logps(sampler_PMK.to(device), batch)
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
        with self.phase("update"):
            orders_PMK = inputs["orders"]
            count = len(orders_PMK)
            items = len(inputs["places"]) // count
            scores = self.scorer.scores(model, inputs, items)
            item_logps_PU = scores.logps_BT.sum(dim=1).view(count, items)
            places = orders_PMK.clamp(min=0).flatten(1)
            logps_PM = _logps(item_logps_PU.gather(1, places).view(orders_PMK.shape), inputs)
            ratio_PM = (logps_PM - inputs["sampler_ranking_logps"]).exp()
            advantages_PM = inputs["advantages"].view(count, -1)
            low, high = 1 - self.config.rl.clip_low, 1 + self.config.rl.clip_high
            clipped_PM = ratio_PM.clamp(low, high)
            loss = -torch.minimum(ratio_PM * advantages_PM, clipped_PM * advantages_PM).mean()
            self.note(**{"clip_ratio/region_mean": float((ratio_PM != clipped_PM).float().mean())})
            if self.first_pass:
                self._ratio_errors.append(float((ratio_PM.detach() - 1).abs().max()))
        return loss.float() / self.current_gradient_accumulation_steps

    def _from_catalogue(self, samples: list[Sample], again: int) -> list[RolloutGroup]:
        length, temperature = self.config.rl.ranking_length, self.config.rollout.temperature
        seed = self.draw_seed(self.state.global_step, again)
        draws = [
            self.fleet.generate(samples, Sampling(length, "unique", temperature, seed=seed * 4_099 + ranking))
            for ranking in range(self.num_generations)
        ]
        return [
            RolloutGroup(sample, tuple(_slate(draw[row].rollouts) for draw in draws))
            for row, sample in enumerate(samples)
        ]

    def _among_candidates(self, samples: list[Sample], again: int) -> list[RolloutGroup]:
        decoder = self.task.decoder
        sids_of = [candidate_sids(sample, decoder) for sample in samples]
        groups = item_groups(samples, sids_of, decoder, self.fleet.version)
        logps_PUL = self.policy_logps(groups).reshape(len(samples), len(groups[0]), -1)
        ranked = []
        for sample, group, sids, logps_UL in zip(samples, groups, sids_of, logps_PUL, strict=True):
            rng = np.random.default_rng(sample_seed(self.draw_seed(self.state.global_step, again), sample))
            items = [
                replace(rollout, logps_sampler=tuple(logps.tolist()))
                for rollout, logps in zip(group.rollouts[: len(sids)], logps_UL, strict=False)
            ]
            orders_MU = draw_rankings(logps_UL[: len(sids)].sum(axis=1), self.num_generations, rng)
            slates = tuple(_slate([items[place] for place in order]) for order in orders_MU)
            ranked.append(RolloutGroup(sample, slates))
        return ranked


def _logps(items_PMK: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probabilities [P, M] of rankings from those of their items in order."""
    there_PMK = batch["orders"] >= 0
    among_PM = logp_among_candidates(items_PMK, there_PMK)
    return torch.where(batch["among"][:, None], among_PM, logp_in_catalogue(items_PMK, there_PMK))


def _slate(items: list[Rollout] | tuple[Rollout, ...]) -> Rollout:
    """One rollout that writes these items in their order."""
    return Rollout(
        token_ids=tuple(token for item in items for token in item.token_ids),
        logps_sampler=tuple(logp for item in items for logp in item.logps_sampler),
        on_trie=tuple(flag for item in items for flag in item.on_trie),
        sids=tuple(sid for item in items for sid in item.sids),
        items=tuple(cluster for item in items for cluster in item.items),
        policy_version=items[0].policy_version,
        finish_reason="item",
    )
