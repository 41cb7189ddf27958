"""Which trainer an algorithm has."""

from __future__ import annotations

from configs.schema import RunConfig
from rl.trl_ppo import PPOTrainer
from rl.trl_ranking import RankingTrainer
from rl.trl_trainer import SidTrainer

TRAINERS: dict[str, type[SidTrainer]] = {"ppo": PPOTrainer, "pl": RankingTrainer}
"""Algorithms that need more than SidTrainer."""


def trainer_class(config: RunConfig) -> type[SidTrainer]:
    """The class that runs `algo`."""
    return TRAINERS.get(config.algo, SidTrainer)
