"""Thoughts in training: which tokens end and close them, which rows think, what is taken from those that do not end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from configs.schema import ThoughtConfig
from rewards.protocol import ScoredGroup
from rollout.decode import Decoder
from rollout.sid import SidVocab
from rollout.thought import Writer, continue_
from rollout.types import Sample, Sampling, Thought


def thought_of(
    settings: ThoughtConfig, tokenizer: PreTrainedTokenizerBase, vocab: SidVocab, decoder: Decoder
) -> Thought | None:
    """How thoughts are written, in the tokens of a policy; None where none are.

    Raises:
        ValueError: when the text that ends a thought is no single token.
    """
    if not settings.max_tokens:
        return None
    close = list(tokenizer(settings.close, add_special_tokens=False)["input_ids"]) if settings.close else []
    if settings.end:
        ids = tokenizer(settings.end, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"thought.end={settings.end!r} stops the text, so it must be one token; the tokenizer writes {len(ids)}"
            )
        end, close = int(ids[0]), [*close, *vocab.begin_ids]
    elif not vocab.begin_ids:
        raise ValueError(
            "thought.end is unset, and the data's Sids have no begin mark that could end a thought: set it"
        )
    elif close:
        raise ValueError(
            f"thought.close={settings.close!r} stands between thought.end and the item, and thought.end is unset: the "
            "begin mark ends the thought, right before the item"
        )
    else:
        end = vocab.begin_ids[0]
    banned = [] if settings.item_tokens else [part for pair in decoder.sid_tokens for part in _around(pair, end)]
    eos = tokenizer.eos_token_id
    stops = () if eos is None or eos == end else (int(eos),)
    return Thought(settings.max_tokens, end, stops, tuple(map(int, close)), tuple(banned), settings.rollouts)


def thinks(settings: ThoughtConfig, task: str) -> bool:
    """Whether rows of a task think."""
    return settings.max_tokens > 0 and (not settings.tasks or task in settings.tasks)


def thought_first(engine: Writer, samples: Sequence[Sample], thought: Thought | None) -> list[Sample]:
    """Samples whose prompts go on with the policy's likeliest thought, where they think; for evaluation."""
    result = list(samples)
    rows = [row for row, sample in enumerate(samples) if thought and sample.thinks]
    if thought and rows:
        sampling = Sampling(1, "greedy", thought=replace(thought, rollouts=1))
        texts = engine.write([samples[row] for row in rows], sampling, 1)
        for row, (text,) in zip(rows, texts, strict=True):
            result[row] = replace(continue_(samples[row], text, thought, 0), record=samples[row].record)
    return result


def penalised(scored: Sequence[ScoredGroup], penalty: float) -> list[ScoredGroup]:
    """Less reward for rollouts whose thought was closed by force."""
    return [
        replace(
            group,
            total=tuple(t - penalty * r.truncated for t, r in zip(group.total, group.group.rollouts, strict=True)),
        )
        for group in scored
    ]


def _around(pair: tuple[int, int], token: int) -> list[tuple[int, int]]:
    """A range of tokens without one of them."""
    first, stop = pair
    if not first <= token < stop:
        return [pair]
    return [part for part in ((first, token), (token + 1, stop)) if part[0] < part[1]]
