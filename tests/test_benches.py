"""Each benchmark runs, on something tiny, and ends with the JSON line that it promises. No time is judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import need_vllm

SMALL = ["--prompts", "4", "--group", "2", "--items", "500", "--prompt", "8", "--codes", "16", "--repeats", "1"]

BENCHES = [
    pytest.param(
        "trie",
        ["--items", "2000", "--batch", "8", "--codes", "64", "--repeats", "1"],
        {"build_s", "bytes_per_item", "step_ms", "item_ms", "hf_prefix_item_ms", "ratio_vs_hf"},
        id="trie",
    ),
    pytest.param(
        "update",
        ["--prompt", "8", "--group", "2", "--groups", "2", "--vocab", "1500", "--layers", "1", "--repeats", "1"],
        {"ours_s", "trl_s", "ratio", "grad_rel_diff", "ours_peak_mb", "trl_peak_mb"},
        id="update",
    ),
    pytest.param(
        "distill",
        ["--prompts", "2", "--texts", "2", "--prompt", "8", "--length", "6", "--vocab", "1500", "--layers", "1"],
        {"ours_s", "trl_s", "ratio", "grad_rel_diff", "peak_mb"},
        id="distill",
    ),
    pytest.param(
        "quantize",
        ["--items", "600", "--dimensions", "8", "--levels", "2", "--codes", "16"],
        {"rq_kmeans_s", "rq_vae_s", "rq_kmeans_error", "rq_vae_error"},
        id="quantize",
    ),
    pytest.param(
        "iteration",
        [*SMALL, "--engine", "hf"],
        {"ours_s", "trl_s", "ratio", "phases"},
        id="iteration",
        marks=pytest.mark.ray,
    ),
    pytest.param("rollout", SMALL, {"cost", "hf_ratio"}, id="rollout", marks=pytest.mark.vllm),
    pytest.param(
        "beam",
        ["--prompts", "2", "--width", "4", "--items", "500", "--prompt", "8", "--codes", "16", "--repeats", "1"],
        {"hf_ratio", "vllm_ratio", "vllm_engine_ratio", "same"},
        id="beam",
        marks=pytest.mark.vllm,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "keys"), BENCHES)
def test_it_runs(name: str, options: list[str], keys: set[str]) -> None:
    if name in ("rollout", "beam"):
        need_vllm()
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", f"tests.bench.{name}", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert keys <= set(figures)
    if name in ("update", "distill"):
        assert figures["grad_rel_diff"] < 1e-4
    if name == "beam":
        assert figures["same"] is True
