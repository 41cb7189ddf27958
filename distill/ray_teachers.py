"""Teachers as Ray actors: texts spread over them, scored while others are still being written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from configs.schema import RunConfig
from distill.known import HFTeacher, Ids, KnowingTeacher, Known
from distill.vocabulary import SharedVocabulary
from rollout.engine import all_threads, choose_engine
from rollout.ray_fleet import FleetError


@dataclass(frozen=True)
class TeacherSpec:
    """Everything a teacher's process needs to build it.

    Attributes:
        kind: `vllm` or `hf`.
        path: its Hugging Face folder.
        config: the run's settings.
        shared: what student and teacher both can say.
    """

    kind: str
    path: Path
    config: RunConfig
    shared: SharedVocabulary

    def build(self) -> KnowingTeacher:
        """Start the teacher in this process."""
        config, settings = self.config, self.config.distill
        top_k = settings.top_k if settings.divergence == "top_k" else 1
        if self.kind == "hf":
            return HFTeacher(
                self.path, config.model, self.shared, top_k=top_k, temperature=settings.temperature,
                batch=config.rollout.max_batch_prompts,
            )  # fmt: skip
        from distill.vllm_teacher import VLLMTeacher

        return VLLMTeacher(
            self.path, config.model, config.rollout, self.shared, top_k=top_k, temperature=settings.temperature,
            longest=settings.max_prompt_tokens + settings.max_tokens,
        )  # fmt: skip


class TeacherActor:
    """One teacher in its own process."""

    def __init__(self, spec: TeacherSpec) -> None:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        self.teacher = spec.build()

    def ready(self) -> bool:
        """Answers when the teacher has started."""
        return True

    def score(self, prompts: list[Ids], texts: list[list[Ids]]) -> list[list[Known]]:
        """What it says of the texts after each prompt."""
        return self.teacher.score(prompts, texts)


class Teachers:
    """`distill.teachers` teachers that act as one.

    Args:
        path: their Hugging Face folder.
        config: the run's settings.
        shared: what student and teacher both can say.

    Raises:
        FleetError: when one does not start, with the reason it gave.
    """

    def __init__(self, path: Path, config: RunConfig, shared: SharedVocabulary) -> None:
        kind, _ = choose_engine(config.rollout.engine)
        threads = max(1, all_threads() // 2 // config.distill.teachers)  # engines write at the same time
        actor = ray.remote(TeacherActor).options(
            num_cpus=config.rollout.cpus_per_engine,
            num_gpus=max(config.distill.gpus_per_teacher, 0),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        spec = TeacherSpec(kind, path, config, shared)
        self.actors = [actor.remote(spec) for _ in range(config.distill.teachers)]
        self.asked = 0
        self._all([one.ready.remote() for one in self.actors], "start")

    def ask(self, prompts: Sequence[Ids], texts: Sequence[Sequence[Ids]]) -> list[Any]:
        """Ask for what they say of the texts after each prompt, without waiting: calls for `answers`, in order."""
        size = -(-len(prompts) // len(self.actors)) or 1
        calls = []
        for start in range(0, len(prompts), size):
            actor = self.actors[self.asked % len(self.actors)]
            calls.append(actor.score.remote(list(prompts[start : start + size]), list(texts[start : start + size])))
            self.asked += 1
        return calls

    def answers(self, calls: list[Any]) -> list[list[Known]]:
        """What was asked for.

        Raises:
            FleetError: when a teacher fails.
        """
        return [of_prompt for answer in self._all(calls, "score texts") for of_prompt in answer]

    def _all(self, calls: list[Any], what: str) -> list[Any]:
        try:
            return ray.get(calls)
        except ray.exceptions.RayError as error:
            raise FleetError(f"a teacher failed to {what}: {error}") from error
