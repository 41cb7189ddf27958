"""`ray job submit ... -- python -m rl.train` on a cluster of the test's own, which asks for a token.

The cluster listens on the loopback interface, on free ports and in a temporary folder; other Rays on the machine are
neither joined nor ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rl.conftest import MakePolicy, arguments, end_all, marked, quiet_environment, tiny_run, wait_until_gone

pytestmark = [pytest.mark.ray, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Cluster:
    """A running cluster."""

    address: str
    environment: dict[str, str]
    folder: Path

    def ray(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A `ray ...` command against this cluster."""
        return subprocess.run(
            [str(RAY), *words],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=REPOSITORY,
            env=self.environment | environment,
        )

    def submit(
        self, options: list[str], *flags: str, mark: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of a training, whose processes carry `mark`."""
        return self.ray(*self.submission(options, *flags, mark=mark), **environment)

    def submission(self, options: list[str], *flags: str, mark: str) -> list[str]:
        """The words of `ray job submit`."""
        variables = json.dumps({"env_vars": {"SIDRL_TEST_MARK": mark}})
        flags = ("--address", self.address, "--working-dir", ".", "--runtime-env-json", variables, *flags)
        return ["job", "submit", *flags, "--", sys.executable, "-m", "rl.train", "--algo", "grpo", *options]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    mark = uuid.uuid4().hex
    folder = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))  # sockets lie in it, and their paths must be short
    gcs, dashboard, agent, agent_grpc, metrics, client = free_ports(6)
    environment = quiet_environment(
        mark, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_TMPDIR=str(folder), HF_HUB_OFFLINE="1"
    )
    head = subprocess.Popen(
        [
            str(RAY), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
            "--num-cpus=3", "--object-store-memory=200000000", "--disable-usage-stats",
        ],
        stdout=(folder / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )  # fmt: skip
    running = Cluster(f"http://127.0.0.1:{dashboard}", environment, folder)
    try:
        end = time.monotonic() + 90
        while running.ray("job", "list", "--address", running.address).returncode:
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < end, (folder / "head.log").read_text()
            time.sleep(1)
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(head.pid, signal.SIGTERM)  # as `ray stop`, but this cluster alone
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(15)
        end_all(mark)
        shutil.rmtree(folder, ignore_errors=True)


Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def options(data: Path, make_policy: MakePolicy) -> Options:
    def make(output: Path, **changes: Any) -> list[str]:
        return arguments({**tiny_run(data, make_policy(), output), "eval.before": False, **changes})

    return make


def test_a_job(cluster: Cluster, options: Options, tmp_path: Path) -> None:
    """Logs reach the submitter, the status is 0, and the run took place in this cluster."""
    mark = uuid.uuid4().hex
    done = cluster.submit(options(tmp_path / "run"), mark=mark)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "joined the Ray cluster at " in told
    assert ": 3 CPUs, 0 GPUs" in told
    assert "rollout engine: hf (rollout.engine=hf), 1 of them" in told  # said in the worker, shown by the driver
    assert f"{tmp_path / 'run' / 'summary.json'}" in told
    assert "succeeded" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["engine"], summary["legal_rate"]) == (2, "hf", 1.0)
    assert wait_until_gone(mark) == []


def test_a_failing_job(cluster: Cluster, options: Options, tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    done = cluster.submit([*options(tmp_path / "run"), "--rl.learning_rte=1"], mark=mark)
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert "unknown option --rl.learning_rte" in told
    assert not (tmp_path / "run").exists()


def test_a_job_whose_data_is_broken(cluster: Cluster, options: Options, tmp_path: Path) -> None:
    """Found by the worker, told by the driver, seen by the submitter."""
    mark = uuid.uuid4().hex
    done = cluster.submit(options(tmp_path / "run", **{"data.path": "/nowhere"}), mark=mark)
    told = done.stdout + done.stderr
    assert done.returncode != 0
    assert "error: /nowhere: does not exist" in told
    assert "Traceback" not in told
    assert wait_until_gone(mark) == []


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_stranger_is_refused(cluster: Cluster, options: Options, tmp_path: Path, mode: str) -> None:
    """With a wrong token, and without any."""
    stranger = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = cluster.submit(options(tmp_path / "run"), mark=uuid.uuid4().hex, **stranger)
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
    told = (done.stdout + done.stderr).lower()
    assert "token" in told or "unauthorized" in told


def test_a_stopped_job_leaves_nothing_behind(cluster: Cluster, options: Options, tmp_path: Path) -> None:
    mark, name = uuid.uuid4().hex, f"long-{uuid.uuid4().hex[:8]}"
    words = options(tmp_path / "run", **{"rl.steps": 100_000, "rollout.num_engines": 2})
    started = cluster.submit(words, "--no-wait", "--submission-id", name, mark=mark)
    assert started.returncode == 0, started.stdout + started.stderr
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < end, cluster.ray("job", "logs", name, "--address", cluster.address).stdout
        time.sleep(0.2)
    assert len(marked(mark)) >= 4  # driver, worker, two engines
    stopped = cluster.ray("job", "stop", name, "--address", cluster.address)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert wait_until_gone(mark, 40) == []
    status = cluster.ray("job", "status", name, "--address", cluster.address)
    assert "was stopped" in status.stdout + status.stderr


def test_an_address_joins_the_cluster(cluster: Cluster, options: Options, tmp_path: Path) -> None:
    """`ray.address` without a job, from a process that knows the token."""
    address = (cluster.folder / "ray" / "ray_current_cluster").read_text().strip()
    done = subprocess.run(
        [sys.executable, "-m", "rl.train", *options(tmp_path / "run", dry_run=True), f"--ray.address={address}"],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=cluster.environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"joined the Ray cluster at {address}: 3 CPUs" in done.stdout


def test_without_an_address_it_starts_its_own(cluster: Cluster, options: Options, tmp_path: Path) -> None:
    """Though somebody's cluster runs on this machine and its address stands in Ray's temporary folder."""
    own = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-m", "rl.train", *options(tmp_path / "run", dry_run=True)],
        capture_output=True, text=True, timeout=120, cwd=REPOSITORY, env=own,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "started Ray on this machine: " in done.stdout
