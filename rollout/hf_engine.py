"""The reference engine: a Hugging Face model, prompts computed once and branches grown under the trie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema import ModelConfig
from rollout.decode import Decoder
from rollout.output_layer import require_known_logits
from rollout.search import beam, draw, draw_distinct, write
from rollout.support import TorchTrie
from rollout.thought import Text, generate
from rollout.types import Prompted, RolloutGroup, Sample, Sampling
from rollout.weights import checksum, require_fit, shapes_of

P = TypeVar("P", bound=Prompted)
T = TypeVar("T")


def torch_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 without one."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_policy(
    path: str | os.PathLike[str], *, dtype: str = "auto", attention: str = "sdpa", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model on the GPU if there is one, in eval mode.

    Raises:
        ValueError: when the folder holds no model that transformers can load.
    """
    if not Path(path).is_dir() and Path(path).is_absolute():
        raise ValueError(f"model.path={path}: no such folder")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch_dtype(dtype), attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model.path={path}: no causal language model could be loaded from it: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def open_policy(path: str | os.PathLike[str], settings: ModelConfig) -> PreTrainedModel:
    """`load_policy` by the settings of a run."""
    return load_policy(
        path, dtype=settings.dtype, attention=settings.attention, trust_remote_code=settings.trust_remote_code
    )


def batches_by_length(samples: Sequence[Prompted], size: int) -> Iterator[list[int]]:
    """Indices of the samples in batches of prompts of similar length, so that little is padding."""
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].prompt_ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class HFEngine:
    """Generates groups with a model of transformers, which may be shared with a trainer."""

    name = "hf"

    def __init__(self, model: PreTrainedModel, decoder: Decoder, *, max_batch_prompts: int = 64) -> None:
        require_known_logits(model)
        self.model = model
        self.decoder = decoder
        self.trie = TorchTrie(decoder.trie, model.device)
        self.max_batch_prompts = max_batch_prompts
        self.shapes = shapes_of(model)
        self.policy_version = 0

    def generate(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """One group per sample, in order."""
        return generate(self, samples, sampling)

    def items(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """Groups of items right after the prompts."""
        return self._in_batches(samples, lambda batch: self._batch(batch, sampling))

    def write(self, samples: Sequence[Prompted], sampling: Sampling, count: int) -> list[list[Text]]:
        """`count` texts after each prompt."""
        return self._in_batches(samples, lambda batch: write(self.model, batch, sampling, count))

    def _in_batches(self, samples: Sequence[P], work: Callable[[list[P]], list[T]]) -> list[T]:
        results: dict[int, T] = {}
        was_training = self.model.training
        self.model.eval()
        for rows in batches_by_length(samples, self.max_batch_prompts):
            results.update(zip(rows, work([samples[row] for row in rows]), strict=True))
        self.model.train(was_training)
        return [results[row] for row in range(len(samples))]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> str:
        """Copy full weights in; the checksum is that of the model's own tensors afterwards.

        Raises:
            ValueError: when the weights are not those of this model.
        """
        require_fit(weights, self.shapes, version)
        self.model.load_state_dict(dict(weights), strict=False)  # not strict: a tied head comes with the embedding
        own = self.model.state_dict()
        self.policy_version = version
        return checksum({name: own[name] for name in weights})

    def serve(self, decoder: Decoder) -> None:
        """Change the catalogue: from now on items of `decoder` are written, and no others."""
        self.decoder, self.trie = decoder, TorchTrie(decoder.trie, self.model.device)

    def _batch(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        version, views = self.policy_version, self.decoder.views(samples)
        if sampling.sampler == "beam":
            prompts = [sample.prompt_ids for sample in samples]
            leaves, logps = beam(self.model, self.trie, prompts, sampling.group_size, sampling.temperature, views)
            return self.decoder.groups_of_leaves(samples, leaves, logps, policy_version=version)
        if sampling.sampler == "unique":
            found = draw_distinct(self.model, self.trie, samples, sampling, views)
            return self.decoder.groups_of_leaves(samples, *found, policy_version=version)
        tokens_BWT, logps_BWT = draw(self.model, self.trie, samples, sampling, views, self.decoder.marks)
        return [
            self.decoder.group(sample, tokens, logps, sampling.constrained, version)
            for sample, tokens, logps in zip(samples, tokens_BWT, logps_BWT, strict=True)
        ]
