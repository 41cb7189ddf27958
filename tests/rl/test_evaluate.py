"""Evaluation against a ranking of the whole catalogue by brute force."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rl.evaluate import Evaluation, evaluate
from rl.metrics import evaluate_lists
from rl.progress import Progress
from rl.task import Task, prepare_task
from rollout.data.problems import DataError
from rollout.data.world import World
from rollout.hf_engine import load_policy
from rollout.types import Sample
from tests.rl.conftest import MakeConfig, MakePolicy, arguments


def brute_force(model: torch.nn.Module, task: Task, sample: Sample) -> list[int]:
    """Every Sid of the catalogue by its probability under the trie, one row each, likeliest first."""
    catalog, tokenizer = task.decoder.catalog, task.tokenizer
    paths = [
        tuple(tokenizer(catalog.format.body(tuple(sid)), add_special_tokens=False)["input_ids"])
        for sid in catalog.sids_SL.tolist()
    ]
    scores = []
    for path in paths:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*sample.prompt_ids, *path]])).logits[
                0, len(sample.prompt_ids) - 1 :
            ]
        total = 0.0
        for level, token in enumerate(path):
            legal = sorted({other[level] for other in paths if other[:level] == path[:level]})
            total += float(logits[level, legal].log_softmax(dim=0)[legal.index(token)])
        scores.append(total)
    return np.argsort(-np.array(scores), kind="stable").tolist()


@pytest.fixture
def task(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> Task:
    return prepare_task(make_config(), world, make_policy(), lambda _: None)


@pytest.mark.parametrize("batch", [5, 64])
def test_metrics_are_those_of_all_items_ranked(make_config: MakeConfig, task: Task, batch: int) -> None:
    """A beam as wide as the catalogue misses nothing, so its metrics are exact; interval and all."""
    config = make_config({"eval.beam_width": 50, "eval.batch_prompts": batch})
    model = load_policy(task.model_path)
    found = evaluate(model, task, config, "test", Progress())
    samples = task.samples["test"]
    expected = evaluate_lists(
        [brute_force(model, task, sample) for sample in samples],
        [sample.targets for sample in samples],
        None,
        task.decoder.catalog,
        bootstrap=config.eval.bootstrap,
        seed=config.seed,
    )
    assert found.result.rows == 12
    assert found.result.values == expected.values
    assert found.result.intervals == expected.intervals
    assert found.legal_rate == 1.0
    assert 0 <= found.unconstrained_legal <= 1
    assert 0 < found.result.values["ndcg@10"] < 1


def test_metrics_of_a_narrow_beam(make_config: MakeConfig, task: Task) -> None:
    """A beam of 8 of 23 lists 8 items, of which the first is the likeliest of all here."""
    config = make_config({"eval.beam_width": 8})
    model = load_policy(task.model_path)
    found = evaluate(model, task, config, "valid", Progress())
    samples = task.samples["valid"]
    best = [brute_force(model, task, sample)[:1] for sample in samples]
    hits = [
        task.decoder.catalog.sid_index_N[sample.targets[0]] == one[0] for sample, one in zip(samples, best, strict=True)
    ]
    assert found.result.values["sid/hr@1"] == pytest.approx(np.mean(hits))
    assert found.result.values["hr@10"] == found.result.values["hr@20"]  # nothing stands below rank 8


def test_some_rows_only(make_config: MakeConfig, task: Task) -> None:
    found = evaluate(load_policy(task.model_path), task, make_config({"eval.max_samples": 5}), "test", Progress())
    assert found.result.rows == 5


def test_no_unconstrained_rows(make_config: MakeConfig, task: Task) -> None:
    config = make_config({"eval.unconstrained_samples": 0})
    assert np.isnan(evaluate(load_policy(task.model_path), task, config, "test", Progress()).unconstrained_legal)


def test_unconstrained_counts_what_a_free_policy_writes(
    make_config: MakeConfig, make_policy: MakePolicy, world: World
) -> None:
    """A policy made to write item 3 whatever the prompt is legal without the trie; a random one is not."""
    config = make_config({"eval.unconstrained_samples": 12})
    task = prepare_task(config, world, make_policy(tied=False, layers=1), lambda _: None)
    model = load_policy(task.model_path)
    assert evaluate(model, task, config, "test", Progress()).unconstrained_legal < 1
    codes = world.catalog.format.body(world.catalog.sid(3))
    path = task.tokenizer(codes, add_special_tokens=False)["input_ids"]
    newline = task.tokenizer("\n", add_special_tokens=False)["input_ids"][0]  # every prompt ends with it
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for now, then in zip([newline, *path], path, strict=False):  # the next token depends on the last one alone
            direction = torch.zeros(64)
            direction[len(path) - path.index(then)] = 10.0
            model.model.embed_tokens.weight[now] = direction
            model.lm_head.weight[then] = direction
    evaluation = evaluate(model, task, config, "test", Progress())
    assert evaluation.unconstrained_legal == 1.0


def test_general_text_is_looked_at_too(
    make_config: MakeConfig, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """With `eval.general` its perplexity and exact answers stand among the metrics; without an answer it is refused."""
    rows = [{"prompt": "copy ab: ", "answer": "ab"}, {"prompt": "only this"}]
    (tmp_path / "general.json").write_text(json.dumps(rows))
    config = make_config({"eval.general": str(tmp_path / "general.json")})
    task = prepare_task(config, world, make_policy(), lambda _: None)
    assert [bool(row.answer_ids) for row in task.general] == [True, False]
    flat = evaluate(load_policy(task.model_path), task, config, "test", Progress()).flat()
    assert flat["general/perplexity"] > 1 and flat["general/exact"] in (0.0, 1.0)
    (tmp_path / "general.json").write_text(json.dumps([{"prompt": "only this"}]))
    with pytest.raises(DataError, match="no row has an answer to judge the policy by"):
        prepare_task(config, world, make_policy(), lambda _: None)


def test_the_model_is_left_in_its_mode(make_config: MakeConfig, task: Task) -> None:
    model = load_policy(task.model_path)
    for mode in (True, False):
        model.train(mode)
        evaluate(model, task, make_config({"eval.max_samples": 2}), "test", Progress())
        assert model.training is mode


def test_flat(make_config: MakeConfig, task: Task) -> None:
    evaluation = evaluate(load_policy(task.model_path), task, make_config(), "test", Progress())
    flat = evaluation.flat()
    assert flat["rows"] == 12
    assert flat["legal_rate"] == 1.0
    assert {"ndcg@10", "hr@10", "coverage@10", "unconstrained_legal", "seconds"} <= flat.keys()
    assert isinstance(evaluation, Evaluation)
    assert all(isinstance(value, (int, float)) for value in flat.values())


def test_progress_reaches_the_end(make_config: MakeConfig, task: Task) -> None:
    progress = Progress()
    evaluate(load_policy(task.model_path), task, make_config({"eval.batch_prompts": 5}), "test", progress, "look")
    snapshot = progress.snapshot()
    assert (snapshot.phase, snapshot.step, snapshot.steps) == ("look", 12, 12)


@pytest.mark.slow
def test_command_line(data: Path, make_policy: MakePolicy, make_config: MakeConfig, task: Task, tmp_path: Path) -> None:
    settings = {
        "model.path": str(make_policy()),
        "data.path": str(data),
        "rollout.engine": "hf",
        "data.rl_users": 0,
        "rl.prompts_per_step": 4,
        "rl.micro_batch_groups": 2,
        "eval.beam_width": 50,
        "eval.bootstrap": 20,
        "output_dir": str(tmp_path / "out"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "rl.evaluate", *arguments(settings)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "12 rows of test in" in done.stdout
    assert "legal items: 100.0% with the trie" in done.stdout
    written = json.loads((tmp_path / "out" / "evaluation_test.json").read_text())
    expected = evaluate(
        load_policy(task.model_path), task, make_config({"eval.beam_width": 50}), "test", Progress()
    ).flat()
    assert written["model"] == str(make_policy())
    for key in set(expected) - {"seconds", "unconstrained_legal"}:
        assert written["values"][key] == pytest.approx(expected[key])
    assert written["intervals"]["ndcg@10"][0] <= expected["ndcg@10"] <= written["intervals"]["ndcg@10"][1]
