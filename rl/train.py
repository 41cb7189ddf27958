"""`python -m rl.train --algo grpo`: RL post-training of a recommender that writes semantic ids.

    Sample ─► Fleet.generate ─► RolloutGroup ─► RewardSet.score ─► Algorithm.advantages ─► SidTrainer update ─► sync ─┐
      ▲                                                                                                               │
      └───────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

The loop itself is `SidTrainer._generate_and_score_completions` in `rl/trl_trainer.py`; this file is what stands around
it: settings, cluster, policy, evaluation before and after, and what is written.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.load import parse_run
from configs.load import save as save_config
from configs.schema import RunConfig
from rl.progress import Progress, console, fail_clearly

if TYPE_CHECKING:
    from rl.trl_trainer import SidTrainer


def main(argv: list[str] | None = None) -> None:
    """Read the settings, then train in a Ray worker (or, with `--dry-run`, only check and tell)."""
    launch(argv, "rl.train")


def launch(argv: list[str] | None, module: str) -> None:
    """What the command lines of `rl.train` and `distill.train` do.

    Raises:
        ValueError: when the settings ask for distillation and the module does none, or the other way round.
    """
    config = parse_run(argv, prog=f"python -m {module}")
    distils = bool(config.distill.every or config.distill.weight)
    if distils and module == "rl.train":
        raise ValueError("distill.every, distill.weight: `python -m distill.train` takes these settings, and distils")
    if module == "distill.train" and not distils:
        raise ValueError("distill.every=0 and distill.weight=0: set distill.every=1 to distil in each step")
    folder = Path(
        config.output_dir or config.resume or f"runs/{config.algo}-{time.strftime('%Y%m%d-%H%M%S')}"
    ).absolute()
    config = replace(config, output_dir=str(folder))

    from rl.ray_cluster import cluster, run_in_worker
    from rl.run_files import claim_folder, show_summary

    if config.dry_run:
        from rl.plan import show_plan

        show_plan(config)
        return
    claim_folder(folder, config)
    with cluster(config.ray) as where:
        console.print(f"{where}; run folder {folder}", markup=False)
        summary = run_in_worker(config, module)
    show_summary(summary, folder)


def run(
    config: RunConfig, progress: Progress, trainer_of: Callable[[RunConfig], type[SidTrainer]] | None = None
) -> dict[str, Any]:
    """The whole run, in the process that trains; returns what `summary.json` holds.

    Args:
        config: the settings.
        progress: is told what happens.
        trainer_of: the trainer of a configuration, that of its `algo` by default.

    Raises:
        ValueError: when settings, data, model and rewards do not fit each other (before any time is spent).
        FleetError: when a rollout engine fails or serves the wrong weights.
    """
    from rl.algorithms import build_algorithm
    from rl.evaluate import evaluate
    from rl.quiet import quiet_libraries
    from rl.recorder import Recorder, newest_checkpoint
    from rl.run_files import write_outputs
    from rl.task import load_data, policy_folder, prepare_task
    from rl.trainers import trainer_class
    from rl.warmup import warm_up
    from rollout.engine import engine_spec
    from rollout.hf_engine import open_policy
    from rollout.ray_fleet import Fleet

    start, folder = time.perf_counter(), Path(config.output_dir or "")
    quiet_libraries(folder / "worker.log")
    world, data = load_data(config, progress.say)
    path = policy_folder(config, world, data, progress.say, lambda scratch: warm_up(config, world, scratch, progress))
    task = prepare_task(config, world, path, progress.say)
    save_config(config, folder / "config.yaml")
    spec = engine_spec(config, path)
    progress.say(f"rollout engine: {spec.kind} ({spec.why}), {config.rollout.num_engines} of them")
    fleet = Fleet(spec, task.decoder)
    try:
        policy = open_policy(path, config.model)
        checkpoint = newest_checkpoint(folder / "checkpoints") if config.resume else None
        recorder = Recorder(folder, task, progress, rollouts_every=config.output.rollouts_every)
        recorder.start_at(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
        if config.resume:
            progress.say(
                f"resuming from {checkpoint}" if checkpoint else f"{folder} has no whole checkpoint: starting anew"
            )

        before = (
            evaluate(policy, task, config, config.eval.split, progress, "evaluate before")
            if config.eval.before
            else None
        )
        trainer = (trainer_of or trainer_class)(config)(
            policy, task, fleet, build_algorithm(config), config, recorder, folder / "checkpoints"
        )
        trainer.train_from(checkpoint)
        trainer.sync_weights()
        after = (
            evaluate(trainer.policy, task, config, config.eval.split, progress, "evaluate after")
            if config.eval.after
            else None
        )
    finally:
        fleet.close()
    return write_outputs(config, task, trainer, recorder, before, after, spec, fleet, time.perf_counter() - start)


if __name__ == "__main__":
    with fail_clearly():
        main(sys.argv[1:])
