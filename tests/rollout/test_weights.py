"""Merged weights against PEFT's own merge, and their checksum."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rollout.hf_engine import HFEngine
from rollout.weights import checksum, merged_weights, tied_head
from tests.conftest import peaked_model

MakePolicy = Callable[..., PeftModel]


def adapted(model: Qwen3ForCausalLM, seed: int = 1, **settings: Any) -> PeftModel:
    """A copy of the model with an adapter whose every trainable weight is random, as after training."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    torch.manual_seed(seed)
    policy = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape).to(weight.dtype))
    return policy.eval()


def logits_of(model: Any, seed: int = 0) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(5, 300, (3, 12)))
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def untied(tiny_tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    return peaked_model(tiny_tokenizer, 2, tied=False)


KINDS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "two kinds of layer": {"target_modules": ["q_proj", "down_proj"]},
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "a whole layer too": {"target_modules": ["q_proj"], "modules_to_save": ["up_proj"]},
    "a norm too": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_peft(kind: str, tied: bool, tiny_model: Qwen3ForCausalLM, untied: Qwen3ForCausalLM) -> None:
    model = tiny_model if tied else untied
    policy = adapted(model, **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    logits = logits_of(policy)
    weights = merged_weights(policy)

    expected = copy.deepcopy(policy).merge_and_unload().state_dict()
    if tied:
        del expected["lm_head.weight"]
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=1e-6, rtol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    changed = [name for name in weights if not torch.equal(weights[name], model.state_dict()[name])]
    assert changed

    # A plain model with these weights is the policy.
    plain = copy.deepcopy(model)
    plain.load_state_dict(weights, strict=not tied)
    torch.testing.assert_close(logits_of(plain), logits, atol=2e-4, rtol=1e-4)

    # The policy itself is as it was, bit by bit, and so is what it computes, also after many syncs.
    for _ in range(3):
        assert checksum(merged_weights(policy)) == checksum(weights)
    after = policy.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert torch.equal(logits_of(policy), logits)


def test_training_goes_on_after_a_merge(tiny_model: Qwen3ForCausalLM) -> None:
    """The adapter is not left marked as merged, gradients flow to it, and the next merge has the next weights."""
    policy = adapted(tiny_model).train()
    first = merged_weights(policy)
    trainable = [weight for weight in policy.parameters() if weight.requires_grad]
    policy(input_ids=torch.arange(5, 17)[None], labels=torch.arange(5, 17)[None]).loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in trainable)
    assert not any(weight.requires_grad for name, weight in policy.named_parameters() if "lora_" not in name)
    torch.optim.SGD(trainable, lr=0.1).step()
    assert checksum(merged_weights(policy)) != checksum(first)


def test_weights_are_copies(tiny_model: Qwen3ForCausalLM) -> None:
    for model in (copy.deepcopy(tiny_model), adapted(tiny_model)):
        before = checksum(merged_weights(model))
        for tensor in merged_weights(model).values():
            assert tensor.device.type == "cpu" and not tensor.requires_grad
            tensor.fill_(0.0)
        assert checksum(merged_weights(model)) == before


def test_bfloat16_policy(tiny_model: Qwen3ForCausalLM) -> None:
    """The merge is PEFT's in the base's type; the base is restored bit by bit (adding and subtracting would drift)."""
    policy = adapted(copy.deepcopy(tiny_model).bfloat16())
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    weights = merged_weights(policy)
    expected = copy.deepcopy(policy).merge_and_unload().state_dict()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_full_model(tiny_model: Qwen3ForCausalLM, untied: Qwen3ForCausalLM) -> None:
    """Without an adapter: the state dict, and no second name of a tied head."""
    assert tied_head(tiny_model) == ("lm_head.weight", "model.embed_tokens.weight")
    assert tied_head(untied) is None
    weights, own = merged_weights(tiny_model), tiny_model.state_dict()
    assert weights.keys() == own.keys() - {"lm_head.weight"}
    assert all(torch.equal(weights[name], own[name]) for name in weights)
    assert merged_weights(untied).keys() == untied.state_dict().keys()


# --- adapters on the vocabulary


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapted_head_of_an_untied_model(settings: dict[str, Any], untied: Qwen3ForCausalLM) -> None:
    policy = adapted(untied, **settings)
    weights = merged_weights(policy)
    assert not torch.equal(weights["lm_head.weight"], untied.lm_head.weight)
    plain = copy.deepcopy(untied)
    plain.load_state_dict(weights)
    torch.testing.assert_close(logits_of(plain), logits_of(policy), atol=2e-4, rtol=1e-4)


VOCABULARY = [
    pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, id="lora on the embedding"),
    pytest.param(
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, id="lora on the embedding, tied"
    ),
    pytest.param({"modules_to_save": ["embed_tokens"]}, id="the embedding itself"),
    pytest.param({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, id="the embedding itself, tied"),
    pytest.param({"modules_to_save": ["lm_head"]}, id="the head itself"),
    pytest.param({"modules_to_save": ["embed_tokens", "lm_head"]}, id="both"),
    pytest.param({"target_modules": ["q_proj"], "trainable_token_indices": [270, 271]}, id="some tokens"),
]


@pytest.mark.parametrize("settings", VOCABULARY)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapted_vocabulary_of_a_tied_model(settings: dict[str, Any], hf_engine: HFEngine) -> None:
    """Refused (by an error, or by the checksum that a fleet compares), or served as the policy is: never in silence."""
    policy = adapted(hf_engine.model, **settings)
    try:
        weights = merged_weights(policy)
        refused = hf_engine.load_weights(weights, 1) != checksum(weights)
    except ValueError:
        refused = True
    if not refused:
        torch.testing.assert_close(logits_of(hf_engine.model), logits_of(policy), atol=2e-4, rtol=1e-4)


# --- checksum


def test_checksum_depends_on_every_value_and_name() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn((7, 5), generator=generator) for name in "abc"}
    first = checksum(weights)
    assert len(first) == 32 and checksum(dict(weights)) == first
    assert checksum({name: weights[name] for name in "cab"}) == first
    seen = {first}
    for name in "abc":
        for place in ((0, 0), (6, 4), (3, 2)):
            other = {key: tensor.clone() for key, tensor in weights.items()}
            other[name][place] = torch.nextafter(other[name][place], torch.tensor(9.0))  # the smallest change there is
            seen.add(checksum(other))
    assert len(seen) == 10
    swapped = {"a": weights["b"], "b": weights["a"], "c": weights["c"]}
    renamed = {"a": weights["a"], "b": weights["b"], "d": weights["c"]}
    fewer = {"a": weights["a"], "b": weights["b"]}
    turned = {**weights, "a": weights["a"].reshape(5, 7)}
    retyped = {**weights, "a": weights["a"].view(torch.int32)}
    assert len(seen | {checksum(other) for other in (swapped, renamed, fewer, turned, retyped)}) == 15


def test_checksum_of_bfloat16_and_of_views() -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).bfloat16()
    first = checksum({"w": tensor})
    assert first == checksum({"w": tensor.clone()})
    assert first != checksum({"w": tensor.float()})
    other = tensor.clone()
    other[2, 3] = 12
    assert first != checksum({"w": other})
    assert checksum({"w": tensor.T}) == checksum({"w": tensor.T.contiguous()}) != first
    assert checksum({"w": torch.nn.Parameter(tensor)}) == first
    assert checksum({"w": torch.tensor(1.0)}) != checksum({"w": torch.tensor([1.0])})  # scalars too
    assert checksum({}) == checksum({})
