"""A whole GRPO iteration, this project against TRL's trainer that generates with Hugging Face under a dict trie.

    python -m tests.bench.iteration --prompts 64 --group 16

Ours is `SidTrainer` with a vLLM engine in a Ray actor: weights to the engine, rollouts, rewards, packed update. Theirs
is `GRPOTrainer`: `generate` with `PrefixConstrainedLogitsProcessor`, a reward function, its own update. Same policy,
prompts, group size and LoRA. Iterations of the two alternate in one process; the last line is JSON: median seconds of
an iteration of each, their ratio, and ours by phase.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from configs.schema import ModelConfig, OutputConfig, RayConfig, RewardConfig, RolloutConfig, RunConfig
from configs.update import RLConfig
from rewards.runner import RewardSet
from rl.algorithms import build_algorithm
from rl.progress import Progress
from rl.ray_cluster import cluster
from rl.recorder import Recorder
from rl.task import Task
from rl.trl_arguments import with_adapter
from rl.trl_trainer import SidTrainer
from rollout.engine import engine_spec
from rollout.hf_engine import load_policy
from rollout.ray_fleet import Fleet
from tests.bench.world import BenchWorld, add_options, make_world

PHASES = ("sync", "rollout", "reward", "update")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, prompts=64, prompt=64, levels=3)
    parser.add_argument("--group", type=int, default=16, help="rollouts of a prompt, G")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--engine", choices=("vllm", "hf"), default="vllm", help="our rollout engine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, cluster(RayConfig()):
        folder = Path(name)
        world = make_world(options, folder / "policy")
        ours, fleet = _ours(options, world, folder)
        sides: dict[str, GRPOTrainer] = {"ours": ours, "trl": _trl(options, world, folder)}
        seconds: dict[str, list[float]] = defaultdict(list)
        phases: dict[str, list[float]] = defaultdict(list)
        for _ in range(options.repeats + 1):
            for side, trainer in sides.items():
                seconds[side].append(_iteration(trainer))
            for phase in PHASES:
                phases[phase].append(ours.phase.seconds.pop(phase, 0.0))
        fleet.close()
    took = {side: statistics.median(times[1:]) for side, times in seconds.items()}  # the first of each warms up
    print(
        json.dumps(
            {
                "ours_s": round(took["ours"], 3),
                "trl_s": round(took["trl"], 3),
                "ratio": round(took["trl"] / took["ours"], 2),
                "phases": {phase: round(statistics.median(times[1:]), 4) for phase, times in phases.items()},
            }
        )
    )


def _iteration(trainer: GRPOTrainer) -> float:
    """Seconds of one step: rollouts, rewards, loss, backward, optimizer."""
    if trainer.optimizer is None:
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        trainer.model.train()
    rows = [trainer.train_dataset[row] for row in range(len(trainer.train_dataset))]
    batch = [row for row in rows for _ in range(trainer.num_generations)]
    trainer.current_gradient_accumulation_steps = 1
    start = time.perf_counter()
    trainer.training_step(trainer.model, batch, None)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1
    return time.perf_counter() - start


def _ours(options: argparse.Namespace, world: BenchWorld, folder: Path) -> tuple[SidTrainer, Fleet]:
    config = RunConfig(
        model=ModelConfig(path=str(world.folder), dtype="float32"),
        rollout=RolloutConfig(engine=options.engine, group_size=options.group),
        rewards=[RewardConfig("ndcg@10")],
        rl=RLConfig(steps=1000, prompts_per_step=options.prompts, micro_batch_groups=options.prompts),
        output=OutputConfig(rollouts_every=0),
    )
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    rewards = RewardSet(config.rewards, world.decoder.catalog)
    task = Task(world.folder, tokenizer, world.decoder, {"train": world.samples}, rewards, 0, world.decoder.trie.depth)
    fleet = Fleet(engine_spec(config, world.folder), world.decoder)
    recorder = Recorder(folder, task, Progress(), rollouts_every=0)
    model = load_policy(world.folder, dtype="float32")
    return SidTrainer(model, task, fleet, build_algorithm(config), config, recorder, folder / "ours"), fleet


def _trl(options: argparse.Namespace, world: BenchWorld, folder: Path) -> GRPOTrainer:
    model, children = load_policy(world.folder, dtype="float32"), world.dict_trie()
    policy = with_adapter(model, RunConfig())
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    depth, rows = world.decoder.trie.depth, options.prompts * options.group
    targets = [
        tuple(path)
        for path in world.decoder.paths_of_items([s.targets[0] for s in world.samples]).tolist()
        for s in world.samples
    ]

    def hit(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        return [float(tuple(ids[:depth]) == targets[one]) for ids, one in zip(completion_ids, row, strict=True)]

    model.generate = functools.partial(
        model.generate,
        prefix_allowed_tokens_fn=lambda _, ids: children.get(tuple(ids[options.prompt :].tolist()), [0]),
    )
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[hit],
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=rows,
            num_generations=options.group,
            max_completion_length=depth,
            max_steps=1000,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict(
            {
                "prompt": [tokenizer.decode(sample.prompt_ids) for sample in world.samples],
                "row": list(range(len(world.samples))),
            }
        ),
        processing_class=tokenizer,
    )
    lengths = {len(tokenizer(text)["input_ids"]) for text in trainer.train_dataset["prompt"]}
    if lengths != {options.prompt}:
        raise RuntimeError(f"prompts of {options.prompt} tokens became {sorted(lengths)} through the tokenizer")
    return trainer


if __name__ == "__main__":
    np.random.seed(0)
    torch.manual_seed(0)
    main()
