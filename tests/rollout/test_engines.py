"""The Hugging Face and the vLLM engine: one distribution, before and after new weights, whatever the model folder says.

Log-probabilities of either are compared with brute force on the Hugging Face model (`tests/oracle.py`): no engine is
its own witness.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rl.tiny import save_policy
from rollout.decode import Decoder
from rollout.hf_engine import HFEngine, load_policy
from rollout.types import Engine, RolloutGroup, Sample, Sampling
from rollout.weights import checksum, merged_weights
from tests import oracle
from tests.conftest import MAX_PROMPT, hostile_generation_config, peaked_model
from tests.rollout.conftest import BOTH
from tests.rollout.test_weights import adapted

if TYPE_CHECKING:
    from rollout.vllm_engine import VLLMEngine

SAMPLINGS = [
    pytest.param(Sampling(6, seed=1), id="sample"),
    pytest.param(Sampling(6, temperature=0.6, seed=1), id="cool"),
    pytest.param(Sampling(6, temperature=1.7, seed=1), id="hot"),
    pytest.param(Sampling(2, "greedy"), id="greedy"),
    pytest.param(Sampling(6, "unique", temperature=1.3, seed=1), id="unique"),
    pytest.param(Sampling(5, "beam"), id="beam"),
    pytest.param(Sampling(5, "beam", temperature=0.6), id="cool beam"),
    pytest.param(Sampling(6, constrained=False, seed=1), id="whole vocabulary"),
]


@pytest.fixture(scope="module")
def untied_policy(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    save_policy(peaked_model(tiny_tokenizer, 6, tied=False), tiny_tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def start_vllm(tiny_decoder: Decoder, _vllm_session: VLLMEngine) -> Iterator[Callable[..., VLLMEngine]]:
    """Start more vLLM engines in this process; they live to its end, since one that ends takes vLLM's globals along."""
    engines = []

    def start(folder: Path, **settings: Any) -> VLLMEngine:
        from rollout.vllm_engine import VLLMEngine

        engines.append(VLLMEngine(str(folder), tiny_decoder, dtype="float32", max_prompt_tokens=MAX_PROMPT, **settings))
        return engines[-1]

    yield start


def written(groups: list[RolloutGroup]) -> list[list[tuple[int, ...]]]:
    return [[rollout.token_ids for rollout in group.rollouts] for group in groups]


def scores(groups: list[RolloutGroup]) -> np.ndarray:
    return np.array([[rollout.logps_sampler for rollout in group.rollouts] for group in groups])


def assert_scored_by(model: Any, groups: list[RolloutGroup], decoder: Decoder, sampling: Sampling) -> None:
    """Every token's log-probability is that of the model on the support it was drawn from."""
    paths = [tuple(path) for path in decoder.paths.tolist()] if sampling.constrained else None
    for group in groups:
        tokens = np.array([rollout.token_ids for rollout in group.rollouts])
        expected = oracle.token_logps(model, group.sample.prompt_ids, tokens, paths, sampling.temperature)
        actual = np.array([rollout.logps_sampler for rollout in group.rollouts])
        np.testing.assert_allclose(actual, expected, atol=1e-4, err_msg=group.sample.record.source)


# --- the distribution, under a hostile generation_config.json


@BOTH
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.slow
def test_logps_and_legality(
    engine: Engine, sampling: Sampling, tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]
) -> None:
    groups = engine.generate(tiny_samples, sampling)
    assert [group.sample for group in groups] == tiny_samples
    assert {len(group) for group in groups} == {sampling.group_size}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert all(rollout.legal for rollout in rollouts) or not sampling.constrained
    assert {rollout.on_trie for rollout in rollouts} == {(sampling.constrained,) * 3}
    assert {rollout.policy_version for rollout in rollouts} == {0}
    assert_scored_by(tiny_model, groups, tiny_decoder, sampling)


def test_greedy_takes_no_temperature() -> None:
    with pytest.raises(ValueError, match="greedy"):
        Sampling(1, "greedy", temperature=0.5)


