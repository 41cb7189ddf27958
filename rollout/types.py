"""The nouns that flow through the loop: Sample, Rollout, RolloutGroup, Sampling. Frozen, complete from birth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Message = dict[str, str]
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Record:
    """One row of data before tokenisation. Items are catalogue rows.

    Attributes:
        source: where it was read, such as `train.csv:17`; unique within a split.
        user: the user's name ("" where the data has none).
        history: items the user had, oldest first.
        targets: items that count as right, never empty.
        gains: relevance of each target, > 0.
        prompt: text or chat messages; None lets the prompt template write it from the history.
        task: name of the task the row belongs to.
        candidates: the only items that may be recommended, None for the whole catalogue.
        excluded: items that may not be recommended, such as those the user has had.
    """

    source: str
    user: str
    history: tuple[int, ...]
    targets: tuple[int, ...]
    gains: tuple[float, ...]
    prompt: Prompt | None = None
    task: str = "next_item"
    candidates: tuple[int, ...] | None = None
    excluded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError(f"{self.source}: no target item")
        if len(self.gains) != len(self.targets) or not all(0 < gain < float("inf") for gain in self.gains):
            raise ValueError(
                f"{self.source}: {len(self.targets)} targets need as many gains, each > 0; got {self.gains}"
            )
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"{self.source}: a target item is named twice")

    @property
    def restricted(self) -> bool:
        """Whether some items may not be recommended."""
        return self.candidates is not None or bool(self.excluded)

    def allows(self, item: int) -> bool:
        """Whether an item may be recommended."""
        return item not in self.excluded and (self.candidates is None or item in self.candidates)


class Prompted(Protocol):
    """Anything that an engine can continue."""

    @property
    def name(self) -> str:
        """Seeds its draws."""
        ...

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Its tokens."""
        ...


@dataclass(frozen=True)
class Sample:
    """A Record ready for an engine.

    Attributes:
        record: the row.
        prompt_ids: its prompt as token ids, ending where the first item token (or the thought) comes next.
        thinks: free text comes before the items, if the run has thoughts at all.
    """

    record: Record
    prompt_ids: tuple[int, ...]
    thinks: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"{self.record.source}: the prompt is empty; an engine needs at least one token")

    @property
    def name(self) -> str:
        """Where it was read."""
        return self.record.source

    @property
    def targets(self) -> tuple[int, ...]:
        """Items that count as right."""
        return self.record.targets

    @property
    def gains(self) -> tuple[float, ...]:
        """Relevance of each target."""
        return self.record.gains


@dataclass(frozen=True)
class Thought:
    """Free text before the items.

    Attributes:
        max_tokens: tokens it may have; one that has not ended then is closed by force.
        end: token that ends it.
        stops: other tokens at which it breaks off, and is closed by force.
        close: tokens that are set after the end, before the first item.
        banned: ranges [first, last + 1) of tokens that it may not hold.
        rollouts: completions that continue each thought.
    """

    max_tokens: int
    end: int
    stops: tuple[int, ...] = ()
    close: tuple[int, ...] = ()
    banned: tuple[tuple[int, int], ...] = ()
    rollouts: int = 1

    @property
    def longest(self) -> int:
        """Tokens of the longest thought with all that is set after it."""
        return self.max_tokens + 1 + len(self.close)


Sampler = Literal["sample", "beam", "unique", "greedy"]


