"""The warm-up: labels by hand, and tiny runs to a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl import warmup
from rl.progress import Progress
from rl.task import prepare_task
from rl.trl_sft import IGNORED, next_item_rows
from rollout.data.world import World
from rollout.types import Record, Sample
from tests.rl.conftest import MakeConfig, MakePolicy, arguments

TINY = {
    "model.path": None,
    "warmup.hidden_size": 64,
    "warmup.layers": 1,
    "warmup.heads": 2,
    "warmup.max_steps": 5,
    "warmup.batch_size": 8,
    "data.rl_users": 0.4,
    "rl.prompts_per_step": 2,
    "rl.micro_batch_groups": 1,
}


def test_labels_by_hand(world: World, make_config: MakeConfig, make_policy: MakePolicy) -> None:
    """A row per distinct Sid among the targets; the loss is on its three tokens alone."""
    task = prepare_task(make_config(), world, make_policy(), lambda _: None)
    catalog, tokenizer = world.catalog, task.tokenizer
    prompt = tuple(tokenizer("<a_1><b_1><c_1>\n")["input_ids"])

    def ids(item: int) -> list[int]:
        a, b, c = catalog.sid(item)
        return tokenizer.convert_tokens_to_ids([f"<a_{a}>", f"<b_{b}>", f"<c_{c}>"])

    samples = [
        Sample(Record("train:0", "u", (3,), (7,), (1.0,)), prompt),
        Sample(Record("train:1", "u", (3,), (23, 0), (1.0, 1.0)), prompt[:2]),  # items 0 and 23 share a Sid
        Sample(Record("train:2", "u", (3,), (5, 9), (1.0, 2.0)), prompt[:1]),
    ]
    rows = next_item_rows(samples, task.decoder).to_list()
    assert len(prompt) == 4
    first, second = sorted((5, 9), key=catalog.sid)
    assert rows == [
        {"input_ids": [*prompt, *ids(7)], "labels": [IGNORED] * 4 + ids(7)},
        {"input_ids": [*prompt[:2], *ids(0)], "labels": [IGNORED] * 2 + ids(0)},
        {"input_ids": [prompt[0], *ids(first)], "labels": [IGNORED, *ids(first)]},
        {"input_ids": [prompt[0], *ids(second)], "labels": [IGNORED, *ids(second)]},
    ]


def test_every_item_is_written_as_its_own_sid(world: World, make_config: MakeConfig, make_policy: MakePolicy) -> None:
    task = prepare_task(make_config(), world, make_policy(), lambda _: None)
    samples = [Sample(Record(f"train:{item}", "u", (), (item,), (1.0,)), (5,)) for item in range(len(world.catalog))]
    rows = next_item_rows(samples, task.decoder)
    texts = [task.tokenizer.decode(row["labels"][1:]) for row in rows]
    assert texts == [world.catalog.format.body(world.catalog.sid(item)) for item in range(len(world.catalog))]


def test_warm_up_writes_a_policy(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    progress = Progress()
    warmup.warm_up(make_config(TINY), world, tmp_path / "policy", progress)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.head_dim) == (64, 1, 32)
    assert model.config.attention_dropout == 0.0
    assert model.config.max_position_embeddings >= 512 + 64
    assert tokenizer.convert_tokens_to_ids("<c_4>") < model.config.vocab_size
    snapshot = progress.snapshot()
    assert snapshot.phase == "warm-up"
    assert "warming up a policy of" in snapshot.messages[0]
    prepare_task(make_config(TINY), world, tmp_path / "policy", lambda _: None)


@pytest.mark.slow
def test_the_same_seed_warms_the_same_policy(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> dict[str, torch.Tensor]:
        warmup.warm_up(make_config({**TINY, "seed": seed}), world, tmp_path / name, Progress())
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    one, again, other = weights("one", 1), weights("again", 1), weights("other", 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_it_learns_the_next_item(world: World, make_config: MakeConfig, tmp_path: Path) -> None:
    """Loss on the rows it was trained on, before and after some epochs."""
    from rl.tiny import build_model, build_tokenizer
    from rl.trl_sft import sft

    config = make_config({**TINY, "warmup.max_steps": 60, "warmup.learning_rate": 0.01, "warmup.epochs": 30})
    tokenizer = build_tokenizer(world.catalog.format)
    torch.manual_seed(0)
    model = build_model(tokenizer, hidden_size=64, layers=1, heads=2)
    tokenizer.save_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "start")
    task = prepare_task(config, world, tmp_path / "start", lambda _: None)
    samples = task.samples["train"][:6]
    losses: list[float] = []

    def keep(step: int, steps: int, logs: dict[str, float]) -> None:
        losses.extend([logs["eval_loss"]] if "eval_loss" in logs else [])

    sft(
        model, tokenizer, samples, samples, task.decoder, config.warmup, tmp_path / "sft", seed=0, report=keep
    )  # fmt: skip
    assert losses[0] > 2
    assert losses[-1] < 0.5


# Command line ---------------------------------------------------------------------------------------------------------


def command(data: Path, target: Path) -> list[str]:
    return arguments({**TINY, "data.path": str(data), "output_dir": str(target), "rollout.engine": "hf"})


def test_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "deep" / "warm"
    warmup.main(command(data, target))
    AutoModelForCausalLM.from_pretrained(target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["warm"]
    assert f"python -m rl.train --model.path {target}" in capsys.readouterr().out


def test_an_empty_folder_will_do(data: Path, tmp_path: Path) -> None:
    warmup.main(command(data, tmp_path))
    assert (tmp_path / "config.json").exists()


def test_a_folder_in_use_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match=f"output_dir={tmp_path} is not empty"):
        warmup.main(command(data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_folder_must_be_named(data: Path) -> None:
    with pytest.raises(ValueError, match="output_dir must name"):
        warmup.main(arguments({**TINY, "data.path": str(data), "rollout.engine": "hf"}))


def test_a_failed_warm_up_leaves_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("half-way")

    monkeypatch.setattr(warmup, "warm_up", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        warmup.main(command(data, tmp_path / "warm"))
    assert list(tmp_path.iterdir()) == []