@BOTH
def test_hostile_settings_do_not_sharpen_the_draws(
    engine: Engine, tiny_model: Qwen3ForCausalLM, tiny_decoder: Decoder, tiny_samples: list[Sample]
) -> None:
    """Frequencies of the first token over 24 prompts x 128 draws are its exact probabilities: top_k 1 would show.

    Codes that are "end of text" in the folder's configs are drawn as often as any other.
    """
    first = [tuple(path[:1]) for path in tiny_decoder.paths.tolist()]
    tokens = sorted({path[0] for path in first})
    exact = np.mean(
        [
            np.exp(oracle.token_logps(tiny_model, s.prompt_ids, np.array(tokens)[:, None], first)[:, 0])
            for s in tiny_samples
        ],
        axis=0,
    )
    groups = engine.generate(tiny_samples, Sampling(128, seed=7))
    drawn = [rollout.token_ids[0] for group in groups for rollout in group.rollouts]
    observed = np.array([drawn.count(token) for token in tokens]) / len(drawn)
    assert exact[0] > 0.02  # the one that the configs call end of text
    assert np.abs(observed - exact).sum() / 2 < 0.04  # total variation; its expected value is about 0.02
    assert all(rollout.legal for group in groups for rollout in group.rollouts)


@BOTH
def test_seeds(engine: Engine, tiny_samples: list[Sample]) -> None:
    """A seed gives the same again, in any order and company; another seed gives something else."""
    first = engine.generate(tiny_samples, Sampling(4, seed=1))
    again = engine.generate(tiny_samples, Sampling(4, seed=1))
    backwards = engine.generate(tiny_samples[::-1], Sampling(4, seed=1))[::-1]
    some = engine.generate(tiny_samples[3:5], Sampling(4, seed=1))
    assert written(first) == written(again) == written(backwards)
    assert written(first[3:5]) == written(some)
    np.testing.assert_allclose(scores(first), scores(again), atol=2e-5)
    other = engine.generate(tiny_samples, Sampling(4, seed=2))
    assert sum(a != b for a, b in zip(written(first), written(other), strict=True)) > len(tiny_samples) // 2


@BOTH
def test_draws_of_a_group_differ(engine: Engine, tiny_samples: list[Sample]) -> None:
    """A group is G draws, not one draw G times."""
    groups = engine.generate(tiny_samples, Sampling(8, temperature=1.5, seed=1))
    assert np.mean([len({rollout.token_ids for rollout in group.rollouts}) for group in groups]) > 3


@BOTH
def test_no_samples(engine: Engine) -> None:
    assert engine.generate([], Sampling(2)) == []
    assert engine.generate([], Sampling(2, "beam")) == []
    assert engine.generate([], Sampling(2, "unique")) == []


@BOTH
def test_whole_vocabulary_gives_illegal_ones(engine: Engine, tiny_samples: list[Sample]) -> None:
    rollouts = [r for g in engine.generate(tiny_samples, Sampling(8, constrained=False)) for r in g.rollouts]
    illegal = [rollout for rollout in rollouts if not rollout.legal]
    assert len(illegal) > len(rollouts) // 2
    assert all(rollout.sids == () and rollout.finish_reason == "illegal" for rollout in illegal)
    assert len({len(rollout.token_ids) for rollout in rollouts}) == 1  # no early stop at "end of text"


# --- one engine against the other


@pytest.mark.vllm
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(2, "greedy"),
        Sampling(1, "greedy", constrained=False),
        Sampling(1, "beam"),
        Sampling(9, "beam"),
        Sampling(500, "beam"),
        Sampling(9, "unique", seed=4),
        Sampling(1, "unique", temperature=2.0),
    ],
    ids=["greedy", "greedy over the vocabulary", "beam 1", "beam 9", "beam of all items", "unique 9", "unique 1"],
)
def test_same_lists(
    hf_engine: HFEngine, vllm_engine: VLLMEngine, sampling: Sampling, tiny_samples: list[Sample]
) -> None:
    some = tiny_samples[:3] if sampling.group_size == 500 else tiny_samples
    mine, other = hf_engine.generate(some, sampling), vllm_engine.generate(some, sampling)
    if sampling.group_size < 500:
        assert written(mine) == written(other)
    else:  # near ties in the tail may swap: the items and every score are the same
        assert {len(group) for group in other} == {hf_engine.decoder.trie.num_leaves}
        for one, two in zip(mine, other, strict=True):
            by_tokens = {rollout.token_ids: rollout.logps_sampler for rollout in one.rollouts}
            assert by_tokens.keys() == {rollout.token_ids for rollout in two.rollouts}
            for rollout in two.rollouts:
                np.testing.assert_allclose(rollout.logps_sampler, by_tokens[rollout.token_ids], atol=1e-4)
            logps = [rollout.logp for rollout in two.rollouts]
            assert logps == sorted(logps, reverse=True)
        return
    np.testing.assert_allclose(scores(mine), scores(other), atol=1e-4)


