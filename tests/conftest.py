"""One small world for all tests that need a policy: catalogue, policy folder, samples, engines, Ray.

Engines and Ray start when a test first asks for them, once a session. Nothing here imports vllm or ray before that.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rl.tiny import build_model, build_tokenizer, save_policy
from rollout.catalog import Catalog
from rollout.decode import Decoder
from rollout.hf_engine import HFEngine, load_policy
from rollout.sid import SidVocab, letters_format
from rollout.types import Record, Sample

if TYPE_CHECKING:
    from rollout.vllm_engine import VLLMEngine

torch.set_num_threads(1)  # tiny models: more threads only fight each other and the engines

LEVELS, CODES, ITEMS = 3, 16, 200
MAX_PROMPT = 320


def peaked_model(tokenizer: PreTrainedTokenizerFast, seed: int, *, tied: bool = True) -> Qwen3ForCausalLM:
    """A tiny Qwen3 whose next-token distributions are far from uniform and depend on the whole prompt."""
    torch.manual_seed(seed)
    model = build_model(tokenizer, hidden_size=64, layers=2, heads=2)
    if not tied:
        model.config.tie_word_embeddings = False
        model = Qwen3ForCausalLM(model.config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3 if "embed" in name or "lm_head" in name else 0.15)
    return model.eval()


def hostile_generation_config(folder: Path, eos: list[int]) -> None:
    """Settings that would wreck the policy's distribution if any engine read them."""
    settings = {
        "do_sample": True,
        "temperature": 0.01,
        "top_k": 1,
        "top_p": 0.1,
        "min_p": 0.9,
        "repetition_penalty": 5.0,
        "eos_token_id": eos,
        "min_new_tokens": 50,
        "max_new_tokens": 1,
        "suppress_tokens": eos,
        "no_repeat_ngram_size": 1,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings))


def need_vllm() -> None:
    """Skips the test where vLLM is absent; else sets vLLM's environment, by importing the module that does."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    importlib.import_module("rollout.vllm_engine")


@pytest.fixture(scope="session")
def tiny_catalog() -> Catalog:
    """200 items of 3 x 16 codes, about 190 Sids: nodes with one child and with many, some Sids shared."""
    rng = np.random.default_rng(7)
    codes = np.minimum(rng.geometric(0.18, (ITEMS, LEVELS)) - 1, CODES - 1)
    codes[-6:] = codes[:6]
    catalog = Catalog.build(letters_format((CODES,) * LEVELS), [f"i{index}" for index in range(ITEMS)], codes)
    assert catalog.collisions >= 6
    return catalog


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_catalog: Catalog) -> PreTrainedTokenizerFast:
    return build_tokenizer(tiny_catalog.format)


@pytest.fixture(scope="session")
def tiny_vocab(tiny_catalog: Catalog, tiny_tokenizer: PreTrainedTokenizerFast) -> SidVocab:
    return SidVocab.bind(tiny_catalog.format, tiny_tokenizer.get_vocab().get)


@pytest.fixture(scope="session")
def tiny_policy(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast, tiny_vocab: SidVocab
) -> Path:
    """Folder of a tied policy with a hostile generation_config.json; its end-of-text token is a code of the items."""
    folder = tmp_path_factory.mktemp("policy")
    model = peaked_model(tiny_tokenizer, 0)
    eos = [int(ids[0]) for ids in tiny_vocab.level_ids]
    model.config.eos_token_id = eos[0]
    save_policy(model, tiny_tokenizer, folder)
    hostile_generation_config(folder, eos)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_policy: Path) -> Qwen3ForCausalLM:
    """The policy as the oracle sees it: never changed by any test."""
    return load_policy(tiny_policy, dtype="float32")


@pytest.fixture(scope="session")
def tiny_decoder(tiny_catalog: Catalog, tiny_vocab: SidVocab, tiny_model: Qwen3ForCausalLM) -> Decoder:
    return Decoder.build(tiny_catalog, tiny_vocab, tiny_model.config.vocab_size)


@pytest.fixture(scope="session")
def tiny_samples(tiny_catalog: Catalog, tiny_tokenizer: PreTrainedTokenizerFast) -> list[Sample]:
    """24 samples with prompts of 1 to 300 tokens: three are longer than a block of vLLM's prefix cache (128 on CPU)."""
    rng = np.random.default_rng(11)
    samples = []
    for row in range(24):
        length = {7: 45, 12: 60, 21: 90}.get(row, row % 10)
        history = tuple(int(item) for item in rng.integers(0, len(tiny_catalog), length))
        written = "".join(tiny_catalog.format.format(tiny_catalog.sid(item)) for item in history)
        text = "?" if row == 0 else f"user {row}: {written}"
        record = Record(f"tiny:{row}", f"u{row}", history, (int(rng.integers(len(tiny_catalog))),), (1.0,))
        samples.append(Sample(record, tuple(tiny_tokenizer(text)["input_ids"])))
    lengths = {len(sample.prompt_ids) for sample in samples}
    assert min(lengths) == 1 and 2 * 128 < max(lengths) <= MAX_PROMPT and len(lengths) > 8
    return samples


@pytest.fixture
def hf_engine(tiny_policy: Path, tiny_decoder: Decoder) -> HFEngine:
    """A Hugging Face engine of its own for each test; small batches, so that padding and splitting are at work."""
    return HFEngine(load_policy(tiny_policy, dtype="float32"), tiny_decoder, max_batch_prompts=5)


@pytest.fixture(scope="session")
def _vllm_session(tiny_policy: Path, tiny_decoder: Decoder) -> VLLMEngine:
    need_vllm()
    import rollout.kernels  # noqa: F401  (numba is there before vLLM starts, which it would not survive by itself)
    from rollout.vllm_engine import VLLMEngine

    return VLLMEngine(str(tiny_policy), tiny_decoder, dtype="float32", max_prompt_tokens=MAX_PROMPT + 10, items=4)


@pytest.fixture
def vllm_engine(_vllm_session: VLLMEngine, tiny_model: Qwen3ForCausalLM) -> Iterator[VLLMEngine]:
    """The session's one vLLM engine, brought back to the policy's own weights (version 0) when a test changed them."""
    from rollout.weights import merged_weights

    yield _vllm_session
    if _vllm_session.policy_version:
        _vllm_session.load_weights(merged_weights(tiny_model), 0)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[str]:
    """A Ray of this session's own."""
    from configs.schema import RayConfig
    from rl.ray_cluster import cluster

    with cluster(RayConfig()) as where:
        yield where
