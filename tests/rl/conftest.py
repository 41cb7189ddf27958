"""A small shop, small policies on disk, and trainers on them; all real but the fleet of the fast tests."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from configs.load import read_run
from configs.schema import RunConfig
from rollout.catalog import Catalog
from rollout.data.native import write_world
from rollout.data.world import World, load_world
from rollout.sid import SidFormat, letters_format
from rollout.types import Record

if TYPE_CHECKING:
    import torch

    from rl.recorder import Recorder
    from rl.trl_trainer import SidTrainer
    from rollout.types import RolloutGroup, Sample, Sampling

SIZES = (3, 4, 5)
ROWS = {"train": 48, "valid": 10, "test": 12}

MakeConfig = Callable[..., RunConfig]
MakePolicy = Callable[..., Path]
MakeTrainer = Callable[..., "Run"]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this session's own, and one thread: more would wait for each other."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("SIDRL_CACHE", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def shop(fmt: SidFormat | None = None, items: int = 24, seed: int = 3) -> World:
    """A catalogue in which two items share a Sid, and rows whose prompts have different lengths."""
    rng = np.random.default_rng(seed)
    fmt = fmt or letters_format(SIZES)
    every = np.stack(np.unravel_index(np.arange(int(np.prod(fmt.sizes))), fmt.sizes), axis=1)
    codes = every[rng.permutation(len(every))[: items - 1]]
    codes = np.concatenate([codes, codes[:1]])  # the last item is written like the first
    catalog = Catalog.build(
        fmt, [f"item-{i}" for i in range(items)], codes, titles=[f"Title {i}" for i in range(items)]
    )
    splits = {}
    for split, count in ROWS.items():
        rows = []
        for number in range(count):
            history = tuple(int(i) for i in rng.integers(0, items, 1 + number % 4))
            rows.append(
                Record(f"{split}:{number}", f"{split}-{number // 2}", history, (int(rng.integers(items)),), (1.0,))
            )
        splits[split] = tuple(rows)
    return World(catalog, splits, (), "sidrl")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop in the project's own format."""
    folder = tmp_path_factory.mktemp("data") / "shop"
    write_world(shop(), folder)
    return folder


@pytest.fixture(scope="session")
def world(data: Path) -> World:
    return load_world(data)


