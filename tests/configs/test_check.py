"""Rules between settings, and the names that are passed through to TRL and PEFT."""

from __future__ import annotations

import dataclasses
from functools import reduce
from typing import Any

import pytest

from configs import passthrough
from configs.check import METRIC_SCHEDULES, SCHEDULES, ConfigError, check
from configs.keys import leaf_types, sections, suggestion
from configs.load import read_run
from configs.ranges import RANGES, Range
from configs.schema import RewardConfig, RunConfig


def found(**changes: Any) -> list[str]:
    """Problems of the defaults with some settings changed; `__` stands for the dot."""
    config = RunConfig()
    for key, value in changes.items():
        *parents, name = key.split("__")
        setattr(reduce(getattr, parents, config), name, value)
    try:
        check(config)
    except ConfigError as error:
        return error.problems
    return []


def test_the_defaults_are_sound() -> None:
    assert found() == []


def test_every_number_has_a_range() -> None:
    assert set(RANGES) == {key for key, kind in leaf_types().items() if kind in (int, float)}


@pytest.mark.parametrize(
    ("numbers", "inside", "outside", "words"),
    [
        (Range(1), [1, 5], [0, -1, float("inf"), float("nan")], "at least 1"),
        (Range(0, low_open=True), [1e-9], [0.0, float("nan")], "above 0"),
        (Range(0, 1, high_open=True), [0, 0.99], [1.0, -0.1], "in [0, 1)"),
        (Range(0, 1, low_open=True), [1.0], [0.0, 1.1], "in (0, 1]"),
        (Range(0, auto=-1), [0, 2.0, -1.0], [-0.5, -2], "at least 0, or -1"),
        (Range(2, why="because"), [2], [1], "at least 2: because"),
    ],
)
def test_ranges(numbers: Range, inside: list[float], outside: list[float], words: str) -> None:
    assert all(value in numbers for value in inside)
    assert not any(value in numbers for value in outside)
    assert str(numbers) == words


@pytest.mark.parametrize("key", sorted(RANGES))
def test_a_number_out_of_range_is_named(key: str) -> None:
    problems = found(**{key.replace(".", "__"): -7})
    assert any(line.startswith(f"{key}=-7 must be ") for line in problems), problems


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rollout__group_size": 1},
            "rollout.group_size=1 must be at least 2: advantages compare rollouts of one group",
        ),
        (
            {"rl__micro_batch_groups": 16, "rl__prompts_per_step": 60},
            "rl.micro_batch_groups=16 must divide rl.prompts_per_step=60",
        ),
        ({"rl__clip_low": 1.0}, "rl.clip_low=1.0 must be in [0, 1)"),
        ({"warmup__heads": 3}, "warmup.hidden_size=128 must be an even multiple of warmup.heads=3"),
        (
            {"rollout__sync": "adapter", "lora__enabled": False},
            "rollout.sync=adapter needs lora.enabled=true: without LoRA there is no adapter to send",
        ),
        (
            {"rollout__sync": "adapter", "rollout__engine": "hf"},
            "rollout.sync=adapter needs vLLM, and rollout.engine=hf: the hf engine takes rollout.sync=merged",
        ),
        ({"rewards": []}, "rewards=[] must hold at least one reward, such as {reward: ndcg@10}"),
        (
            {"rewards": [RewardConfig("a"), RewardConfig("b", name="a")]},
            "rewards hold 2 named 'a': give each its own `name`",
        ),
        ({"rewards": [RewardConfig("a", float("nan"))]}, "rewards[0].weight=nan must be a finite number"),
        ({"rewards": [RewardConfig("a", 0.0)]}, "rewards have weight=0 throughout: at least one must count"),
        (
            {"data__prompt_template": "{hist}"},
            "data.prompt_template='{hist}' holds {hist}; its fields are {history} and {titles}",
        ),
        (
            {"data__prompt_template": "x"},
            "data.prompt_template='x' must hold {history} or {titles}: else all prompts are alike",
        ),
        ({"output_dir": ""}, "output_dir='' must name something; unset it with null"),
        ({"trl": {"beta": 0.1}}, "trl.beta may not be set: set rl.kl_coef instead"),
        ({"lora__extra": {"lora_alpha": 1}}, "lora.extra.lora_alpha may not be set: set lora.alpha instead"),
        (
            {"trl": {"vllm_mode": "server"}},
            "trl.vllm_mode may not be set: "
            "rollouts are drawn by sidrl's own engines under the trie; see rollout.engine",
        ),
        ({"trl": {"optimm": "sgd"}}, "trl.optimm is no field of trl.GRPOConfig; did you mean optim?"),
        (
            {"trl": {"group_size": 4}},
            "trl.group_size is no field of trl.GRPOConfig; did you mean the setting rollout.group_size?",
        ),
    ],
)
def test_rules(changes: dict[str, Any], said: str) -> None:
    assert found(**changes) == [said]


def test_prompt_templates() -> None:
    for good in ("{history}", "{titles}: {history}", "{{json}} {history}"):
        assert found(data__prompt_template=good) == []
    for bad in ("{history", "{history!r}", "{history:>3}", "{}", "{0}"):
        assert len(found(data__prompt_template=bad)) == 1, bad


def test_head_sizes_matter_only_to_vllm() -> None:
    assert found(warmup__heads=8, rollout__engine="hf") == []
    assert found(warmup__heads=8, rollout__engine="vllm", model__path="x") == []
    assert len(found(warmup__heads=8, rollout__engine="vllm")) == 1


def test_everything_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_run(["--rl.steps", "0", "--rollout.temperature", "0", "--trl.beta", "1", "--rl.lr_schedule", "cosin"])
    assert len(caught.value.problems) == 4
    assert str(caught.value).count("\n") == 3


@pytest.mark.parametrize("field", ["loss_type", "delta", "importance_sampling_level", "top_entropy_quantile"])
def test_fields_of_the_loss_are_free(field: str) -> None:
    assert passthrough.trl_reason(field) is None


def test_owners_are_settings() -> None:
    for owner in (*passthrough.OWNED_TRL.values(), *passthrough.OWNED_LORA.values()):
        for key in owner.split(" and "):
            assert key in leaf_types() or key in sections(), key


def test_names_are_not_checked_where_the_packages_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    passthrough._dataclass_fields.cache_clear()
    try:
        assert passthrough.grpo_fields() is None
        assert found(trl={"whatever": 1}, lora__extra={"whatever": 1}) == []
        assert found(trl={"beta": 1}) != []
    finally:
        passthrough._dataclass_fields.cache_clear()


def test_suggestions() -> None:
    known = ["rl.steps", "warmup.max_steps", "rollout.group_size"]
    assert suggestion("rl.step", known) == "did you mean rl.steps?"
    assert suggestion("training.group_size", known) == "did you mean rollout.group_size?"
    assert suggestion("zzzzzz", known) == ""


@pytest.mark.slow
def test_names_read_from_the_sources_are_those_of_the_classes() -> None:
    import peft
    import trl
    from transformers.trainer_utils import SchedulerType

    def names(cls: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(cls) if field.init}

    assert passthrough.grpo_fields() == names(trl.GRPOConfig)
    assert passthrough.lora_fields() == names(peft.LoraConfig)
    assert {*passthrough.OWNED_TRL, *passthrough.REFUSED_TRL} <= names(trl.GRPOConfig)
    assert {*passthrough.OWNED_LORA, *passthrough.REFUSED_LORA} <= names(peft.LoraConfig)
    assert {*SCHEDULES, *METRIC_SCHEDULES} == {schedule.value for schedule in SchedulerType}
