"""Thought, then items: free text up to a limit, then items under the trie that continue it.

An engine writes text and items each in its own way; what puts them together is here and the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rollout.types import Prompted, Rollout, RolloutGroup, Sample, Sampling, Thought


@dataclass(frozen=True)
class Text:
    """Free text as it was drawn, with the token that ended it, if one did.

    Attributes:
        token_ids: the tokens.
        logps: log-probability of each, over what text may hold.
    """

    token_ids: tuple[int, ...]
    logps: tuple[float, ...]


class Writer(Protocol):
    """What is asked of an engine."""

    def items(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """Items right after the prompts."""
        ...

    def write(self, samples: Sequence[Prompted], sampling: Sampling, count: int) -> list[list[Text]]:
        """`count` texts after each prompt, up to `sampling.thought.max_tokens` tokens or one that ends it."""
        ...


def generate(engine: Writer, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
    """One group per sample, in order: of thoughts and items where the sample thinks, else of items alone."""
    thought = sampling.thought
    thinkers = [row for row, sample in enumerate(samples) if thought and sample.thinks]
    if not thought or not thinkers:
        return engine.items(samples, sampling)
    groups: dict[int, RolloutGroup] = {}
    others = [row for row in range(len(samples)) if row not in set(thinkers)]
    groups.update(zip(others, engine.items([samples[row] for row in others], sampling), strict=True))
    thinking = [samples[row] for row in thinkers]
    texts = engine.write(thinking, sampling, sampling.group_size // thought.rollouts)
    continued = [
        continue_(sample, text, thought, index)
        for sample, of_sample in zip(thinking, texts, strict=True)
        for index, text in enumerate(of_sample)
    ]
    endings = iter(engine.items(continued, replace(sampling, group_size=thought.rollouts)))
    for row, sample, of_sample in zip(thinkers, thinking, texts, strict=True):
        rollouts = [
            _joined(text, thought, index, rollout)
            for index, text in enumerate(of_sample)
            for rollout in next(endings).rollouts
        ]
        groups[row] = RolloutGroup(sample, tuple(rollouts))
    return [groups[row] for row in range(len(samples))]


def closing(text: Text, thought: Thought) -> tuple[int, ...]:
    """What is set after a text: its end too, where it was not written."""
    ended = text.token_ids[-1:] == (thought.end,)
    return thought.close if ended else (thought.end, *thought.close)


def continue_(sample: Sample, text: Text, thought: Thought, index: int) -> Sample:
    """The sample whose prompt goes on with a text; it has a name, and so draws, of its own."""
    record = replace(sample.record, source=f"{sample.record.source}#{index}")
    return Sample(record, (*sample.prompt_ids, *text.token_ids, *closing(text, thought)))


def _joined(text: Text, thought: Thought, index: int, rollout: Rollout) -> Rollout:
    drawn, closed = len(text.token_ids), closing(text, thought)
    return replace(
        rollout,
        token_ids=(*text.token_ids, *closed, *rollout.token_ids),
        logps_sampler=(*text.logps, *(0.0,) * len(closed), *rollout.logps_sampler),
        on_trie=(*(False,) * (drawn + len(closed)), *rollout.on_trie),
        forced=(
            *(False,) * drawn,
            *(True,) * len(closed),
            *(rollout.forced or (False,) * len(rollout.token_ids)),
        ),
        thought=index,
        thought_tokens=drawn + len(closed),
        truncated=len(closed) > len(thought.close),
    )
