"""Thoughts in training: exact on both supports, nested advantages by hand, what becomes of those closed by force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from configs.check import ConfigError
from rewards.protocol import ScoredGroup
from rl.advantages import nested_advantages
from rl.algorithms import Algorithm
from rl.evaluate import evaluate
from rl.progress import Progress
from rl.scoring import FORCED
from rl.thoughts import penalised, thought_first
from rollout.data.native import write_world
from rollout.data.world import World
from rollout.hf_engine import HFEngine
from rollout.sid import onerec_format
from rollout.support import TEXT, WHOLE_VOCABULARY
from rollout.types import Record, Rollout, RolloutGroup, Sample, Sampling
from tests.rl.conftest import MakePolicy, MakeTrainer, shop

MARKED = onerec_format((3, 4, 5))
THINK: dict[str, Any] = {"thought.max_tokens": 5, "thought.end": "e", "thought.close": " so ", "thought.open": "hm"}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, make_policy: MakePolicy) -> dict[str, Any]:
    """Data of two tasks, and a policy, in a format with begin and end marks."""
    world = shop(MARKED)
    splits = {
        split: tuple(replace(r, task="explain" if i % 2 else "next_item") for i, r in enumerate(records))
        for split, records in world.splits.items()
    }
    folder = tmp_path_factory.mktemp("thinking") / "shop"
    write_world(replace(world, splits=splits), folder)
    return {"data.path": str(folder), "model.path": str(make_policy(fmt=MARKED))}


@pytest.mark.parametrize("algo", ["grpo", "gspo", "ppo", "dapo"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"thought.rollouts": 2},
        {"rl.packing": False, "thought.item_tokens": True},
        {"thought.tasks": ["explain"], "rollout.items_per_completion": 2},
    ],
    ids=["plain", "nested", "rows", "mixed slates"],
)
def test_thoughts_are_on_policy(make_run: MakeTrainer, marked: dict[str, Any], more: dict[str, Any], algo: str) -> None:
    """Text and items get the probabilities they were drawn with: the first ratio is 1, whatever was set between."""
    if algo == "ppo" and more.get("thought.rollouts"):
        pytest.skip("the critic gives advantages of its own")
    run = make_run({"algo": algo, **marked, **THINK, **more})
    lines = run.train()
    assert max(line["ratio_error"] for line in lines if "ratio_error" in line) < 2e-4
    assert {line["legal_rate"] for line in lines if "legal_rate" in line} == {1.0}
    thinking = {g.sample.record.task for groups in run.fleet.seen for g in groups if g.rollouts[0].thought >= 0}
    assert thinking == ({"explain"} if "thought.tasks" in more else {"explain", "next_item"})


def test_places_and_masks(make_run: MakeTrainer, marked: dict[str, Any]) -> None:
    """Which support each token has, in a prompt that thinks: text, what is set, items."""
    run = make_run({**marked, **THINK})
    batch = run.batch()
    tokenizer = AutoTokenizer.from_pretrained(marked["model.path"])
    (groups,) = run.fleet.seen
    for row, rollout in enumerate(rollout for group in groups for rollout in group.rollouts):
        places = batch["places"][row][: len(rollout.token_ids)]
        text = rollout.text_tokens
        assert (places[:text] == TEXT).all()
        assert (places[text : rollout.thought_tokens] == FORCED).all()
        assert places[rollout.thought_tokens] == 0 and (places[rollout.thought_tokens :] >= 0).all()
        assert batch["tool_mask"][row].sum() == batch["completion_ids"].shape[1] - (rollout.thought_tokens - text)
        written = tokenizer.decode(rollout.token_ids[:text])
        assert "<s_" not in written and "<|sid" not in written
        closing = ("e" if rollout.truncated else "") + " so <|sid_begin|>"
        assert tokenizer.decode(rollout.token_ids[text : rollout.thought_tokens]).replace(" ", "") == closing.replace(
            " ", ""
        )
    assert all(tokenizer.decode(group.sample.prompt_ids).endswith("hm") for group in groups)
    free = make_run({**marked, **THINK, "thought.item_tokens": True}).batch()
    assert (free["places"] == WHOLE_VOCABULARY).any() and not (free["places"] == TEXT).any()


@pytest.mark.parametrize("unfinished", ["mask", "penalise"])
def test_unfinished_thoughts(make_run: MakeTrainer, marked: dict[str, Any], unfinished: str) -> None:
    """Masked, they have no gradient; penalised, they earn less. Neither is hidden: `truncated` counts them."""
    run = make_run({**marked, **THINK, "thought.unfinished": unfinished, "thought.penalty": 0.5})
    batch = run.batch()
    truncated = torch.tensor([r.truncated for group in run.fleet.seen[0] for r in group.rollouts])
    assert truncated.any()
    if unfinished == "mask":
        assert ((batch["tool_mask"] * batch["completion_mask"])[truncated] == 0).all()
        assert (batch["tool_mask"][~truncated].sum(dim=1) > 0).all()
    noted = run.trainer._metrics["train"]
    assert noted["truncated"] == [pytest.approx(float(truncated.float().mean()))]
    if unfinished == "penalise":
        earned = noted["reward/ndcg@10"][0]
        assert noted["reward"][0] == pytest.approx(earned - 0.5 * float(truncated.float().mean()))


def group_of(totals: list[float], thoughts: list[int], truncated: list[bool]) -> ScoredGroup:
    rollouts = tuple(
        Rollout(
            (1, 2, 3, 9),
            (0.0,) * 4,
            (False, False, False, True),
            (0,),
            ((0,),),
            0,
            "item",
            0.0,
            (False, False, True, False),
            one,
            3,
            cut,
        )
        if one >= 0
        else Rollout((9,), (0.0,), (True,), (0,), ((0,),), 0, "item")
        for one, cut in zip(thoughts, truncated, strict=True)
    )
    sample = Sample(Record("r", "", (), (0,), (1.0,)), (5,), thinks=True)
    return ScoredGroup(RolloutGroup(sample, rollouts), {}, {}, tuple(totals))


def test_nested_advantages_by_hand() -> None:
    """Thoughts with rewards (1, 0), (3, 2): items compare with their sibling, thoughts .5 and 2.5 with each other."""
    plain = Algorithm("dr_grpo", "dr_grpo", scale_rewards="none")
    think = group_of([1.0, 0.0, 3.0, 2.0], [0, 0, 1, 1], [False] * 4)
    straight = group_of([1.0, 0.0, 3.0, 2.0], [-1] * 4, [False] * 4)
    found = nested_advantages([think, straight], plain, 2, 5)
    assert found.shape == (2, 4, 5)
    np.testing.assert_allclose(found[0, :, 0], [-1, -1, 1, 1])
    np.testing.assert_allclose(found[0, :, 2], [-1, -1, 1, 1])
    np.testing.assert_allclose(found[0, :, 3], [0.5, -0.5, 0.5, -0.5])
    np.testing.assert_allclose(found[1], np.array([-0.5, -1.5, 1.5, 0.5])[:, None].repeat(5, axis=1))
    (less,) = penalised([group_of([1.0, 0.0], [0, 1], [True, False])], 0.25)
    assert less.total == (0.75, 0.0)


def test_thoughts_learn(make_run: MakeTrainer, marked: dict[str, Any], world: World, tmp_path: Path) -> None:
    """A target that never changes is found more and more often behind thoughts, whatever these say."""
    base = shop(MARKED)
    rows = {s: tuple(replace(r, targets=(3,), gains=(1.0,)) for r in records) for s, records in base.splits.items()}
    write_world(replace(base, splits=rows), tmp_path / "one")
    settings = {**marked, **THINK, "data.path": str(tmp_path / "one"), "rewards": [{"reward": "hit"}], "rl.steps": 25}
    lines = make_run({**settings, "rl.learning_rate": 3e-2, "thought.rollouts": 2, "rollout.group_size": 8}).train()
    rewards = [line["reward"] for line in lines]
    assert np.mean(rewards[-5:]) > 0.2 + np.mean(rewards[:5])


def test_evaluation_thinks_first(make_run: MakeTrainer, marked: dict[str, Any]) -> None:
    """Lists are the beams behind the likeliest thought, where a row thinks."""
    run = make_run({**marked, **THINK, "thought.rollouts": 2, "thought.tasks": ["explain"]})
    task, model = run.trainer.task, run.trainer.policy
    assert task.thought is not None
    engine = HFEngine(model, task.decoder)
    samples = task.samples["test"][:6]
    first = thought_first(engine, samples, task.thought)
    greedy = engine.generate(samples, Sampling(2, "beam", thought=replace(task.thought, rollouts=2)))
    for before, after, group in zip(samples, first, greedy, strict=True):
        assert after.record == before.record
        thinks = before.record.task == "explain"
        assert (after.prompt_ids == before.prompt_ids) == (not thinks)
        if thinks:
            alone = engine.write([before], Sampling(1, "greedy", thought=replace(task.thought, rollouts=1)), 1)[0][0]
            assert after.prompt_ids[len(before.prompt_ids) :][: len(alone.token_ids)] == alone.token_ids
            assert after.prompt_ids[-1:] == task.decoder.marks[-1:], "the begin mark comes right before the item"
        assert len(group) == 2
    result = evaluate(model, task, run.config, "test", Progress())
    assert result.legal_rate == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"thought.end": "<think>"}, "thought.end='<think>' stops the text, so it must be one token"),
        ({"thought.end": ""}, "thought.close=' so ' stands between thought.end and the item"),
    ],
)
def test_what_ends_a_thought(
    make_run: MakeTrainer, marked: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_run({**marked, **THINK, **settings})


def test_settings_that_do_not_go_together(make_run: MakeTrainer) -> None:
    with pytest.raises((ConfigError, SystemExit)):
        make_run({"thought.open": "hm"})
    with pytest.raises((ConfigError, SystemExit)):
        make_run({**THINK, "thought.rollouts": 3})
    with pytest.raises(ValueError, match="have no begin mark that could end a thought"):
        make_run({"thought.max_tokens": 4})
