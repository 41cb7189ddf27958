"""The default engine: vLLM in this process, with the trie as a logits processor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.vllm_start import open_llm  # first of all: it sets what vLLM reads when it is imported

# isort: split
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from rollout.decode import Decoder
from rollout.hf_engine import load_policy
from rollout.search import distinct, likeliest, roots, sample_seed
from rollout.support import TorchTrie
from rollout.thought import Text, generate
from rollout.types import Prompted, RolloutGroup, Sample, Sampling
from rollout.vllm_trie import IN_PROCESS, OPT_IN, TRIE_FOLDER, TrieProcessor
from rollout.weights import checksum, merged_weights, require_fit, shapes_of, tied_head

FIRST_TRIE = "trie-0"


class VLLMEngine:
    """Generates groups with vLLM.

    Args:
        model_path: Hugging Face folder of the policy the engine starts with.
        decoder: catalogue and trie.
        dtype: auto, float32 or bfloat16; auto is float32 on CPU.
        max_prompt_tokens: longest prompt, with the longest thought.
        items: most items of a completion.
        kv_cache_gb: key-value cache on CPU.
        gpu_memory_utilization: share of a GPU's memory.
        lora_rank: > 0 makes room for adapters of that rank (`rollout.sync: adapter`).
        trust_remote_code: run code that comes with the model.

    The model's own `generation_config.json` is never read: nothing but `Sampling` shapes the distribution.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str,
        decoder: Decoder,
        *,
        dtype: str = "auto",
        max_prompt_tokens: int = 512,
        items: int = 1,
        kv_cache_gb: int = 1,
        gpu_memory_utilization: float = 0.4,
        lora_rank: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        self.decoder = decoder
        self.trie = TorchTrie(decoder.trie)
        self.policy_version = 0
        self._adapter: LoRARequest | None = None
        self._failure = ""
        self._folder = tempfile.TemporaryDirectory(prefix="sidrl-vllm-")
        self._trie_folder = Path(self._folder.name) / FIRST_TRIE
        decoder.trie.save(self._trie_folder)
        IN_PROCESS[str(self._trie_folder)] = decoder.trie
        # On CPU vLLM packs the output matrix when it loads and keeps the pack when tied weights are loaded again: the
        # head would stay old. There the engine's copy is untied, and every load names the head itself.
        longest = max_prompt_tokens + self.decoder.completion_tokens(items) + 1
        start: dict[str, Any] = {"load_format": "dummy", "hf_overrides": {"tie_word_embeddings": False}}
        lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": lora_rank, "max_loras": 1}
        self.llm = open_llm(
            model_path,
            dtype=dtype,
            longest=longest,
            kv_cache_gb=kv_cache_gb,
            gpu_memory_utilization=gpu_memory_utilization,
            trust_remote_code=trust_remote_code,
            logits_processors=[TrieProcessor],
            additional_config={TRIE_FOLDER: str(self._trie_folder)},
            **({} if on_gpu else start),
            **(lora if lora_rank else {}),
        )
        self._tied: tuple[str, str] | None = None
        if on_gpu:
            config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
            with torch.device("meta"):
                policy = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            self._shapes = shapes_of(policy)
        else:
            policy = load_policy(model_path, dtype=dtype, trust_remote_code=trust_remote_code)
            self._shapes, self._tied = shapes_of(policy), tied_head(policy)
            self.load_weights(merged_weights(policy), 0)

    def generate(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """One group per sample, in order."""
        return generate(self, samples, sampling)

    def write(self, samples: Sequence[Prompted], sampling: Sampling, count: int) -> list[list[Text]]:
        """`count` texts after each prompt."""
        thought, greedy = sampling.thought, sampling.sampler == "greedy"
        assert thought is not None
        params = [
            self._params(
                sampling,
                {"banned": [list(pair) for pair in thought.banned]},
                n=1 if greedy else count,
                max_tokens=thought.max_tokens,
                stop_token_ids=[thought.end, *thought.stops],
                temperature=0.0 if greedy else sampling.temperature,
                seed=sample_seed(sampling.seed, sample),
                logprobs=0,
            )
            for sample in samples
        ]
        texts = []
        for output in self._run([sample.prompt_ids for sample in samples], params):
            branches = sorted(output.outputs, key=lambda branch: branch.index)
            written = [Text(tuple(branch.token_ids), _logps(branch)) for branch in branches]
            texts.append(written * (count if greedy else 1))
        return texts

    def items(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """Groups of items right after the prompts."""
        if sampling.sampler in ("beam", "unique"):
            return self._search(samples, sampling)
        greedy = sampling.sampler == "greedy"
        width = 1 if greedy else sampling.group_size  # the greedy path is one: computed once, given G times
        wishes = self._wishes(samples, sampling)
        params = [
            self._params(
                sampling,
                wish,
                n=width,
                max_tokens=self.decoder.completion_tokens(sampling.items),
                temperature=0.0 if greedy else sampling.temperature,
                seed=sample_seed(sampling.seed, sample),
                logprobs=0,
            )
            for sample, wish in zip(samples, wishes, strict=True)
        ]
        outputs = self._run([sample.prompt_ids for sample in samples], params)
        groups = []
        for sample, output in zip(samples, outputs, strict=True):
            branches = sorted(output.outputs, key=lambda branch: branch.index)
            tokens_GL = np.array([list(branch.token_ids) for branch in branches])
            logps_GL = np.array([_logps(branch) for branch in branches])
            if greedy:
                tokens_GL, logps_GL = (np.repeat(array, sampling.group_size, axis=0) for array in (tokens_GL, logps_GL))
            groups.append(self.decoder.group(sample, tokens_GL, logps_GL, sampling.constrained, self.policy_version))
        return groups

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> str:
        """Load full weights in place; the checksum is that of the tensors handed to vLLM's loader.

        Raises:
            ValueError: when the weights are not those of this model. Nothing has been touched then; vLLM itself would
                pass over a missing tensor and break off half-way at a wrong shape.
        """
        require_fit(weights, self._shapes, version)
        named = dict(weights)
        if self._tied:
            head, embedding = self._tied
            named[head] = named[embedding]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(named.items())})
        self.llm.reset_prefix_cache()
        self._adapter = None
        self.policy_version = version
        return checksum(weights)

    def load_adapter(self, adapter: Mapping[str, torch.Tensor], config_json: str, version: int) -> str:
        """Serve from now on with a LoRA adapter over the weights the engine started with.

        Args:
            adapter: PEFT's adapter state dict.
            config_json: PEFT's `adapter_config.json`.
            version: policy version; a new adapter id each time, so that vLLM cannot serve a stale one.
        """
        from safetensors.torch import save_file

        if self._adapter:  # the last version is not asked for again
            shutil.rmtree(self._adapter.lora_path)
        folder = Path(self._folder.name) / f"adapter-{version}"
        folder.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in adapter.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(config_json)
        self._adapter = LoRARequest(f"policy-{version}", version + 1, str(folder))
        self.llm.reset_prefix_cache()
        self.policy_version = version
        return checksum(adapter)

    def serve(self, decoder: Decoder) -> None:
        """Change the catalogue: from now on items of `decoder` are written, and no others."""
        folder = Path(self._folder.name)
        old, self._trie_folder = self._trie_folder, folder / f"trie-{int(self._trie_folder.name.split('-')[1]) + 1}"
        decoder.trie.save(self._trie_folder)
        IN_PROCESS[str(self._trie_folder)] = decoder.trie
        if old.name != FIRST_TRIE:  # requests that name none mean that one
            del IN_PROCESS[str(old)]
            shutil.rmtree(old)  # where it is still mapped its memory stays
        self.decoder, self.trie = decoder, TorchTrie(decoder.trie)

    def _wishes(self, samples: Sequence[Sample], sampling: Sampling) -> list[dict[str, Any]]:
        """What requests for samples ask of the trie (`rollout.vllm_trie.Wish`)."""
        wish: dict[str, Any] = {} if self._trie_folder.name == FIRST_TRIE else {"trie": str(self._trie_folder)}
        if sampling.items > 1:
            wish |= {"items": sampling.items, "marks": list(self.decoder.marks)}
        views = self.decoder.views(samples)
        if views is None:
            return [wish] * len(samples)
        return [wish | {"only" if listed else "without": leaves.tolist()} for listed, leaves in views.restrictions()]

    def _params(self, sampling: Sampling, wish: Mapping[str, Any], **settings: Any) -> SamplingParams:
        return SamplingParams(
            top_p=sampling.top_p,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            ignore_eos=True,
            detokenize=False,
            extra_args={OPT_IN: dict(wish) or 0} if sampling.constrained else None,
            **settings,
        )

    def _run(self, prompts: Sequence[Sequence[int]], params: list[SamplingParams]) -> list[Any]:
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        if self._failure:
            raise RuntimeError(f"this engine has failed before and holds half-done requests: {self._failure}")
        try:
            return self.llm.generate(requests, params, use_tqdm=False, lora_request=self._adapter)
        except Exception as error:
            self._failure = str(error)  # vLLM would go on with the old requests, and never end
            raise

    def _search(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """Beams and draws without replacement, level by level."""
        if not samples:
            return []
        views, width = self.decoder.views(samples), sampling.group_size
        trie, start_B = self.trie.under(views), roots(views, len(samples))
        levels = _Levels(self, trie, samples, sampling)
        if sampling.sampler == "beam":
            found = likeliest(levels, trie, start_B, width)
            return self.decoder.groups_of_leaves(samples, *found, policy_version=self.policy_version)
        leaves, logps, inclusion = distinct(levels, trie, start_B, samples, width, sampling.seed)
        return self.decoder.groups_of_leaves(samples, leaves, logps, inclusion, policy_version=self.policy_version)


def _logps(branch: Any) -> tuple[float, ...]:
    return tuple(step[token].logprob for step, token in zip(branch.logprobs, branch.token_ids, strict=True))


class _Levels:
    """The children's log-probabilities by one call a level for all branches; prompts are cached by their prefix.

    Beams need the likeliest children of a branch only, draws without replacement need all.
    """

    def __init__(self, engine: VLLMEngine, trie: TorchTrie, samples: Sequence[Sample], sampling: Sampling) -> None:
        self.engine, self.trie, self.samples, self.sampling = engine, trie, samples, sampling
        self.wishes = engine._wishes(samples, sampling)
        self.paths: list[list[tuple[int, ...]]] = []

    def __call__(
        self, places_BW: torch.Tensor, parents_BW: torch.Tensor, alive_BW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._grow(places_BW, parents_BW)
        trie, places_N, level = self.trie, places_BW.reshape(-1), len(self.paths[0][0])
        child_NC, there_NC = trie.children(places_N)
        most = child_NC.shape[1]
        # The temperature divides the logits before processed_logprobs are taken.
        params = [
            self.engine._params(
                self.sampling,
                wish | {"prefix": level},
                max_tokens=1,
                temperature=self.sampling.temperature,
                logprobs=most if self.sampling.sampler == "unique" else min(self.sampling.group_size, most),
            )
            for wish in self.wishes
        ]
        logps_NC = torch.full(child_NC.shape, float("-inf"))
        alone_N = there_NC.sum(dim=1) == 1
        logps_NC[alone_N, 0] = 0.0  # an only child is certain: no need to ask, and deep in a trie most are
        asked_N = (alive_BW.reshape(-1) & ~alone_N).nonzero()[:, 0]
        if not len(asked_N):
            return logps_NC, child_NC
        branches = [(row, path) for row, paths in enumerate(self.paths) for path in paths]
        asked = [branches[n] for n in asked_N.tolist()]
        prompts = [(*self.samples[row].prompt_ids, *path) for row, path in asked]
        outputs = self.engine._run(prompts, [params[row] for row, _ in asked])
        given = [output.outputs[0].logprobs[0] for output in outputs]
        counts = torch.tensor([len(entries) for entries in given])
        tokens_E = torch.tensor([token for entries in given for token in entries])
        values_E = torch.tensor([entry.logprob for entries in given for entry in entries.values()])
        owners_E = asked_N.repeat_interleave(counts)
        child_E = trie.find(places_N[owners_E], tokens_E, level)
        legal_E = values_E.isfinite() & (child_E >= 0)
        owners_E, child_E = owners_E[legal_E], child_E[legal_E]
        # Children of a row ascend, and rows do with this key, so that each value finds its column.
        span, row_N1 = int(child_NC.max()) + 1, torch.arange(len(child_NC))[:, None]
        column_E = torch.searchsorted((row_N1 * span + child_NC)[there_NC], owners_E * span + child_E)
        logps_NC.view(-1)[there_NC.view(-1).nonzero()[:, 0][column_E]] = values_E[legal_E]
        return logps_NC, child_NC

    def _grow(self, places_BW: torch.Tensor, parents_BW: torch.Tensor) -> None:
        if not self.paths:
            self.paths = [[()] for _ in self.samples]
            return
        tokens_BW = self.trie.tokens(places_BW).tolist()
        self.paths = [
            [(*paths[parent], token) for parent, token in zip(parents, tokens, strict=True)]
            for paths, parents, tokens in zip(self.paths, parents_BW.tolist(), tokens_BW, strict=True)
        ]
