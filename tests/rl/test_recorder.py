"""What a run writes while it trains, and which checkpoints count."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rl.progress import Progress
from rl.recorder import MARKER, Recorder, newest_checkpoint
from rl.task import prepare_task
from rollout.data.world import World
from rollout.types import Record, Rollout, RolloutGroup, Sample
from tests.rl.conftest import MakeConfig, MakePolicy


@pytest.fixture
def recorder(world: World, make_config: MakeConfig, make_policy: MakePolicy, tmp_path: Path) -> Recorder:
    task = prepare_task(make_config(), world, make_policy(), lambda _: None)
    return Recorder(tmp_path, task, Progress(), rollouts_every=2)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LOGS = {"legal_rate": 1.0, "loss": 0.5}


# Metrics --------------------------------------------------------------------------------------------------------------


def test_one_line_a_step(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start_at(0)
    recorder.step(1, 3, {**LOGS, "learning_rate": 1e-3})
    recorder.step(2, 3, {**LOGS, "loss": math.nan, "grad_norm": math.inf})
    assert lines(tmp_path) == [
        {"step": 1, "legal_rate": 1.0, "loss": 0.5, "learning_rate": 1e-3},
        {"step": 2, "legal_rate": 1.0, "loss": None, "grad_norm": None},
    ]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    snapshot = recorder.progress.snapshot()
    assert (snapshot.phase, snapshot.step, snapshot.steps) == ("train", 2, 3)


def test_the_lowest_legal_rate_is_kept(recorder: Recorder) -> None:
    recorder.start_at(0)
    assert recorder.legal_rate == 1.0
    for step, rate in enumerate((1.0, 0.25, 0.75), start=1):
        recorder.step(step, 3, {"legal_rate": rate})
    assert recorder.legal_rate == 0.25


def test_a_step_without_new_rollouts(recorder: Recorder, tmp_path: Path) -> None:
    """The second pass over a batch (`rl.epochs_per_batch`) draws nothing, so it tells nothing about rollouts."""
    recorder.start_at(0)
    recorder.step(1, 2, {"legal_rate": 0.5, "loss": 0.1})
    recorder.step(2, 2, {"loss": 0.2})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert recorder.legal_rate == 0.5


def test_start_at_drops_later_lines_and_a_cut_off_one(recorder: Recorder, tmp_path: Path) -> None:
    whole = [json.dumps({"step": step, "loss": step / 10}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(whole) + '\n{"step": 5, "lo')
    recorder.start_at(3)
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(whole[:3]) + "\n"
    recorder.step(4, 9, LOGS)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("last", ['{"step": 2', '{"step": null}', "[1]", '"step"', '{"loss": 2}', ""])
def test_start_at_drops_what_is_no_step(recorder: Recorder, tmp_path: Path, last: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + last)
    recorder.start_at(7)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_start_at_without_a_file(recorder: Recorder, tmp_path: Path) -> None:
    recorder.start_at(3)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# Rollouts -------------------------------------------------------------------------------------------------------------


def rollout(task: Any, item: int | None, logps: tuple[float, ...], version: int = 4) -> Rollout:
    catalog = task.decoder.catalog
    if item is None:
        return Rollout((7, 8, 9), logps, (True,) * 3, (), (), version, "illegal")
    sid = int(catalog.sid_index_N[item])
    tokens = task.tokenizer(catalog.format.body(catalog.sid(item)), add_special_tokens=False)["input_ids"]
    return Rollout(tuple(tokens), logps, (True,) * 3, (sid,), (catalog.items_of_sid(sid),), version, "item")


def test_rollouts(recorder: Recorder, tmp_path: Path) -> None:
    """Items 3 (twice) and 5 and an illegal one, item 5 wanted; item 3 is likelier, so item 5 stands at rank 2."""
    task = recorder.task
    catalog = task.decoder.catalog
    prompt = tuple(task.tokenizer("<a_1><b_2>")["input_ids"])
    sample = Sample(Record("train.parquet:8", "u", (1,), (5, 2), (1.0, 1.0)), prompt)
    members = (
        rollout(task, 3, (-0.5, -0.25, 0.0)),
        rollout(task, 5, (-1.0, -1.0, -1.0)),
        rollout(task, None, (-0.1, -0.1, -0.1)),
        rollout(task, 3, (-0.5, -0.25, 0.0)),
    )
    scored = task.rewards.score([RolloutGroup(sample, members)])
    recorder.rollouts(3, scored, np.array([[0.1, 0.2, 0.3, 0.4]]))
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000003.parquet"]
    rows = pq.read_table(tmp_path / "rollouts" / "step_000003.parquet").to_pylist()
    assert list(rows[0]) == [
        "step", "source", "prompt", "targets", "rollout", "completion", "items", "titles", "rank", "legal",
        "finish_reason", "tokens", "text_tokens", "thought", "truncated", "logp", "policy_version", "reward/ndcg@10",
        "reward", "advantage",
    ]  # fmt: skip
    assert [row["finish_reason"] for row in rows] == ["item", "item", "illegal", "item"]
    assert [(row["text_tokens"], row["thought"], row["truncated"]) for row in rows[:2]] == [(0, -1, False)] * 2
    body = catalog.format.body
    assert [row["rank"] for row in rows] == [1, 2, None, 1]
    assert [row["legal"] for row in rows] == [True, True, False, True]
    assert [row["items"] for row in rows] == [["item-3"], ["item-5"], [], ["item-3"]]
    assert [row["titles"] for row in rows] == [["Title 3"], ["Title 5"], [], ["Title 3"]]
    assert [row["rollout"] for row in rows] == [0, 1, 2, 3]
    assert [row["logp"] for row in rows] == pytest.approx([-0.75, -3.0, -0.3, -0.75])
    assert [row["completion"] for row in rows][:2] == [body(catalog.sid(3)), body(catalog.sid(5))]
    assert [row["advantage"] for row in rows] == [0.1, 0.2, 0.3, 0.4]
    # NDCG@10 of two targets: a hit at rank 2 pays 1/log2(3), over the ideal 1 + 1/log2(3).
    share = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    assert [row["reward"] for row in rows] == pytest.approx([0, share, 0, 0])
    assert [row["reward/ndcg@10"] for row in rows] == [row["reward"] for row in rows]
    for row in rows:
        assert (row["step"], row["source"], row["policy_version"]) == (3, "train.parquet:8", 4)
        assert (row["prompt"], row["targets"]) == ("<a_1><b_2>", ["item-5", "item-2"])


def test_shared_sids_name_all_their_items(recorder: Recorder, tmp_path: Path) -> None:
    """Items 0 and 23 are written alike."""
    task = recorder.task
    sample = Sample(Record("train.parquet:1", "u", (1,), (5,), (1.0,)), (5,))
    members = (rollout(task, 0, (-1.0, 0.0, 0.0)), rollout(task, 5, (-2.0, 0.0, 0.0)))
    recorder.rollouts(1, task.rewards.score([RolloutGroup(sample, members)]), np.zeros((1, 2)))
    rows = pq.read_table(tmp_path / "rollouts" / "step_000001.parquet").to_pylist()
    assert rows[0]["items"] == ["item-0", "item-23"]


@pytest.mark.parametrize(("every", "written"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [1, 5])])
def test_how_often_rollouts_are_written(recorder: Recorder, tmp_path: Path, every: int, written: list[int]) -> None:
    recorder.rollouts_every = every
    task = recorder.task
    sample = Sample(Record("train.parquet:1", "u", (1,), (5,), (1.0,)), (5,))
    scored = task.rewards.score([RolloutGroup(sample, (rollout(task, 1, (-1.0,) * 3),) * 2)])
    for step in range(1, 6):
        recorder.rollouts(step, scored, np.zeros((1, 2)))
    found = sorted(path.name for path in tmp_path.glob("rollouts/*"))
    assert found == [f"step_{step:06d}.parquet" for step in written]


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(recorder: Recorder, tmp_path: Path) -> Path:
    """Checkpoints 2, 10 and 9, all whole."""
    folder = tmp_path / "checkpoints"
    for step in (2, 10, 9):
        inside = folder / f"checkpoint-{step}"
        (inside / "sub").mkdir(parents=True)
        (inside / "model.safetensors").write_bytes(b"weights" * step)
        (inside / "sub" / "optimizer.pt").write_bytes(b"state")
        recorder.checkpoint_complete(inside)
    return folder


def test_newest_is_by_number(checkpoints: Path) -> None:
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-10"
    marker = json.loads((checkpoints / "checkpoint-2" / MARKER).read_text())
    assert marker == {"model.safetensors": 14, "sub/optimizer.pt": 5}


def missing(folder: Path) -> None:
    (folder / "sub" / "optimizer.pt").unlink()


def truncated(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weig")


def unmarked(folder: Path) -> None:
    (folder / MARKER).unlink()


def cut_marker(folder: Path) -> None:
    (folder / MARKER).write_text('{"model.safe')


def empty_marker(folder: Path) -> None:
    (folder / MARKER).write_text("")


def odd_marker(folder: Path) -> None:
    (folder / MARKER).write_text("[]")


@pytest.mark.parametrize(
    "harm",
    [
        missing,
        truncated,
        unmarked,
        cut_marker,
        empty_marker,
        pytest.param(odd_marker),
    ],
)
def test_broken_checkpoints_are_passed_over(checkpoints: Path, harm: Any) -> None:
    harm(checkpoints / "checkpoint-10")
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-9"
    harm(checkpoints / "checkpoint-9")
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    harm(checkpoints / "checkpoint-2")
    assert newest_checkpoint(checkpoints) is None


def test_other_names_are_no_checkpoints(checkpoints: Path) -> None:
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / "checkpoint-11").write_text("a file")
    (checkpoints / "README.md").write_text("")
    assert newest_checkpoint(checkpoints) == checkpoints / "checkpoint-10"


def test_no_folder(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
