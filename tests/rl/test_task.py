"""What stops a run before it costs anything, and what is made once."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rl.cache import cache_root, files_fingerprint, make_once
from rl.task import load_data, policy_folder, prepare_task, rl_and_warmup_rows
from rl.tiny import build_tokenizer
from rollout.data.native import write_world
from rollout.data.problems import DataError
from rollout.data.world import World
from rollout.hf_engine import load_policy
from rollout.sid import letters_format
from rollout.types import Record
from tests.rl.conftest import MakeConfig, MakePolicy


def hush(_: str) -> None:
    pass


@pytest.fixture
def flawed(data: Path, tmp_path: Path) -> Path:
    """The shop with three bad training rows: an unknown item twice and a row without a target."""
    folder = tmp_path / "flawed"
    shutil.copytree(data, folder)
    table = pq.read_table(folder / "train.parquet").to_pylist()
    table[0]["history"], table[4]["history"], table[7]["targets"] = ["nobody"], ["nothing"], []
    pq.write_table(
        pa.Table.from_pylist(table, schema=pq.read_schema(folder / "train.parquet")), folder / "train.parquet"
    )
    return folder


# Data -----------------------------------------------------------------------------------------------------------------


def test_bad_rows_stop_the_run(make_config: MakeConfig, flawed: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data(make_config({"data.path": str(flawed)}), hush)
    text = str(caught.value)
    assert text.startswith("3 bad rows, first:\n")
    assert "train.parquet:0: unknown-item" in text
    assert "train.parquet:7: empty-target" in text
    assert f"python -m rollout.check {flawed}" in text
    assert "data.on_bad_rows=skip" in text


def test_bad_rows_are_skipped_and_counted(make_config: MakeConfig, make_policy: MakePolicy, flawed: Path) -> None:
    said: list[str] = []
    config = make_config({"data.path": str(flawed), "data.on_bad_rows": "skip"})
    world, folder = load_data(config, said.append)
    task = prepare_task(config, world, make_policy(), said.append)
    assert folder == flawed
    assert task.skipped == 3
    assert len(task.samples["train"]) == 48 - 3
    assert "skipped 3 bad rows (data.on_bad_rows=skip)" in said


def test_long_prompts_are_bad_rows(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    """A history of n items takes 3·n + 1 tokens (a newline ends it); a quarter of the rows has four items."""
    settings = {"data.max_prompt_tokens": 12}
    with pytest.raises(DataError, match=r"(?s)12 bad rows.*prompt-too-long: .*13 tokens, data.max_prompt_tokens is 12"):
        prepare_task(make_config(settings), world, make_policy(), hush)
    task = prepare_task(make_config({**settings, "data.on_bad_rows": "skip"}), world, make_policy(), hush)
    assert len(task.samples["train"]) == 36
    assert task.skipped == 12 + 2 + 3  # of 48, 10 and 12 rows


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_missing_split(make_config: MakeConfig, data: Path, tmp_path: Path, split: str) -> None:
    folder = tmp_path / "shop"
    shutil.copytree(data, folder)
    (folder / f"{split}.parquet").unlink()
    with pytest.raises(DataError, match=f"no rows in split '{split}'; it has ") as caught:
        load_data(make_config({"data.path": str(folder)}), hush)
    rest = {"train": 48, "valid": 10, "test": 12}
    del rest[split]
    assert all(f"{name} {count}" in str(caught.value) for name, count in rest.items())


def test_test_rows_are_needed_only_where_they_are_evaluated(
    make_config: MakeConfig, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shop"
    shutil.copytree(data, folder)
    (folder / "test.parquet").unlink()
    world, _ = load_data(make_config({"data.path": str(folder), "eval.split": "valid"}), hush)
    assert "test" not in world.splits


def test_no_such_data(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_data(make_config({"data.path": str(tmp_path / "nowhere")}), hush)


def test_what_is_said_of_the_data(make_config: MakeConfig) -> None:
    said: list[str] = []
    load_data(make_config(), said.append)
    assert said == ["sidrl data: 24 items, 23 Sids (1 items share one), rows train 48, valid 10, test 12"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_flex_attention_needs_a_gpu(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    with pytest.raises(ValueError, match="model.attention=flex_attention needs a GPU"):
        prepare_task(make_config({"model.attention": "flex_attention"}), world, make_policy(), hush)


def test_targets_must_be_allowed(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    first, second, *others = world.splits["train"]
    elsewhere = next(item for item in range(len(world.catalog)) if item not in first.targets)
    rows = (replace(first, candidates=(elsewhere,)), replace(second, history=second.targets), *others)
    restricted = replace(world, splits={**world.splits, "train": rows})
    with pytest.raises(
        DataError, match="1 bad rows.*\n.*train:0: target-not-allowed: none of the targets is among the candidates"
    ):
        prepare_task(make_config(), restricted, make_policy(), hush)
    settings = {"data.on_bad_rows": "skip", "data.exclude_history": True}
    task = prepare_task(make_config(settings), restricted, make_policy(), hush)
    seen = [
        record for records in world.splits.values() for record in records if set(record.targets) <= {*record.history}
    ]
    assert task.skipped == 2 + len(seen) and not {"train:0", "train:1"} & {
        s.record.source for s in task.samples["train"]
    }
    assert all(set(s.record.excluded) == set(s.record.history) for split in task.samples.values() for s in split)


# Settings against data ------------------------------------------------------------------------------------------------


def test_too_few_rows(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    config = make_config({"rl.prompts_per_step": 50})
    with pytest.raises(ValueError, match=r"rl.prompts_per_step=50, but RL has only 48 training rows .data.rl_users=0"):
        prepare_task(config, world, make_policy(), hush)


def test_a_beam_wider_than_the_catalogue(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    beams = {"rollout.sampler": "beam", "rollout.group_size": 24}
    with pytest.raises(ValueError, match=r"rollout.group_size=24 distinct items .* 23 Sids .rollout.sampler=beam"):
        prepare_task(make_config(beams), world, make_policy(), hush)
    prepare_task(make_config({**beams, "rollout.group_size": 23}), world, make_policy(), hush)
    prepare_task(make_config({"rollout.group_size": 24}), world, make_policy(), hush)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_rl_and_warmup_see_different_users(make_config: MakeConfig, world: World, share: float) -> None:
    rl, warmup = rl_and_warmup_rows(make_config({"data.rl_users": share}), world)
    assert not {record.user for record in rl} & {record.user for record in warmup}
    assert sorted(r.source for r in [*rl, *warmup]) == sorted(r.source for r in world.splits["train"])
    assert rl and warmup


def test_all_rows_for_both(make_config: MakeConfig, world: World) -> None:
    rl, warmup = rl_and_warmup_rows(make_config({"data.rl_users": 0}), world)
    assert rl == warmup == list(world.splits["train"])


def test_samples_are_those_of_rl(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    config = make_config({"data.rl_users": 0.5, "rl.prompts_per_step": 2, "rl.micro_batch_groups": 1})
    task = prepare_task(config, world, make_policy(), hush)
    rl, _ = rl_and_warmup_rows(config, world)
    assert [sample.record for sample in task.samples["train"]] == rl
    assert [sample.record for sample in task.samples["test"]] == list(world.splits["test"])
    prompts = [task.tokenizer.decode(sample.prompt_ids) for sample in task.samples["train"]]
    body, sid = world.catalog.format.body, world.catalog.sid
    assert prompts == ["".join(body(sid(item)) for item in record.history) + "\n" for record in rl]


# Model ----------------------------------------------------------------------------------------------------------------


def test_no_such_model(make_config: MakeConfig, world: World, tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=f"model.path={path}: "):
        prepare_task(make_config(), world, path, hush)
    with pytest.raises(ValueError, match=f"model.path={path}: no such folder"):
        load_policy(path)


def test_a_folder_that_is_no_model(make_config: MakeConfig, world: World, data: Path) -> None:
    with pytest.raises(ValueError, match=f"model.path={data}: no model and tokenizer"):
        prepare_task(make_config(), world, data, hush)
    with pytest.raises(ValueError, match=f"model.path={data}: no causal language model"):
        load_policy(data)


def test_a_model_without_weights(make_policy: MakePolicy, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_policy(), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=f"model.path={folder}: no causal language model"):
        load_policy(folder)


def test_damaged_weights(make_policy: MakePolicy, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_policy(), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"model.path={folder}: no causal language model"):
        load_policy(folder)


def test_a_model_without_tokenizer(
    make_config: MakeConfig, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(make_policy(), folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    # transformers makes an empty one up, so it is the SID tokens that are missed
    with pytest.raises(ValueError, match="no model and tokenizer|lacks 12 of 12 SID tokens"):
        prepare_task(make_config(), world, folder, hush)


def test_a_tokenizer_without_sid_tokens(make_config: MakeConfig, make_policy: MakePolicy, world: World) -> None:
    """A policy of a smaller catalogue: it lacks two codes of the last level."""
    small = make_policy(fmt=letters_format((3, 4, 3)))
    with pytest.raises(ValueError, match=r"lacks 2 of 12 SID tokens \(<c_3>, <c_4>, …\): expand the vocabulary"):
        prepare_task(make_config(), world, small, hush)


def test_a_model_smaller_than_its_tokenizer(
    make_config: MakeConfig, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Token ids beyond the output matrix: said before anything is drawn."""
    folder = tmp_path / "model"
    shutil.copytree(make_policy(), folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["vocab_size"] = len(build_tokenizer(world.catalog.format)) - 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        prepare_task(make_config(), world, folder, hush)


def test_a_model_with_too_few_positions(
    make_config: MakeConfig, make_policy: MakePolicy, world: World, tmp_path: Path
) -> None:
    """Prompts of up to 512 tokens and three of the item need 515 positions, the model has 512."""
    folder = tmp_path / "model"
    shutil.copytree(make_policy(), folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 512}))
    with pytest.raises(ValueError, match="data.max_prompt_tokens=512.*max_position_embeddings"):
        prepare_task(make_config(), world, folder, hush)


