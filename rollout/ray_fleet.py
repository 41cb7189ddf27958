"""The fleet: rollout engines as Ray actors, prompts spread over them, weights brought to all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from rollout.decode import Decoder
from rollout.engine import EngineSpec, cpu_threads
from rollout.thought import Text
from rollout.types import Prompted, RolloutGroup, Sample, Sampling

if TYPE_CHECKING:
    import torch


class FleetError(RuntimeError):
    """An engine failed, or answered with another policy version or checksum than it should."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it travels: PEFT's tensors and its `adapter_config.json`."""

    tensors: Mapping[str, torch.Tensor]
    config_json: str


@dataclass(frozen=True)
class Pending:
    """Groups that engines have been asked for: the policy version they will be of, and the calls in order."""

    version: int
    calls: list[Any]


@dataclass(frozen=True)
class Loading:
    """Weights that engines have been sent: their version and checksum, and the version before."""

    calls: list[Any]
    version: int
    expected: str
    before: int


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

    def write(self, prompts: list[Prompted], sampling: Sampling, count: int) -> tuple[int, list[list[Text]]]:
        """Texts after prompts, and the version of the weights that wrote them."""
        return self.engine.policy_version, self.engine.write(prompts, sampling, count)  # type: ignore[attr-defined]

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
        _, threads = cpu_threads(settings)
        actor = ray.remote(EngineActor).options(
            num_cpus=settings.cpus_per_engine,
            num_gpus=max(settings.gpus_per_engine, 0),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )
        shared = ray.put(decoder)
        self.engines = [actor.remote(spec, shared) for _ in range(settings.num_engines)]
        self.version = 0
        self.prompts_per_call = settings.prompts_per_call
        self._loading: Loading | None = None
        self.about: list[dict[str, Any]] = self._all([engine.about.remote() for engine in self.engines], "start")

    def generate(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """One group per sample, in order, each of the fleet's current policy version.

        The draws of a sample depend on its name and the seed alone, so any number of engines gives the same groups.

        Raises:
            FleetError: when an engine fails or answers with rollouts of another policy version.
        """
        return [group for groups in self.collect(self.start(samples, sampling)) for group in groups]

    def start(self, samples: Sequence[Sample], sampling: Sampling) -> Pending:
        """Ask for groups without waiting. An engine takes its calls in order, so they are of the current version."""
        size = self.prompts_per_call or -(-len(samples) // len(self.engines))
        parts = [list(samples[first : first + size]) for first in range(0, len(samples), size or 1)]
        calls = [
            self.engines[index % len(self.engines)].generate.remote(part, sampling) for index, part in enumerate(parts)
        ]
        return Pending(self.version, calls)

    def collect(self, pending: Pending) -> Iterator[list[RolloutGroup]]:
        """The groups that were asked for, in order, some as soon as they are there while others are still drawn.

        Raises:
            FleetError: when an engine fails, or answers with rollouts of another policy version.
        """
        for call in pending.calls:
            (groups,) = self._all([call], "generate")
            self._verify_sync()
            stale = {group.policy_version for group in groups} - {pending.version}
            if stale:
                raise FleetError(
                    f"rollouts of policy version {sorted(stale)} where version {pending.version} was asked for"
                )
            yield groups

    def write(
        self, prompts: Sequence[Prompted], sampling: Sampling, count: int, parts: int = 1
    ) -> Iterator[list[list[Text]]]:
        """`count` texts after each prompt (`sampling.thought` says how long and what ends them), in order.

        All are asked for at once and given as they come: `prompts_per_call` at a time, or by default each engine's
        share in so many parts.

        Raises:
            FleetError: when an engine fails, or answers with another policy version.
        """
        size = self.prompts_per_call or -(-len(prompts) // (parts * len(self.engines)))
        shares = [list(prompts[first : first + size]) for first in range(0, len(prompts), size or 1)]
        calls = [
            self.engines[index % len(self.engines)].write.remote(share, sampling, count)
            for index, share in enumerate(shares)
        ]
        return self._written(calls, self.version)

    def _written(self, calls: list[Any], expected: int) -> Iterator[list[list[Text]]]:
        for call in calls:
            ((version, texts),) = self._all([call], "write")
            self._verify_sync()
            if version != expected:
                raise FleetError(f"texts of policy version {version} where version {expected} was asked for")
            yield texts

    def sync(
        self, weights: Mapping[str, torch.Tensor] | Adapter, version: int, expected: str, *, wait: bool = True
    ) -> None:
        """Bring weights to every engine, after what it has been asked for before.

        Args:
            weights: full weights, or an adapter.
            version: the policy version they are.
            expected: checksum that each engine must report after loading.
            wait: until all have loaded them; else what they report is looked at when they have.

        Raises:
            FleetError: when an engine reports another version or checksum.
        """
        self._verify_sync(wait=True)
        shared = ray.put(weights)
        self._loading = Loading([e.load.remote(shared, version) for e in self.engines], version, expected, self.version)
        self.version = version
        self._verify_sync(wait=wait)

    def _verify_sync(self, wait: bool = False) -> None:
        if self._loading is None:
            return
        loading = self._loading
        if not wait and len(ray.wait(loading.calls, num_returns=len(loading.calls), timeout=0)[0]) < len(loading.calls):
            return
        self._loading, self.version = None, loading.before  # unless all engines have it
        for index, answer in enumerate(self._all(loading.calls, "load weights")):
            if answer != (loading.version, loading.expected):
                raise FleetError(
                    f"engine {index} reports {answer} after loading version {loading.version} with checksum "
                    f"{loading.expected}"
                )
        self.version = loading.version

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