@pytest.fixture(scope="session")
def make_policy(tmp_path_factory: pytest.TempPathFactory, world: World) -> MakePolicy:
    """Folders of random policies: `make_policy(tied=False, layers=1, fmt=...)`, each made once."""
    made: dict[tuple[object, ...], Path] = {}

    def make(*, tied: bool = True, layers: int = 2, fmt: SidFormat = world.catalog.format, spread: float = 0.3) -> Path:
        import torch
        from transformers import Qwen3ForCausalLM

        from rl.tiny import build_model, build_tokenizer, save_policy

        key = (tied, layers, fmt, spread)
        if key not in made:
            tokenizer = build_tokenizer(fmt)
            torch.manual_seed(7)
            model = build_model(tokenizer, hidden_size=64, layers=layers, heads=2, max_positions=1024)
            if not tied:
                settings = model.config
                settings.tie_word_embeddings = False
                model = Qwen3ForCausalLM(settings)
            with torch.no_grad():  # far from uniform, so that a wrong mask or a wrong rank shows
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.normal_(0, spread * parameter.shape[1] ** -0.5 * 3)
            folder = tmp_path_factory.mktemp("policy") / "model"
            save_policy(model, tokenizer, folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_config(data: Path, make_policy: MakePolicy) -> MakeConfig:
    """Settings of a tiny run: `make_config({"rl.steps": 3})`, read as the command line is."""

    def make(settings: Mapping[str, Any] | None = None) -> RunConfig:
        base = {
            "model.path": str(make_policy()),
            "data.path": str(data),
            "rollout.engine": "hf",
            "rollout.group_size": 4,
            "rollout.threads": 1,
            "rewards": [{"reward": "ndcg@10"}],
            "rl.steps": 2,
            "rl.prompts_per_step": 4,
            "rl.micro_batch_groups": 2,
            "rl.lr_warmup_steps": 0,
            "data.rl_users": 0,
            "lora.r": 4,
            "eval.beam_width": 8,
            "eval.bootstrap": 20,
            "eval.unconstrained_samples": 4,
            "output.rollouts_every": 1,
        }
        return read_run(arguments({**base, **(settings or {})}))

    return make


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """A command line of settings."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def _hush(_: str) -> None:
    pass


def tiny_run(data: Path, model: Path, output: Path | None) -> dict[str, Any]:
    """Settings of a whole run that takes seconds."""
    return {
        "model.path": str(model),
        "data.path": str(data),
        "rollout.engine": "hf",
        "rollout.group_size": 4,
        "rollout.cpus_per_engine": 0.1,
        "ray.trainer_cpus": 0.1,
        "rl.steps": 2,
        "rl.prompts_per_step": 4,
        "rl.micro_batch_groups": 2,
        "rl.lr_warmup_steps": 0,
        "data.rl_users": 0,
        "lora.r": 4,
        "eval.beam_width": 8,
        "eval.bootstrap": 20,
        "eval.unconstrained_samples": 4,
        **({"output_dir": str(output)} if output else {}),
    }


def quiet_environment(mark: str, **more: str) -> dict[str, str]:
    """Environment of a command whose processes can be found again by `marked`; threads that wait do not spin."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"SIDRL_TEST_MARK": mark, "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0", "COLUMNS": "200"}
    return kept | own | more


def marked(mark: str) -> list[psutil.Process]:
    """Every process that was started, however indirectly, by a command with this mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SIDRL_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_until_gone(mark: str, seconds: float = 20) -> list[str]:
    """Command lines of processes with a mark that are still there after so many seconds."""
    end = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    return [" ".join(process.cmdline()) for process in left if process.is_running()]


def end_all(mark: str) -> None:
    """End the processes of a mark, and no others."""
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            process.kill()


class LocalFleet:
    """One real HFEngine in this process, under the fleet's interface: stands in for the Ray actors in fast tests.

    Attributes:
        calls: ("sync", version) and ("generate", version, seed) in order.
        checksums: what the engine reported after each sync, by version.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.version = 0
        self.about: list[dict[str, Any]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.checksums: dict[int, str] = {}
        self.seen: list[list[RolloutGroup]] = []

    def generate(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        self.calls.append(("generate", self.version, sampling.seed))
        groups: list[RolloutGroup] = self.engine.generate(list(samples), sampling)
        assert {group.policy_version for group in groups} == {self.version}
        self.seen.append(groups)
        return groups

    def start(self, samples: Sequence[Sample], sampling: Sampling) -> list[RolloutGroup]:
        return self.generate(samples, sampling)

    def collect(self, pending: list[RolloutGroup]) -> Iterator[list[RolloutGroup]]:
        half = len(pending) // 2
        yield from (part for part in (pending[:half], pending[half:]) if part)

    def write(
        self, prompts: Sequence[Any], sampling: Sampling, count: int, parts: int = 1
    ) -> Iterator[list[list[Any]]]:
        self.calls.append(("write", self.version, sampling.seed))
        size = -(-len(prompts) // parts)
        for start in range(0, len(prompts), size):
            yield self.engine.write(list(prompts[start : start + size]), sampling, count)

    def sync(self, weights: Mapping[str, torch.Tensor], version: int, expected: str, *, wait: bool = True) -> None:
        self.calls.append(("sync", version))
        self.checksums[version] = self.engine.load_weights(dict(weights), version)
        assert self.checksums[version] == expected
        self.version = version

    def close(self) -> None:
        pass


@dataclass
class Run:
    """A trainer and what it works with."""

    trainer: SidTrainer
    fleet: LocalFleet
    recorder: Recorder
    folder: Path
    config: RunConfig

    def train(self, resume: Path | None = None) -> list[dict[str, Any]]:
        """Train, from a checkpoint on when one is given; returns the lines of metrics.jsonl."""
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return self.metrics()

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def batch(self) -> dict[str, torch.Tensor]:
        """The tensors of the first step's rollouts."""
        rows = [
            {"row": row} for row in range(self.config.rl.prompts_per_step) for _ in range(self.trainer.num_generations)
        ]
        return self.trainer._generate_and_score_completions(rows)


@pytest.fixture
def make_run(make_config: MakeConfig, tmp_path: Path) -> MakeTrainer:
    """A trainer of a tiny run: `make_run({"rl.kl_coef": 0.1})`."""
    count = iter(range(100))

    def make(
        settings: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        start_at: int = 0,
        fleet: Any = None,
        trainer_of: Any = None,
    ) -> Run:
        from rl.algorithms import build_algorithm
        from rl.progress import Progress
        from rl.recorder import Recorder
        from rl.task import load_data, prepare_task
        from rl.trainers import trainer_class
        from rollout.hf_engine import HFEngine, load_policy

        config = make_config(settings)
        folder = folder or tmp_path / f"run-{next(count)}"
        folder.mkdir(exist_ok=True)
        world, _ = load_data(config, _hush)
        path = Path(config.model.path or "")
        task = prepare_task(config, world, path, _hush)
        fleet = fleet or LocalFleet(HFEngine(load_policy(path), task.decoder))
        recorder = Recorder(folder, task, Progress(), rollouts_every=config.output.rollouts_every)
        recorder.start_at(start_at)
        trainer = (trainer_of or trainer_class)(config)(
            load_policy(path), task, fleet, build_algorithm(config), config, recorder, folder / "checkpoints"
        )
        return Run(trainer, fleet, recorder, folder, config)

    return make


@pytest.fixture
def own_ray() -> Iterator[None]:
    """Ray for this test, unless the session runs one already."""
    import ray

    if ray.is_initialized():
        yield
        return
    from configs.schema import RayConfig
    from rl.ray_cluster import cluster

    with cluster(RayConfig()):
        yield
