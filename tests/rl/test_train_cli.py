"""`python -m rl.train` as a user runs it: files, refusals, resuming, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from tests.rl.conftest import MakePolicy, arguments, end_all, marked, quiet_environment, tiny_run, wait_until_gone

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Command:
    """One finished `python -m rl.train`."""

    code: int
    out: str
    err: str
    seconds: float
    mark: str


Train = Callable[..., Command]


@pytest.fixture(scope="module")
def train() -> Iterator[Train]:
    """Runs the command to its end; its processes are ended after the module whatever happens."""
    marks = []

    def run(options: list[str], cwd: Path = REPOSITORY) -> Command:
        marks.append(uuid.uuid4().hex)
        start = time.monotonic()
        environment = quiet_environment(marks[-1], PYTHONPATH=str(REPOSITORY))
        done = subprocess.run(
            [sys.executable, "-m", "rl.train", *options],
            capture_output=True,
            text=True,
            timeout=280,
            cwd=cwd,
            env=environment,
        )
        return Command(done.returncode, done.stdout, done.stderr, time.monotonic() - start, marks[-1])

    yield run
    for mark in marks:
        end_all(mark)


@pytest.fixture(scope="module")
def settings(data: Path, make_policy: MakePolicy) -> Callable[..., list[str]]:
    """Options of a tiny run into a folder, changed by `changes`."""

    def options(output: Path | None, changes: Mapping[str, Any] | None = None) -> list[str]:
        return arguments({**tiny_run(data, make_policy(), output), **(changes or {})})

    return options


@pytest.fixture(scope="module")
def finished(
    train: Train, settings: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Command]:
    """One whole run with everything that can be asked for."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    changes = {
        "output.rollouts_every": 1,
        "output.checkpoint_every": 1,
        "output.merged_model": True,
        "rl.learning_rate": 0.01,
    }
    return folder, train(settings(folder, changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def refused(command: Command, *parts: str) -> None:
    """Status 2, one clear line, no traceback, no process left."""
    assert command.code == 2, command.err
    assert "Traceback" not in command.err + command.out
    told = [line for line in command.err.splitlines() if line.strip() and not line.startswith("(every setting")]
    assert len(told) == 1, command.err
    assert "error: " in told[0]
    for part in parts:
        assert part in told[0]
    assert wait_until_gone(command.mark) == []


# A whole run ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_a_run(finished: tuple[Path, Command], make_policy: MakePolicy) -> None:
    folder, command = finished
    assert command.code == 0, command.err
    assert "Traceback" not in command.err
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "rollouts", "summary.json", "report.png", "adapter", "merged", "checkpoints",
    }  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["rl"]["steps"] == 2
    assert config["output_dir"] == str(folder)
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert all(line["legal_rate"] == 1.0 and line["ratio_error"] <= 1e-5 for line in lines(folder))
    rollouts = [pq.read_table(path) for path in sorted((folder / "rollouts").iterdir())]
    assert [table.num_rows for table in rollouts] == [16, 16]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["engine"], summary["legal_rate"], summary["algo"]) == (2, "hf", 1.0, "grpo")
    assert 0 < summary["seconds"] < command.seconds
    for key in ("before", "after"):
        assert summary[key]["rows"] == 12
        assert summary[key]["legal_rate"] == 1.0
        low, high = summary[f"{key}_interval"]["ndcg@10"]
        assert low <= summary[key]["ndcg@10"] <= high
    assert (folder / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    names = {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}
    assert names == {"checkpoint-1", "checkpoint-2"}
    assert str(folder / "summary.json") in command.out
    assert "ndcg@10" in command.out


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_is_left_running(finished: tuple[Path, Command]) -> None:
    assert wait_until_gone(finished[1].mark) == []


@pytest.mark.ray
@pytest.mark.slow
def test_adapter_and_merged_model_are_the_policy(finished: tuple[Path, Command], make_policy: MakePolicy) -> None:
    """Both give the same logits, which differ from the start's, and both folders carry the tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    ids = torch.arange(10, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(make_policy()).eval()
    with torch.no_grad():
        start = base(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
    assert float((adapted - merged).norm() / merged.norm()) < 1e-5
    assert float((adapted - start).norm() / start.norm()) > 1e-3
    for name in ("adapter", "merged"):
        assert AutoTokenizer.from_pretrained(folder / name).convert_tokens_to_ids("<a_1>") is not None


@pytest.mark.ray
@pytest.mark.slow
def test_resume_continues(finished: tuple[Path, Command], train: Train) -> None:
    """Two more steps on top of the two there are."""
    folder, _ = finished
    first = lines(folder)
    command = train([f"--resume={folder}", "--rl.steps=4", "--eval.before=false"])
    assert command.code == 0, command.err
    assert "resuming from" in command.out
    assert "checkpoint-2" in command.out
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    assert lines(folder)[:2] == first
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4
    assert lines(folder)[3]["policy_version"] == 3


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_in_use_is_refused(
    finished: tuple[Path, Command], train: Train, settings: Callable[..., list[str]]
) -> None:
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    refused(train(settings(folder)), f"output_dir={folder} holds a run already", f"--resume {folder} continues it")
    assert (folder / "metrics.jsonl").read_text() == before


@pytest.mark.ray
@pytest.mark.slow
def test_full_fine_tuning_without_evaluation(train: Train, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    changes = {
        "lora.enabled": False,
        "eval.before": False,
        "eval.after": False,
        "rl.steps": 1,
        "output.rollouts_every": 0,
    }
    command = train(settings(tmp_path / "run", changes))
    assert command.code == 0, command.err
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "rollouts").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "before" not in summary
    assert "after" not in summary
    assert summary["legal_rate"] == 1.0


@pytest.mark.ray
@pytest.mark.slow
def test_two_engines_and_a_warm_up(train: Train, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    """No model.path: a policy is made first. Two engines share the prompts."""
    changes = {
        "model.path": None,
        "warmup.hidden_size": 64,
        "warmup.heads": 2,
        "warmup.layers": 1,
        "warmup.max_steps": 3,
        "data.rl_users": 0.4,
        "rollout.num_engines": 2,
        "rl.steps": 1,
        "eval.before": False,
    }
    command = train(settings(tmp_path / "run", changes))
    assert command.code == 0, command.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len({engine["pid"] for engine in summary["engines"]}) == 2
    assert "the warm policy in" in command.out


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_mistyped_key_is_refused_at_once(train: Train, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    command = train([*settings(tmp_path / "run"), "--rl.learning_rte=1e-3"])
    refused(command, "unknown option --rl.learning_rte", "rl.learning_rate")
    assert command.seconds < 5
    assert not (tmp_path / "run").exists()


def test_a_wrong_value_is_refused_at_once(train: Train, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    command = train(settings(tmp_path / "run", {"rl.steps": "many"}))
    refused(command, "rl.steps='many' must be an integer")
    assert command.seconds < 5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data.path": "/nowhere/at/all"}, ["/nowhere/at/all: does not exist"]),
        ({"rewards": [{"reward": "BROKEN:Broken"}]}, ["Broken", "no reward today", "broken.py"]),
        ({"data.path": "/nowhere/at/all", "dry_run": True}, ["/nowhere/at/all: does not exist"]),
        ({"rewards": [{"reward": "BROKEN:Broken"}], "dry_run": True}, ["Broken", "no reward today", "broken.py"]),
        ({"model.path": "/nowhere/model", "dry_run": True}, ["model.path=/nowhere/model"]),
        ({"rewards": [{"reward": "ndgc@10"}], "dry_run": True}, ["ndgc@10", "ndcg"]),
        ({"rl.prompts_per_step": 400, "dry_run": True}, ["rl.prompts_per_step=400", "48"]),
    ],
    ids=["data", "reward", "dry data", "dry reward", "dry model", "dry unknown reward", "dry too few rows"],
)
def test_what_cannot_work_is_refused(
    train: Train, settings: Callable[..., list[str]], tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    """A dry run tells the same, and sooner."""
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "class Broken:\n    def __call__(self, group, catalog):\n        raise KeyError('no reward today')\n"
    )
    text = json.dumps(changes).replace("BROKEN", str(plugin))
    refused(train(settings(tmp_path / "run", json.loads(text))), *parts)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
def test_damaged_data_is_told(
    train: Train, data: Path, settings: Callable[..., list[str]], tmp_path: Path, dry: bool
) -> None:
    import shutil

    shutil.copytree(data, tmp_path / "shop")
    (tmp_path / "shop" / "items.parquet").write_bytes(b"no parquet")
    changes = {"data.path": str(tmp_path / "shop"), "dry_run": dry}
    refused(train(settings(tmp_path / "run", changes)), "items.parquet")


def test_resume_of_nothing_is_refused(train: Train, tmp_path: Path) -> None:
    refused(train([f"--resume={tmp_path}"]), f"resume={tmp_path}: holds no config.yaml")


@pytest.mark.ray
@pytest.mark.slow
def test_a_refused_run_can_be_mended(train: Train, settings: Callable[..., list[str]], tmp_path: Path) -> None:
    """The same command with its mistake put right runs; nothing was trained, so nothing can be lost."""
    refused(train(settings(tmp_path / "run", {"rl.prompts_per_step": 400})), "rl.prompts_per_step=400")
    command = train(settings(tmp_path / "run", {"rl.steps": 1, "eval.before": False, "eval.after": False}))
    assert command.code == 0, command.err


# Dry run --------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True], ids=["given model", "warm-up"])
def test_a_dry_run_trains_nothing(
    train: Train, settings: Callable[..., list[str]], tmp_path: Path, warm: bool, cache_folder: Path
) -> None:
    before = sorted(cache_folder.rglob("*"))
    changes = {"model.path": None, "warmup.hidden_size": 64, "warmup.heads": 2} if warm else {}
    command = train([*settings(tmp_path / "run", changes), "--dry_run"])
    assert command.code == 0, command.err
    assert "Traceback" not in command.err
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.iterdir()) == []
    assert sorted(cache_folder.rglob("*")) == before
    for part in (
        "training: grpo, 2 steps; 2 batches of 4 prompts x 4 rollouts = 32 rollouts over 48 rows",
        "1 hf engine(s) (rollout.engine=hf), sampler sample",
        "rewards: 1 x ndcg@10",
        "started Ray on this machine",
        "dry run: nothing was trained",
        "learning_rate: ",
    ):
        assert part in command.out
    assert ("would warm up a policy" in command.out) is warm
    assert wait_until_gone(command.mark) == []


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "driver alone"])
def test_ctrl_c(settings: Callable[..., list[str]], tmp_path: Path, whole_group: bool) -> None:
    """A terminal sends SIGINT to every process of the foreground group, `kill -INT` to the driver alone."""
    mark = uuid.uuid4().hex
    options = settings(tmp_path / "run", {"rl.steps": 10_000, "eval.before": False})
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.train", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=quiet_environment(mark),
        start_new_session=True,
    )
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        end = time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
        assert len(marked(mark)) > 3  # driver, Ray, worker, engine
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert "interrupted" in err
        assert wait_until_gone(mark) == []
    finally:
        process.kill()
        end_all(mark)


# vLLM -----------------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_a_run_with_vllm(train: Train, settings: Callable[..., list[str]], tmp_path: Path, sync: str) -> None:
    """vLLM in an actor: its log-probabilities are the trainer's, before and after weights were sent."""
    pytest.importorskip("vllm")
    changes = {
        "rollout.engine": "vllm", "rollout.sync": sync, "eval.before": False, "eval.after": sync == "merged",
        "rl.learning_rate": 0.01, "rl.steps": 3, "rollout.threads": 2, "lora.r": 8,
    }  # fmt: skip
    command = train(settings(tmp_path / "run", changes))
    assert command.code == 0, command.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["legal_rate"], summary["steps"]) == ("vllm", 1.0, 3)
    assert summary["engines"][0]["engine"] == "vllm"
    steps = lines(tmp_path / "run")
    assert [line["policy_version"] for line in steps] == [0, 1, 2]
    assert all(line["ratio_error"] <= 1e-4 for line in steps)
    assert wait_until_gone(command.mark) == []
