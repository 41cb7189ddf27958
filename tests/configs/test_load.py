"""Layers, overrides, round trips and error messages of the run configuration."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.check import ConfigError
from configs.load import dump, parse_run, read_run, save
from configs.schema import RewardConfig, RunConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def problems(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_run(list(argv))
    return caught.value.problems


def write(folder: Path, text: str, name: str = "c.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_file_is_read(path: Path) -> None:
    config = parse_run(["--config", str(path)])
    assert parse_run(["--config", str(path), "--rl.steps", "8"]) == dataclasses.replace(
        config, rl=dataclasses.replace(config.rl, steps=8)
    )


def test_without_options_the_demo_decides() -> None:
    assert read_run([]) == read_run(["--config", str(ROOT / "configs/demo.yaml")])
    assert read_run(["--data.path", "demo", "--rl.steps", "5"]).warmup == read_run([]).warmup


def test_with_data_the_schema_and_the_algorithm_decide() -> None:
    defaults = RunConfig()
    data = dataclasses.replace(defaults.data, path="elsewhere")
    assert read_run(["--data.path", "elsewhere"]) == dataclasses.replace(defaults, data=data)


def test_layers_lowest_to_highest(tmp_path: Path) -> None:
    one = write(
        tmp_path, "rl: {steps: 11, kl_coef: 0.5, learning_rate: 1e-4}\ntrl: {optim: sgd, delta: 2.0}\n", "1.yaml"
    )
    two = write(tmp_path, "rl: {steps: 12}\ntrl: {optim: adafactor}\n", "2.yaml")
    config = read_run(["--rl.learning_rate", "2e-4", "--config", one, "--config", two, "--trl.delta=3"])
    assert (config.rl.steps, config.rl.kl_coef, config.rl.learning_rate) == (12, 0.5, 2e-4)
    assert config.trl == {"optim": "adafactor", "delta": 3}
    assert config.rl.clip_low == RunConfig().rl.clip_low


def test_options(tmp_path: Path) -> None:
    config = read_run(
        [
            "--dry-run",
            "--rollout.group-size=4",
            "--eval.before",
            "false",
            "--trl.adam-beta1",
            "0.5",
            "--trl.lr_scheduler_kwargs",
            "{min_lr: 1e-5}",
            "--lora.target_modules",
            "[q_proj, v_proj]",
            "--lora.extra.bias=lora_only",
            "--model.path",
            "a=b",
            "--eval.after=false",
        ]
    )
    assert config.dry_run and not config.eval.before and not config.eval.after
    assert config.rollout.group_size == 4
    assert config.trl == {"adam_beta1": 0.5, "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    assert config.lora.target_modules == ["q_proj", "v_proj"] and config.lora.extra == {"bias": "lora_only"}
    assert config.model.path == "a=b"
    with_path = write(tmp_path, "model: {path: x}\nrl:\n")
    assert read_run(["--config", with_path, "--model.path", "null"]).model.path is None
    assert read_run(["--dry_run", "--seed", "3"]).dry_run
    assert not read_run(["--dry_run", "false"]).dry_run


def test_rewards_are_set_and_added(tmp_path: Path) -> None:
    first, second = RewardConfig("ndcg@10"), RewardConfig("mine.py:Mine", 1e-1, params={"k": 1})
    text = "{reward: 'mine.py:Mine', weight: 1e-1, params: {k: 1}}"
    assert read_run(["--rewards", f"[{text}]"]).rewards == [second]
    assert read_run(["--rewards+", text]).rewards == [first, second]
    path = write(tmp_path, f"rewards: [{text}]\n")
    assert read_run(["--config", path]).rewards == [second]
    assert read_run(["--config", path, "--rewards+", "{reward: ndcg@10}"]).rewards == [second, first]


def test_saved_settings_are_read_back(tmp_path: Path) -> None:
    rewards = ["--rewards+", "{reward: recall@5, params: {x: [1, 2.5e-7, null]}}"]
    lora = ["--lora.extra.rank_pattern", "{model.layers.0-x: 8}", "--rl.learning_rate", "1e-6"]
    config = read_run([*rewards, *lora, "--data.prompt_template", "ü: {history}\n#", "--model.path", "12"])
    assert config.model.path == "12"
    save(config, tmp_path / "run" / "config.yaml")
    assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8") == dump(config)
    assert read_run(["--config", str(tmp_path / "run" / "config.yaml")]) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_resume_takes_the_settings_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saved = read_run(["--rl.steps", "9", "--rl.kl_coef", "0.5", "--dry_run"])
    save(dataclasses.replace(saved, resume="older"), run / "config.yaml")
    over = write(tmp_path, "rl: {steps: 10}\n")
    config = read_run(["--resume", str(run), "--config", over])
    assert (config.resume, config.rl.steps, config.rl.kl_coef, config.dry_run) == (str(run), 10, 0.5, False)
    assert config.output_dir is None  # the folder may have moved since
    (line,) = problems("--resume", str(run), "--output_dir", str(tmp_path / "elsewhere"))
    assert line.endswith("a resumed run goes on in its own folder")
    by_file = write(tmp_path, f"resume: {run}\n", "r.yaml")
    assert read_run(["--config", by_file]).rl.steps == 9
    assert problems("--resume", str(tmp_path / "none")) == [f"resume={tmp_path / 'none'}: no such folder"]
    assert problems("--resume", str(tmp_path)) == [f"resume={tmp_path}: holds no config.yaml, so it is no run's folder"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rl.stps", "5"], "command line: unknown option --rl.stps: did you mean rl.steps?"),
        (["--steps", "5"], "command line: unknown option --steps: did you mean rl.steps?"),
        (["--group-size=5"], "command line: unknown option --group_size: did you mean rollout.group_size?"),
        (["--rl.steps", "x"], "command line: rl.steps='x' must be an integer"),
        (["--rl.steps"], "command line: --rl.steps needs a value: an integer"),
        (["--seed", "true"], "command line: seed='true' must be an integer"),
        (
            ["--algo", "gpro"],
            "command line: algo='gpro' must be one of grpo, dr_grpo, rloo, gspo, cispo, dapo, gpg, ppo, pl; "
            "did you mean gspo or grpo?",
        ),
        (
            ["--rl.scale_rewards=grop"],
            "command line: rl.scale_rewards='grop' must be one of group, batch, none; did you mean group?",
        ),
        (["--eval.before=maybe"], "command line: eval.before='maybe' must be true or false"),
        (["train"], "command line: 'train' belongs to no option; options are written --name value"),
        (["--trl", "3"], "command line: trl='3' must be a mapping such as {name: value}"),
        (["--config"], "command line: --config needs a value: a YAML file"),
        (
            ["--rewards+", "{rewrd: x}"],
            "command line: rewards='{rewrd: x}' must be a list such as [{reward: ndcg@10, weight: 1.0}]; "
            "a reward has no setting 'rewrd': did you mean reward?",
        ),
        (
            ["--rewards.reward", "x"],
            "command line: --rewards.reward: rewards is a list; --rewards+ adds one to it and --rewards sets it, "
            "each from YAML",
        ),
    ],
)
def test_problems_of_the_command_line(argv: list[str], said: str) -> None:
    assert problems(*argv) == [said]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rl:\n  stps: 3\n", ["2: unknown setting rl.stps: did you mean rl.steps?"]),
        ("seed: 1\nsteps: 3\n", ["2: unknown setting steps: did you mean rl.steps?"]),
        ("rl: {zzz: 1}\n", ["1: unknown setting rl.zzz: rl has steps, prompts_per_step,"]),
        ("rl:\n  steps: 1\n  kl_coef: abc\n", ["3: rl.kl_coef='abc' must be a finite number"]),
        ("rl: 3\nlora: [1]\n", ["1: rl=3 must be a section of settings", "2: lora=[1] must be a section of settings"]),
        ("trl: 3\n", ["1: trl=3 must be a mapping such as {name: value}"]),
        ("seed: 1\nseed: 2\n", ["2: seed is set twice, first on line 1"]),
        ("rl:\n  steps: [3\n  kl_coef: 1\n", ["3: no valid YAML: expected ',' or ']', but got ':'"]),
        ("rl:\n\tsteps: 3\n", ["2: no valid YAML: found character '\\t' that cannot start any token"]),
        ("seed: !!python/name:os.system\n", ["1: no valid YAML: could not determine a constructor for the tag"]),
        ("- 3\n", [" a file of settings holds `name: value` lines, not a seq"]),
        ("model: {path: 5}\n", ["1: model.path=5 must be a text or null"]),
        ("rewards:\n- {reward: a, wieght: 2}\n", ["1: rewards=[{'reward': 'a', 'wieght': 2}] must be a list such as"]),
    ],
)
def test_problems_of_a_file(tmp_path: Path, text: str, said: list[str]) -> None:
    path = write(tmp_path, text)
    found = problems("--config", path)
    assert len(found) == len(said)
    for line, start in zip(found, said, strict=True):
        assert line.startswith(f"{path}:{start}"), line


def test_yaml_anchors_and_merge_keys_are_understood(tmp_path: Path) -> None:
    path = write(tmp_path, "trl: &shared {optim: sgd}\nlora:\n  extra: {<<: {use_dora: true}}\n")
    config = read_run(["--config", path])
    assert (config.trl, config.lora.extra) == ({"optim": "sgd"}, {"use_dora": True})


def test_a_missing_file_names_close_ones(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\n", "my_amazon.yaml")
    (line,) = problems("--config", str(tmp_path / "my_amazn.yaml"))
    assert line == f"{tmp_path / 'my_amazn.yaml'}: no such file; did you mean {tmp_path / 'my_amazon.yaml'}?"
    (line,) = problems("--config", str(tmp_path / "dmo.yaml"))
    assert line.endswith("configs/demo.yaml?")


def test_all_unknown_keys_are_told_at_once(tmp_path: Path) -> None:
    assert len(problems("--rl.stps", "1", "--rl.stepz", "1", "--data.pth", "x")) == 3
    files = [write(tmp_path, "x: 1\ny: 2\n", "a.yaml"), write(tmp_path, "z: 1\n", "b.yaml")]
    assert len(problems("--config", files[0], "--config", files[1])) == 3


def test_help_has_every_setting_and_the_defaults_of_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    path = write(tmp_path, "rl: {steps: 4321}\n")
    with pytest.raises(SystemExit) as caught:
        read_run(["--help", "--config", path])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "4321" in text
    from configs.keys import leaf_types

    for key in leaf_types():
        assert f"--{key} " in text, key


def test_print_config_prints_what_is_in_force(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_run(["--rl.steps", "5", "--print_config"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert read_run(["--config", write(tmp_path, text)]) == read_run(["--rl.steps", "5"])


def run_python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_problem_ends_the_process_quickly_and_plainly() -> None:
    code = "import sys; from configs.load import parse_run; parse_run(sys.argv[1:])"
    start = time.monotonic()
    done = run_python(code, "--trl.bta", "1", "--rl.micro_batch_groups", "7")
    assert time.monotonic() - start < 2
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m rl.train: error:\n"
        "  - rl.micro_batch_groups=7 must divide rl.prompts_per_step=64\n"
        "  - trl.bta is no field of trl.GRPOConfig; did you mean beta?\n"
        "(every setting: python -m rl.train --help)\n"
    )


def test_the_configuration_loads_no_big_library() -> None:
    code = (
        "import sys, pkgutil, importlib, configs\n"
        "for module in pkgutil.iter_modules(configs.__path__): importlib.import_module('configs.' + module.name)\n"
        "configs.load.read_run(['--trl.optim', 'sgd', '--lora.extra.bias', 'none'])\n"
        "big = {'torch', 'vllm', 'ray', 'trl', 'transformers', 'peft', 'numpy', 'datasets', 'accelerate'}\n"
        "print(sorted(big & set(sys.modules)))"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