# Cache ----------------------------------------------------------------------------------------------------------------


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def test_make_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIDRL_CACHE", str(tmp_path / "cache"))
    calls = []

    def make(folder: Path) -> None:
        assert not list(folder.iterdir())
        calls.append(folder)
        (folder / "file").write_text(f"call {len(calls)}")

    folder, made = make_once("kind/name", make)
    assert (folder, made) == (cache_root() / "kind" / "name", True)
    assert make_once("kind/name", make) == (folder, False)
    assert (folder / "file").read_text() == "call 1"
    assert len(calls) == 1
    assert calls[0] != folder
    assert hidden(folder.parent) == ["name"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_make_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException]
) -> None:
    monkeypatch.setenv("SIDRL_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise error("half-way")

    with pytest.raises(error):
        make_once("kind/name", fail)
    assert hidden(tmp_path / "kind") == []
    folder, made = make_once("kind/name", lambda folder: (folder / "whole").touch())
    assert made
    assert hidden(folder) == ["whole"]


def test_two_at_once_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both make it, the first to end is kept, and both get a whole folder."""
    monkeypatch.setenv("SIDRL_CACHE", str(tmp_path))
    together, results = threading.Barrier(2), []

    def make(folder: Path) -> None:
        together.wait()
        (folder / "file").touch()

    def work() -> None:
        results.append(make_once("name", make)[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "name"] * 2
    assert hidden(tmp_path) == ["name"]
    assert hidden(tmp_path / "name") == ["file"]


def test_fingerprints(tmp_path: Path) -> None:
    """Names and contents count, times do not."""
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text("text")
    one = files_fingerprint(tmp_path / "one")
    assert one == files_fingerprint(tmp_path / "two")
    (tmp_path / "two" / "sub" / "file").write_text("tixt")
    assert one != files_fingerprint(tmp_path / "two")
    (tmp_path / "two" / "sub" / "file").write_text("text")
    (tmp_path / "two" / "sub" / "file").rename(tmp_path / "two" / "sub" / "life")
    assert one != files_fingerprint(tmp_path / "two")


def test_a_warm_policy_is_made_once_for_what_shapes_it(
    make_config: MakeConfig, world: World, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SIDRL_CACHE", str(tmp_path))
    made: list[Path] = []

    def folder(settings: dict[str, Any]) -> Path:
        config = make_config({"model.path": None, **settings})
        return policy_folder(config, world, data, hush, made.append)

    first = folder({})
    assert folder({}) == first
    assert folder({"rl.steps": 9, "rollout.group_size": 3, "data.on_bad_rows": "skip"}) == first
    others = [
        folder(settings)
        for settings in (
            {"seed": 1},
            {"warmup.layers": 3},
            {"data.rl_users": 0.5},
            {"data.prompt_template": "{history}>"},
            {"data.max_history": 3},
        )
    ]
    assert len({first, *others}) == 6
    assert len(made) == 6


def test_a_given_model_is_not_warmed_up(make_config: MakeConfig, world: World, data: Path, tmp_path: Path) -> None:
    def never(_: Path) -> None:
        raise AssertionError

    config = make_config({"model.path": str(tmp_path)})
    assert policy_folder(config, world, data, hush, never) == tmp_path


@pytest.mark.slow
def test_the_demo_world_is_cached(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SIDRL_CACHE", str(tmp_path))
    said: list[str] = []
    config = make_config({"data.path": "demo"})
    (world, folder), (again, same) = load_data(config, said.append), load_data(config, said.append)
    assert folder == same
    assert folder.is_relative_to(tmp_path)
    assert [line.split()[0] for line in said if "demo world" in line] == ["made", "found"]
    assert world.splits == again.splits


def test_rows_of_one_user_stay_together(make_config: MakeConfig, world: World) -> None:
    """A user's rows go to one side whatever their number."""
    rows = tuple(Record(f"train:{i}", f"user-{i % 6}", (1,), (i % 20,), (1.0,)) for i in range(60))
    rl, warmup = rl_and_warmup_rows(
        make_config({"data.rl_users": 0.5}), replace(world, splits={**world.splits, "train": rows})
    )
    assert {len([r for r in [*rl, *warmup] if r.user == f"user-{u}"]) for u in range(6)} == {10}
    assert all(len([r for r in rl if r.user == f"user-{u}"]) in (0, 10) for u in range(6))


def test_written_worlds_read_back(world: World, tmp_path: Path, make_config: MakeConfig) -> None:
    write_world(world, tmp_path / "copy")
    again, _ = load_data(make_config({"data.path": str(tmp_path / "copy")}), hush)
    assert again.splits == world.splits
