"""Ray: start it on this machine or join a cluster, and run the training in a worker of its own.

Ray reads its authentication mode when it is imported, so it is imported inside the functions, after the mode is set.
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from configs.schema import RayConfig, RunConfig
from rl.progress import Progress, Snapshot, View


@contextmanager
def cluster(config: RayConfig) -> Iterator[str]:
    """Connect for the length of the block; yields what it connected to, for people.

    `ray.address`, else the cluster whose job this is (`RAY_ADDRESS`), else a Ray of its own that
    asks for a token which nobody else has, and ends with the block. (Ray's own ports listen on every interface; the
    token is what guards them.)
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address and "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if address:
        ray.init(address=address, log_to_driver=False, logging_level="error")
        where = f"joined the Ray cluster at {ray.get_runtime_context().gcs_address}"
    else:
        ray.init(
            "local", _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False, logging_level="error"
        )
        where = "started Ray on this machine"
    resources = ray.cluster_resources()
    try:
        yield f"{where}: {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs"
    finally:
        ray.shutdown()


class TrainWorker:
    """The process that trains. Its rollout engines are its own actors and end with it."""

    def __init__(self) -> None:
        self._progress = Progress()

    def run(self, config: RunConfig, module: str) -> dict[str, Any]:
        """The whole run, by the function `run` of a module; returns its summary."""
        import torch

        from rollout.engine import cpu_threads

        run = importlib.import_module(module).run

        torch.set_num_threads(cpu_threads(config.rollout)[0])
        summary: dict[str, Any] = run(config, self._progress)
        return summary

    def progress(self, seen: int) -> Snapshot:
        """What it is doing now."""
        return self._progress.snapshot(seen)


def run_in_worker(config: RunConfig, module: str) -> dict[str, Any]:
    """Train in a Ray worker and show its progress here; returns the run's summary.

    Args:
        config: the settings.
        module: `rl.train`, or another whose `run` does what that one's does.

    Raises:
        whatever the run raised, as itself where it is an error of the user's settings or data.
    """
    import ray
    from ray.exceptions import RayTaskError

    config = with_gpu_shares(config, ray.cluster_resources().get("GPU", 0))
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    worker = (
        ray.remote(concurrency_groups={"watch": 1})(TrainWorker)
        .options(
            num_cpus=config.ray.trainer_cpus,
            num_gpus=config.ray.trainer_gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        )
        .remote()
    )
    done = worker.run.remote(config, module)
    progress = worker.progress.options(concurrency_group="watch")
    try:
        with View() as view:
            while not ray.wait([done], timeout=0.2)[0]:
                view.show(ray.get(progress.remote(view.seen)))
            view.show(ray.get(progress.remote(view.seen)))
        return ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, (ValueError, FileNotFoundError)):
            raise error.cause from None
        raise
    finally:
        ray.kill(worker)


def with_gpu_shares(config: RunConfig, gpus: float) -> RunConfig:
    """Settle the GPUs of trainer and engines where they are left open (-1).

    One each where the cluster has enough; else all of them share, since they take turns as a rule; none without.
    """
    processes = config.rollout.num_engines + 1 + config.distill.teachers
    share = 1.0 if gpus >= processes else int(100 * gpus / processes) / 100
    trainer, engine = config.ray.trainer_gpus, config.rollout.gpus_per_engine
    distill = config.distill
    if distill.teachers and distill.gpus_per_teacher < 0:
        distill = replace(distill, gpus_per_teacher=share)
    return replace(
        config,
        ray=replace(config.ray, trainer_gpus=share if trainer < 0 else trainer),
        rollout=replace(config.rollout, gpus_per_engine=share if engine < 0 else engine),
        distill=distill,
    )