@dataclass(frozen=True)
class Sampling:
    """How rollouts are drawn.

    Attributes:
        group_size: rollouts per sample, G.
        sampler: `sample` draws G independent items, `beam` lists the G most likely distinct items, best first
            (fewer when the catalogue has fewer), `unique` draws G distinct items without replacement, in drawn order
            (fewer likewise), `greedy` takes the likeliest token each step.
        temperature: logits are divided by it before the softmax; > 0, and 1 for greedy, which does not depend on it.
        top_p: `sample` draws each token from the fewest likeliest of its support that hold this much of its mass.
        items: items that one completion holds, all different (a slate).
        thought: free text that samples with `thinks` write first; None for none.
        constrained: True restricts every SID position to the trie's children; False leaves the whole vocabulary.
        seed: seeds every draw; the same seed, prompts and weights give the same rollouts.
    """

    group_size: int
    sampler: Sampler = "sample"
    temperature: float = 1.0
    top_p: float = 1.0
    items: int = 1
    thought: Thought | None = None
    constrained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} must be at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0 (take sampler='greedy' for the argmax)")
        if self.sampler not in ("sample", "beam", "unique", "greedy"):
            raise ValueError(f"sampler={self.sampler!r} must be one of sample, beam, unique, greedy")
        if self.sampler == "greedy" and self.temperature != 1.0:
            raise ValueError(
                f"sampler='greedy' takes the likeliest token at any temperature; temperature={self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_p < 1 and self.sampler != "sample":
            raise ValueError(f"top_p={self.top_p} shapes sampler='sample' only, not {self.sampler!r}")
        if self.items < 1 or (self.items > 1 and (self.sampler not in ("sample", "greedy") or not self.constrained)):
            raise ValueError(
                f"items={self.items} a completion must be at least 1, and several need sampler='sample' or 'greedy' "
                f"and constrained=True; got sampler={self.sampler!r}, constrained={self.constrained}"
            )
        if self.thought and (self.group_size % self.thought.rollouts or not self.constrained):
            raise ValueError(
                f"group_size={self.group_size} must be a multiple of the {self.thought.rollouts} rollouts of a "
                f"thought, and thoughts need constrained=True; got {self.constrained}"
            )
        if self.sampler in ("beam", "unique") and not self.constrained:
            raise ValueError(f"sampler={self.sampler!r} lists items of the trie; it needs constrained=True")


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        token_ids: the completion's T tokens.
        logps_sampler: log-probability of each token under the distribution it was drawn from.
        on_trie: per token, True when that distribution was over the trie's children, False for the whole vocabulary.
        forced: per token, True where it was not drawn but set (marks around items, the forced end of a thought); empty
            for none.
        thought: which thought of its group it continues, -1 for none.
        thought_tokens: tokens of that thought, with those that were set to close it.
        truncated: the thought did not end by itself and was closed by force.
        sids: sid indices (rows of `Catalog.sids_SL`) that the completion writes, in order; empty when it is illegal.
        items: for each of `sids`, the items that share it.
        policy_version: version of the weights that wrote it.
        finish_reason: `item` when a whole item was written, `illegal` when the tokens are no item.
        logp_inclusion: for items drawn without replacement, the log-probability that this one is in its group (see
            `rollout.search.distinct`); 0 for all others, which stand in their group whatever the draw.
    """

    token_ids: tuple[int, ...]
    logps_sampler: tuple[float, ...]
    on_trie: tuple[bool, ...]
    sids: tuple[int, ...]
    items: tuple[tuple[int, ...], ...]
    policy_version: int
    finish_reason: Literal["item", "illegal"]
    logp_inclusion: float = 0.0
    forced: tuple[bool, ...] = ()
    thought: int = -1
    thought_tokens: int = 0
    truncated: bool = False

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.logps_sampler) == len(self.on_trie):
            raise ValueError("a rollout needs one log-probability and one support flag for each token")
        if len(self.forced) not in (0, len(self.token_ids)):
            raise ValueError("a rollout says of each token whether it was forced, or of none")
        if len(self.sids) != len(self.items) or (self.finish_reason == "item") != bool(self.sids):
            raise ValueError(
                f"a rollout that ended with {self.finish_reason!r} cannot hold {len(self.sids)} Sids "
                f"and {len(self.items)} clusters"
            )

    @property
    def legal(self) -> bool:
        """Whether every token belongs to an item of the catalogue."""
        return self.finish_reason == "item"

    @property
    def logp(self) -> float:
        """Log-probability of the whole completion."""
        return float(sum(self.logps_sampler))

    @property
    def logp_items(self) -> float:
        """Log-probability of its items, given its thought."""
        return float(sum(self.logps_sampler[self.thought_tokens :]))

    @property
    def text_tokens(self) -> int:
        """Tokens of free text that it drew."""
        forced = self.forced or (False,) * len(self.token_ids)
        return sum(not on and not set_ for on, set_ in zip(self.on_trie, forced, strict=True))


@dataclass(frozen=True)
class RolloutGroup:
    """One Sample and its G Rollouts: the unit of reward and of advantage, never split."""

    sample: Sample
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        if not self.rollouts:
            raise ValueError(f"{self.sample.record.source}: a group needs at least one rollout")
        versions = {rollout.policy_version for rollout in self.rollouts}
        if len(versions) != 1:
            raise ValueError(
                f"{self.sample.record.source}: rollouts of policy versions {sorted(versions)} in one group"
            )

    def __len__(self) -> int:
        return len(self.rollouts)

    @property
    def policy_version(self) -> int:
        """Version of the weights that wrote the whole group."""
        return self.rollouts[0].policy_version

    def ranking(self) -> list[int]:
        """The group as a ranked list of distinct sid indices: likeliest first, ties by first appearance.

        Likely means likely to be drawn: the sampler's log-probabilities, at the sampling temperature, of the items
        given the rollout's thought. A rollout that writes several items is ranked as a block, in the order it wrote
        them. Illegal ones are left out.
        """
        order = np.argsort([-rollout.logp_items for rollout in self.rollouts], kind="stable")
        ranked = (sid for index in order for sid in self.rollouts[index].sids)
        return list(dict.fromkeys(ranked))


class Engine(Protocol):
    """Generates groups and takes weights. The Hugging Face and the vLLM engine give the same distribution."""

    name: str
    policy_version: int

    def generate(self, samples: list[Sample], sampling: Sampling) -> list[RolloutGroup]:
        """One group per sample, in order."""
        ...

    def load_weights(self, weights: dict[str, np.ndarray], version: int) -> str:
        """Take the policy's full weights; returns the checksum of what was loaded."""
        ...

    def serve(self, decoder: Any) -> None:
        """Change the catalogue (a `rollout.decode.Decoder`): from now on its items are written, and no others."""
        ...
