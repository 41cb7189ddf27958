"""Thought, then items: both engines, against brute force on the model; what is drawn, what is set, what is banned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from rollout.decode import Decoder, ranges_of
from rollout.types import Engine, Rollout, Sample, Sampling, Thought
from tests import oracle
from tests.rollout.conftest import BOTH

MAX = 6


@pytest.fixture(scope="module")
def thought(tiny_tokenizer: PreTrainedTokenizerFast, tiny_decoder: Decoder) -> Thought:
    """Texts of at most 6 tokens out of 12 letters, of which one ends them and one breaks them off."""
    letters = [tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijkl"]
    others = np.setdiff1d(np.arange(tiny_decoder.trie.vocab_size), letters)
    return Thought(MAX, letters[0], (letters[1],), (letters[2], letters[3]), ranges_of(others), rollouts=2)


def test_sids_are_what_text_may_not_hold(tiny_decoder: Decoder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    inside = {token for first, stop in tiny_decoder.sid_tokens for token in range(first, stop)}
    assert inside == {
        i for token, i in tiny_tokenizer.get_vocab().items() if token in tiny_decoder.catalog.format.tokens()
    }


@torch.no_grad()
def text_logps(
    model: Qwen3ForCausalLM, before: list[int], text: tuple[int, ...], thought: Thought, t: float
) -> np.ndarray:
    """Log-probability of each token of a text, over what text may hold."""
    logits = model(input_ids=torch.tensor([[*before, *text]])).logits[0, len(before) - 1 : -1] / t
    for first, stop in thought.banned:
        logits[:, first:stop] = float("-inf")
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(text)[:, None])[:, 0].numpy()


def parts(rollout: Rollout, thought: Thought) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The drawn text, what was set, and the rest."""
    drawn = rollout.forced.index(True)
    return (
        rollout.token_ids[:drawn],
        rollout.token_ids[drawn : rollout.thought_tokens],
        rollout.token_ids[rollout.thought_tokens :],
    )


@BOTH
@pytest.mark.parametrize("items", [1, 2])
def test_thoughts_then_items(
    engine: Engine,
    items: int,
    thought: Thought,
    tiny_samples: list[Sample],
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
) -> None:
    samples = [replace(sample, thinks=row % 3 != 0) for row, sample in enumerate(tiny_samples[:9])]
    groups = engine.generate(samples, Sampling(6, temperature=1.4, items=items, thought=thought, seed=3))
    paths = [tuple(path) for path in tiny_decoder.paths.tolist()]
    seen = {"ended": 0, "stopped": 0, "cut": 0}
    for sample, group in zip(samples, groups, strict=True):
        assert group.sample == sample and len(group) == 6
        for index, rollout in enumerate(group.rollouts):
            assert rollout.legal and len(rollout.sids) == items
            if not sample.thinks:
                assert (rollout.thought, rollout.thought_tokens, rollout.text_tokens) == (-1, 0, 0)
                continue
            assert rollout.thought == index // 2
            text, closed, rest = parts(rollout, thought)
            assert 1 <= len(text) <= MAX and rollout.text_tokens == len(text)
            assert not any(first <= token < stop for token in text for first, stop in thought.banned)
            assert thought.end not in text[:-1] and thought.stops[0] not in text[:-1]
            ended = text[-1] == thought.end
            assert closed == (thought.close if ended else (thought.end, *thought.close))
            assert rollout.truncated == (not ended)
            assert ended or text[-1] in thought.stops or len(text) == MAX
            seen["ended" if ended else "stopped" if text[-1] in thought.stops else "cut"] += 1
            logps = np.array(rollout.logps_sampler)
            expected = text_logps(tiny_model, list(sample.prompt_ids), text, thought, 1.4)
            np.testing.assert_allclose(logps[: len(text)], expected, atol=1e-4)
            assert (logps[len(text) : rollout.thought_tokens] == 0).all()
            before = [*sample.prompt_ids, *text, *closed]
            expected = oracle.token_logps(tiny_model, before, np.array([rest[:3]]), paths, 1.4)[0]
            np.testing.assert_allclose(logps[rollout.thought_tokens :][:3], expected, atol=1e-4)
            assert rollout.logp_items == pytest.approx(logps[rollout.thought_tokens :].sum())
        if sample.thinks:
            texts = [parts(rollout, thought)[0] for rollout in group.rollouts]
            assert texts[::2] == texts[1::2], "two rollouts continue each thought"
    assert min(seen.values()) > 0, f"all ways to end are met: {seen}"
    assert len({parts(r, thought)[0] for g in groups if g.sample.thinks for r in g.rollouts}) > 12


@BOTH
def test_beams_after_thoughts(
    engine: Engine,
    thought: Thought,
    tiny_samples: list[Sample],
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
) -> None:
    """Any sampler can follow: here the two likeliest items of each thought."""
    samples = [replace(sample, thinks=True) for sample in tiny_samples[:3]]
    paths = [tuple(path) for path in tiny_decoder.paths.tolist()]
    for group in engine.generate(samples, Sampling(4, "beam", thought=thought)):
        for first, second in zip(group.rollouts[::2], group.rollouts[1::2], strict=True):
            text, closed, _ = parts(first, thought)
            before = [*group.sample.prompt_ids, *text, *closed]
            logps = oracle.token_logps(tiny_model, before, np.array(paths), paths)
            found = [paths[index] for index in oracle.beams(logps, paths, 2)]
            assert [parts(one, thought)[2] for one in (first, second)] == found


@BOTH
def test_frequencies_of_text(
    engine: Engine, thought: Thought, tiny_samples: list[Sample], tiny_model: Qwen3ForCausalLM
) -> None:
    """The first token of 2,000 thoughts is drawn as often as its probability says."""
    sample = replace(tiny_samples[4], thinks=True)
    (group,) = engine.generate([sample], Sampling(2000, thought=replace(thought, max_tokens=1, rollouts=1), seed=5))
    vocab = tiny_model.config.vocab_size
    exact = np.exp(
        [text_logps(tiny_model, list(sample.prompt_ids), (token,), thought, 1.0)[0] for token in range(vocab)]
    )
    drawn = np.bincount([rollout.token_ids[0] for rollout in group.rollouts], minlength=vocab) / 2000
    assert np.abs(drawn - exact).sum() / 2 < 2 * np.sqrt(exact * (1 - exact) / (2 * np.pi * 2000)).sum()


def test_ranges() -> None:
    assert ranges_of(np.array([3, 4, 5, 9, 11, 12])) == ((3, 6), (9, 10), (11, 13))
    assert ranges_of(np.array([7])) == ((7, 8),)


def test_sampling_refuses(thought: Thought) -> None:
    with pytest.raises(ValueError, match="group_size=5 must be a multiple of the 2 rollouts of a thought"):
        Sampling(5, thought=thought)
    with pytest.raises(ValueError, match="constrained=True"):
        Sampling(4, thought=thought, constrained=False)
