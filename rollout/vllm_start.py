"""How vLLM is started in this process, for rollout engines and teachers alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# In-process engine core: weights reach it without a second copy, and it dies with the actor that holds it.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from vllm import LLM

CPU_BATCH_TOKENS, CPU_BATCH_SEQUENCES = 8192, 512  # vLLM's defaults are smaller; one step of a small policy is overhead


def open_llm(
    model_path: str,
    *,
    dtype: str,
    longest: int,
    kv_cache_gb: int,
    gpu_memory_utilization: float,
    trust_remote_code: bool,
    **more: Any,
) -> LLM:
    """vLLM in this process, as engines and teachers want it.

    Args:
        model_path: Hugging Face folder.
        dtype: auto, float32 or bfloat16; auto is float32 on CPU.
        longest: most tokens of a request, with what is written.
        kv_cache_gb: key-value cache on CPU.
        gpu_memory_utilization: share of a GPU's memory.
        trust_remote_code: run code that comes with the model.
        more: any other argument of `vllm.LLM`.
    """
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gb))
    on_gpu = torch.cuda.is_available()
    # On CPU a seeded request that is prefilled in chunks crashes: vLLM rewinds its generator, which there it cannot.
    start: dict[str, Any] = {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, longest),
        "max_num_seqs": CPU_BATCH_SEQUENCES,
    }
    with _readable_modules():
        return LLM(
            model=model_path,
            dtype=("float32" if not on_gpu else "bfloat16") if dtype == "auto" else dtype,
            enforce_eager=not on_gpu,
            max_model_len=longest,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            max_logprobs=-1,  # a beam asks for as many as it is wide
            enable_prefix_caching=True,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
            disable_log_stats=True,
            **({} if on_gpu else start),
            **more,
        )


@contextmanager
def _readable_modules() -> Iterator[None]:
    """Hide modules that vLLM 0.32 cannot read when it starts.

    It asks every attribute of every module for its `__dict__`; llvmlite's library wrapper, which numba brings, takes
    that for the name of a C function.
    """
    hidden = {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith("llvmlite")
        and any(not isinstance(getattr(value, "__dict__", {}), Mapping) for value in list(vars(module).values()))
    }
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)