# --- new weights


def newcomers(base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Policies that the engines have not started with."""
    other_embedding = copy.deepcopy(base)
    with torch.no_grad():
        # Only the (tied) embedding differs: an engine whose head stays the old one is far off.
        other_embedding.model.embed_tokens.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    return {
        "lora": adapted(base),
        "dora": adapted(base, use_dora=True),
        "all weights": peaked_model(tokenizer, 9),
        "embedding only": other_embedding,
    }


@BOTH
@pytest.mark.parametrize("kind", ["lora", "dora", "all weights", "embedding only"])
def test_new_weights_are_served(
    engine: Engine,
    kind: str,
    tiny_model: Qwen3ForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_decoder: Decoder,
    tiny_samples: list[Sample],
) -> None:
    policy = newcomers(tiny_model, tiny_tokenizer)[kind]
    old = engine.generate(tiny_samples, Sampling(1, "greedy"))
    weights = merged_weights(policy)
    assert engine.load_weights(weights, 3) == checksum(weights)
    assert engine.policy_version == 3
    for sampling in (Sampling(4, seed=2), Sampling(4, "beam"), Sampling(1, "greedy")):
        new = engine.generate(tiny_samples, sampling)
        assert {group.policy_version for group in new} == {3}
        assert all(rollout.legal for group in new for rollout in group.rollouts)
        assert_scored_by(policy, new, tiny_decoder, sampling)
    assert sum(a != b for a, b in zip(written(new), written(old), strict=True)) > len(tiny_samples) // 3
    # The old weights again give the old policy again: nothing of the new one, its prefix cache included, stays behind.
    engine.load_weights(merged_weights(tiny_model), 4)
    assert written(engine.generate(tiny_samples, Sampling(1, "greedy"))) == written(old)
    assert_scored_by(tiny_model, engine.generate(tiny_samples, Sampling(2)), tiny_decoder, Sampling(2))


@pytest.mark.vllm
def test_engines_agree_on_version_and_checksum(
    hf_engine: HFEngine, vllm_engine: VLLMEngine, tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample]
) -> None:
    seen = []
    for version in (1, 2, 3):
        weights = merged_weights(adapted(tiny_model, seed=version))
        answers = [engine.load_weights(weights, version) for engine in (hf_engine, vllm_engine)]
        assert answers == [checksum(weights)] * 2
        assert hf_engine.policy_version == vllm_engine.policy_version == version
        lists = [written(engine.generate(tiny_samples, Sampling(4, "beam"))) for engine in (hf_engine, vllm_engine)]
        assert lists[0] == lists[1]
        seen.append(answers[0])
    assert len(set(seen)) == 3


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, id="embedding, tied"),
        pytest.param({"modules_to_save": ["embed_tokens"]}, id="embedding"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="head"),
    ],
)
def test_adapted_vocabulary_of_a_tied_model(
    settings: dict[str, Any],
    vllm_engine: VLLMEngine,
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
    tiny_samples: list[Sample],
) -> None:
    """Served as the policy is, or refused."""
    policy = adapted(tiny_model, **settings)
    try:
        weights = merged_weights(policy)
        refused = vllm_engine.load_weights(weights, 1) != checksum(weights)
    except ValueError:
        refused = True
    if not refused:
        groups = vllm_engine.generate(tiny_samples, Sampling(2))
        assert_scored_by(policy, groups, tiny_decoder, Sampling(2))


# --- weights that do not fit


def broken(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        return {key: tensor for key, tensor in weights.items() if key != name}
    if how == "shape":
        return {**weights, name: weights[name][:-1]}
    return {**weights, "model.layers.1.mlp.new_proj.weight": weights[name]}


@pytest.mark.parametrize(("how", "message"), [("missing", "up_proj"), ("shape", "up_proj"), ("unknown", "new_proj")])
def test_hf_refuses_other_weights(hf_engine: HFEngine, how: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)version 5.*{message}"):
        hf_engine.load_weights(broken(merged_weights(hf_engine.model), how), 5)
    assert hf_engine.policy_version == 0


def test_hf_refuses_an_untied_model_without_its_head(
    tiny_tokenizer: PreTrainedTokenizerFast, tiny_decoder: Decoder
) -> None:
    model = peaked_model(tiny_tokenizer, 2, tied=False)
    weights = merged_weights(model)
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head"):
        HFEngine(model, tiny_decoder).load_weights(weights, 1)


@pytest.mark.vllm
@pytest.mark.parametrize("how", ["missing", "shape", "unknown"])
def test_vllm_refuses_other_weights(
    how: str,
    untied_policy: Path,
    tiny_decoder: Decoder,
    tiny_samples: list[Sample],
    start_vllm: Callable[..., VLLMEngine],
) -> None:
    """Refused before anything is touched: the engine goes on with the weights it has, and takes good ones later."""
    engine, base = start_vllm(untied_policy), load_policy(untied_policy, dtype="float32")
    with pytest.raises(ValueError, match="_proj"):
        engine.load_weights(broken(merged_weights(base), how), 5)
    assert engine.policy_version == 0
    assert_scored_by(base, engine.generate(tiny_samples[:3], Sampling(2)), tiny_decoder, Sampling(2))
    policy = adapted(base)
    engine.load_weights(merged_weights(policy), 6)
    assert_scored_by(policy, engine.generate(tiny_samples[:3], Sampling(2)), tiny_decoder, Sampling(2))


# --- other models


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
def test_hf_with_other_heads_and_attention(
    tied: bool,
    attention: str,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_decoder: Decoder,
    tiny_samples: list[Sample],
) -> None:
    model = peaked_model(tiny_tokenizer, 4, tied=tied)
    save_policy(model, tiny_tokenizer, tmp_path)
    hostile_generation_config(tmp_path, [266])
    policy = load_policy(tmp_path, dtype="float32", attention=attention)
    assert (policy.lm_head.weight is policy.model.embed_tokens.weight) == tied
    engine = HFEngine(policy, tiny_decoder, max_batch_prompts=7)
    for sampling in (Sampling(3), Sampling(3, "beam")):
        assert_scored_by(model, engine.generate(tiny_samples, sampling), tiny_decoder, sampling)
    new = peaked_model(tiny_tokenizer, 5, tied=tied)
    assert engine.load_weights(merged_weights(new), 1) == checksum(merged_weights(new))
    assert_scored_by(new, engine.generate(tiny_samples, Sampling(3)), tiny_decoder, Sampling(3))


def test_load_policy_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path=.*nowhere: no such folder"):
        load_policy(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model.path=.*no causal language model could be loaded"):
        load_policy(tmp_path)


# --- adapters in vLLM, over a model with a head of its own


@pytest.mark.vllm
def test_adapters_are_served(
    untied_policy: Path, tiny_decoder: Decoder, tiny_samples: list[Sample], start_vllm: Callable[..., VLLMEngine]
) -> None:
    """`rollout.sync: adapter`: each adapter in turn, then merged weights, on one engine over an untied model."""
    lora_engine = start_vllm(untied_policy, lora_rank=8)
    base = load_policy(untied_policy, dtype="float32")
    assert_scored_by(base, lora_engine.generate(tiny_samples, Sampling(3)), tiny_decoder, Sampling(3))
    outputs = []
    for version in (1, 2, 3):
        policy = adapted(base, seed=version)
        tensors = get_peft_model_state_dict(policy)
        config = json.dumps(policy.peft_config["default"].to_dict(), default=lambda value: sorted(value))
        assert lora_engine.load_adapter(tensors, config, version) == checksum(tensors)
        for sampling in (Sampling(3, seed=1), Sampling(4, "beam")):
            groups = lora_engine.generate(tiny_samples, sampling)
            assert {group.policy_version for group in groups} == {version}
            assert all(rollout.legal for group in groups for rollout in group.rollouts)
            assert_scored_by(policy, groups, tiny_decoder, sampling)
        outputs.append(written(groups))
    assert outputs[0] != outputs[1] != outputs[2]
    policy = adapted(base, seed=8)
    weights = merged_weights(policy)
    assert lora_engine.load_weights(weights, 4) == checksum(weights)
    assert_scored_by(policy, lora_engine.generate(tiny_samples, Sampling(3)), tiny_decoder, Sampling(3))
