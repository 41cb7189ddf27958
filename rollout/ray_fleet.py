"""The fleet: rollout engines as Ray actors, prompts spread over them, weights brought to all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from rollout.decode import Decoder
from rollout.engine import EngineSpec
from rollout.types import RolloutGroup, Sample, Sampling

if TYPE_CHECKING:
    import torch


class FleetError(RuntimeError):
    """An engine failed, or answered with another policy version or checksum than it should."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it travels: PEFT's tensors and its `adapter_config.json`."""

    tensors: Mapping[str, torch.Tensor]
    config_json: str


class EngineActor:
    """One engine in its own process."""

    def __init__(self, spec: EngineSpec, decoder: Decoder) -> None:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
        self.engine = spec.build(decoder)

    def about(self) -> dict[str, Any]:
        """What runs here: engine, process, node, policy version."""
        node = ray.get_runtime_context().get_node_id()
        return {"engine": self.engine.name, "pid": os.getpid(), "node": node, "version": self.engine.policy_version}

    def generate(self, samples: list[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """One group per sample, in order."""
        return self.engine.generate(samples, sampling)

    def serve(self, decoder: Decoder) -> int:
        """Change the catalogue; returns how many Sids it has."""
        self.engine.serve(decoder)
        return decoder.trie.num_leaves

    def load(self, weights: Mapping[str, torch.Tensor] | Adapter, version: int) -> tuple[int, str]:
        """Take weights; returns the engine's version and the checksum of what it loaded."""
        if isinstance(weights, Adapter):
            digest = self.engine.load_adapter(weights.tensors, weights.config_json, version)  # type: ignore[attr-defined]
        else:
            digest = self.engine.load_weights(dict(weights), version)
        return self.engine.policy_version, digest


class Fleet:
    """`num_engines` engines that act as one.

    Args:
        spec: how to build an engine.
        decoder: catalogue and trie; shared through Ray's object store, one copy a machine.

    Raises:
        FleetError: when an engine does not start, with the reason it gave.
    """

    def __init__(self, spec: EngineSpec, decoder: Decoder) -> None:
        settings = spec.rollout
        threads = settings.threads or os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1
        actor = ray.remote(EngineActor).options(
            num_cpus=settings.cpus_per_engine,
            num_gpus=max(settings.gpus_per_engine, 0),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        shared = ray.put(decoder)
        self.engines = [actor.remote(spec, shared) for _ in range(settings.num_engines)]
        self.version = 0
        self.about: list[dict[str, Any]] = self._all([engine.about.remote() for engine in self.engines], "start")

    def generate(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """One group per sample, in order, each of the fleet's current policy version.

        The draws of a sample depend on its name and the seed alone, so any number of engines gives the same groups.

        Raises:
            FleetError: when an engine fails or answers with rollouts of another policy version.
        """
        shares = [list(range(start, len(samples), len(self.engines))) for start in range(len(self.engines))]
        calls = [
            engine.generate.remote([samples[row] for row in rows], sampling)
            for engine, rows in zip(self.engines, shares, strict=True)
            if rows
        ]
        groups: list[RolloutGroup] = [None] * len(samples)  # type: ignore[list-item]
        for rows, answer in zip([rows for rows in shares if rows], self._all(calls, "generate"), strict=True):
            for row, group in zip(rows, answer, strict=True):
                groups[row] = group
        stale = {group.policy_version for group in groups} - {self.version}
        if stale:
            raise FleetError(f"rollouts of policy version {sorted(stale)} where version {self.version} was asked for")
        return groups

    def sync(self, weights: Mapping[str, torch.Tensor] | Adapter, version: int, expected: str) -> None:
        """Bring weights to every engine.

        Args:
            weights: full weights, or an adapter.
            version: the policy version they are.
            expected: checksum that each engine must report after loading.

        Raises:
            FleetError: when an engine reports another version or checksum.
        """
        shared = ray.put(weights)
        for index, answer in enumerate(
            self._all([e.load.remote(shared, version) for e in self.engines], "load weights")
        ):
            if answer != (version, expected):
                raise FleetError(
                    f"engine {index} reports {answer} after loading version {version} with checksum {expected}"
                )
        self.version = version

    def serve(self, decoder: Decoder) -> None:
        """Change the catalogue of every engine without a restart; it is shared through Ray's object store.

        Raises:
            FleetError: when an engine does not take it.
        """
        shared = ray.put(decoder)
        self._all([engine.serve.remote(shared) for engine in self.engines], "change its catalogue")

    def close(self) -> None:
        """End the engines' processes."""
        for engine in self.engines:
            ray.kill(engine)
        self.engines = []

    def _all(self, calls: list[Any], what: str) -> list[Any]:
        try:
            return ray.get(calls)
        except ray.exceptions.RayError as error:
            hint = " (rollout.engine=hf needs no vLLM)" if what == "start" else ""
            raise FleetError(f"a rollout engine failed to {what}{hint}: {error}") from error
