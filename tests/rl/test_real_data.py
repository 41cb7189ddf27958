"""The main job on MiniOneRec's format: the shipped configuration, and a folder that it has never seen."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data_dir import shared_data

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid")
SMALL = (
    "--warmup.max_steps 8 --warmup.hidden_size 64 --warmup.layers 1 --warmup.heads 2 --warmup.batch_size 32 "
    "--rl.steps 2 --rl.prompts_per_step 8 --rl.micro_batch_groups 4 --rollout.group_size 4 --rollout.engine hf "
    "--eval.max_samples 40 --eval.beam_width 10 --eval.bootstrap 20 --eval.unconstrained_samples 8"
)


def train(tmp_path: Path, data: Path) -> dict:
    command = f"{sys.executable} -m rl.train --algo grpo --config configs/amazon_industrial.yaml {SMALL}".split()
    command += ["--data.path", str(data), "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "SIDRL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "run" / "summary.json").read_text())


def strange_folder(folder: Path) -> Path:
    """Toys in two levels of other sizes, with a collision, in MiniOneRec's files."""
    rng = np.random.default_rng(0)
    sids = [(a, b) for a in range(7) for b in range(11)]
    sids.append(sids[0])
    tokens = [[f"<a_{a}>", f"<b_{b}>"] for a, b in sids]
    (folder / "Toys.index.json").write_text(json.dumps({str(i): tokens[i] for i in range(len(sids))}))
    (folder / "Toys.item.json").write_text(json.dumps({str(i): {"title": f"Toy {i}"} for i in range(len(sids))}))
    for split, users in (("train", 60), ("valid", 20), ("test", 20)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for user in range(users):
                walk = rng.integers(0, len(sids), 4).tolist()
                sid = ["".join(tokens[item]) for item in walk]
                titles = [f"Toy {item}" for item in walk]
                row = [f"{split}{user}", titles[:-1], titles[-1], walk[:-1], walk[-1], sid[:-1], sid[-1]]
                writer.writerow(row)
    return folder


@pytest.mark.ray
@pytest.mark.slow
def test_a_folder_never_seen_works_by_its_path_alone(tmp_path: Path) -> None:
    data = tmp_path / "toys"
    data.mkdir()
    summary = train(tmp_path, strange_folder(data))
    assert summary["legal_rate"] == 1.0
    assert summary["steps"] == 2
    assert summary["after"]["rows"] == 20


@pytest.mark.ray
@pytest.mark.slow
def test_the_shipped_configuration_trains_on_amazon(tmp_path: Path) -> None:
    summary = train(tmp_path, shared_data("amazon-industrial"))
    assert summary["legal_rate"] == 1.0
    assert summary["before"]["rows"] == summary["after"]["rows"] == 40
