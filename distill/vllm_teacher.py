"""A teacher computed by vLLM, which returns the log-probabilities of its prompts' tokens.

Axes: T tokens of a text, K tokens of the teacher's top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import ModelConfig, RolloutConfig
from distill.known import Ids, Known
from distill.vocabulary import SharedVocabulary
from rollout.vllm_start import open_llm


class VLLMTeacher:
    """A teacher whose texts are prompts of vLLM, all of a call at once.

    Args:
        path: its Hugging Face folder.
        model: how to load it.
        rollout: memory settings of vLLM.
        shared: what both can say.
        top_k: K.
        temperature: its logits are divided by it.
        longest: most tokens of prompt and text together.
    """

    def __init__(
        self,
        path: Path,
        model: ModelConfig,
        rollout: RolloutConfig,
        shared: SharedVocabulary,
        *,
        top_k: int,
        temperature: float,
        longest: int,
    ) -> None:
        self.top_k, self.column_of = min(top_k, len(shared.ids)), shared.column_of(torch.arange(shared.stop)).numpy()
        self.llm = open_llm(
            str(path),
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            longest=longest + 1,  # vLLM writes a token after each prompt
            kv_cache_gb=rollout.kv_cache_gb,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            skip_tokenizer_init=True,
        )
        self.llm.apply_model(_on_shared(shared, temperature))

    def score(self, prompts: Sequence[Ids], texts: Sequence[Sequence[Ids]]) -> list[list[Known]]:
        """What it says of the texts after each prompt."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self.top_k, flat_logprobs=True, detokenize=False
        )
        rows = [([*prompt, *text], len(text)) for prompt, some in zip(prompts, texts, strict=True) for text in some]
        requests: list[Any] = [{"prompt_token_ids": ids} for ids, _ in rows]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        known = iter(self._known(output, length) for output, (_, length) in zip(outputs, rows, strict=True))
        return [[next(known) for _ in some] for some in texts]

    def _known(self, output: Any, length: int) -> Known:
        """Each position but the first brings its own token, then the likeliest ones."""
        flat = output.prompt_logprobs
        width = self.top_k + 1
        ids, logps = (
            np.array(values[len(values) - length * width :], kind).reshape(length, width)
            for values, kind in ((flat.token_ids, np.int64), (flat.logprobs, np.float32))
        )
        return Known(self.column_of[ids[:, 1:]].astype(np.int32), logps[:, 1:], logps[:, 0])


def _on_shared(shared: SharedVocabulary, temperature: float) -> Callable[[torch.nn.Module], None]:
    """Make a model's logits those over the shared vocabulary.

    Sampling parameters do not reach the log-probabilities of a prompt, so the model itself rules out the other tokens.
    """

    def change(model: torch.nn.Module) -> None:
        compute = model.compute_logits

        def compute_logits(*arguments: Any, **named: Any) -> torch.Tensor:
            logits_NV: torch.Tensor = compute(*arguments, **named) / temperature  # type: ignore[operator]
            kept_NV = torch.full_like(logits_NV, float("-inf"))
            ids = torch.from_numpy(shared.ids).to(logits_NV.device)
            kept_NV[:, ids] = logits_NV[:, ids]
            return kept_NV

        model.compute_logits = compute_logits  # type: ignore[assignment]

    return change
