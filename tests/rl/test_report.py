"""The table and the picture of a run."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rl.metrics import EvalResult
from rl.report import _general, _read_steps, _running_mean, draw_run, table


def result(values: dict[str, float], intervals: dict[str, tuple[float, float]]) -> EvalResult:
    return EvalResult(values=values, intervals=intervals, per_user={}, rows=1234)


BEFORE = result(
    {"hr@1": 0.10, "mrr": 0.20, "hr@5": 0.0, "coverage@10": 0.5}, {"hr@1": (0.09, 0.11), "mrr": (0.18, 0.22)}
)
AFTER = result(
    {"hr@1": 0.15, "mrr": 0.19, "hr@5": 0.1, "coverage@10": 0.6}, {"hr@1": (0.13, 0.17), "mrr": (0.17, 0.21)}
)


def lines_of(before: EvalResult | None, after: EvalResult | None, keys: list[str] | None = None) -> list[list[str]]:
    """Body rows of the printed table, split into cells."""
    page = io.StringIO()
    Console(width=140, file=page).print(table(before, after, keys))
    rows = [line for line in page.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in rows]


def test_table_rows() -> None:
    assert lines_of(BEFORE, AFTER) == [
        ["hr@1", "0.1000 [0.0900, 0.1100]", "0.1500 [0.1300, 0.1700]", "+50.0%", "▲"],
        ["mrr", "0.2000 [0.1800, 0.2200]", "0.1900 [0.1700, 0.2100]", "-5.0%", ""],
        ["hr@5", "0.0000", "0.1000", "-", ""],
        ["coverage@10", "0.5000", "0.6000", "+20.0%", ""],
    ]


def test_table_marks_a_fall() -> None:
    assert lines_of(AFTER, BEFORE, ["hr@1"])[0][-2:] == ["-33.3%", "▼"]


def test_table_of_one_side() -> None:
    assert lines_of(BEFORE, None, ["hr@1"]) == [["hr@1", "0.1000 [0.0900, 0.1100]"]]
    assert lines_of(None, AFTER, ["coverage@10"]) == [["coverage@10", "0.6000"]]
    assert lines_of(None, None) == []


def test_table_of_equal_zeros() -> None:
    zero = result({"hr@1": 0.0}, {"hr@1": (0.0, 0.0)})
    assert lines_of(zero, zero) == [["hr@1", "0.0000 [0.0000, 0.0000]", "0.0000 [0.0000, 0.0000]", "+0.0%", ""]]


# --- the picture

KEYS = ("hr@1", "hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50")
SIDE = {key: 0.05 * (i + 1) for i, key in enumerate(KEYS)}
SPANS = {key: [value * 0.9, value * 1.1] for key, value in SIDE.items()}
STEPS: list[dict[str, object]] = [
    {"step": s, "reward": s / 50, "legal_rate": 1.0, "zero_signal_groups": 0.4} for s in range(1, 41)
]


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize(
    "summary",
    [
        {"before": SIDE, "after": SIDE, "before_interval": SPANS, "after_interval": SPANS},
        {"before": None, "after": SIDE, "before_interval": None, "after_interval": SPANS},
        {"after": SIDE},
        {"before": {"hr@1": 0.0}, "after": {"hr@1": 0.0}},
        {"before": {"ndcg@5": 0.1}, "after": {"hr@1": 0.2}, "after_interval": SPANS},
        {"before": {"other": 1.0}},
        {},
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 40])
@pytest.mark.filterwarnings("error")
def test_draws_what_there_is(tmp_path: Path, summary: dict[str, object], steps: int) -> None:
    metrics = write(tmp_path / "metrics.jsonl", STEPS[:steps])
    out = tmp_path / "deep" / "run.png"
    assert draw_run(metrics, summary, out) == out
    assert size_of_png(out) == (1600, 700)


def test_partial_records(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": 1, "loss": 0.1}, {"step": 2, "reward": float("nan")}, {"eval": 1}]
    assert size_of_png(draw_run(write(tmp_path / "m.jsonl", records), {}, tmp_path / "a.png")) == (1600, 700)
    assert size_of_png(draw_run(tmp_path / "absent.jsonl", {}, tmp_path / "b.png")) == (1600, 700)
    only_reward: list[dict[str, object]] = [{"step": s, "reward": 1.0} for s in range(5)]
    assert size_of_png(draw_run(write(tmp_path / "r.jsonl", only_reward), {}, tmp_path / "c.png")) == (1600, 700)


def test_general_ability_is_drawn(tmp_path: Path) -> None:
    """Before training, where valid was evaluated, and after; a run of distillation alone is drawn too."""
    records: list[dict[str, object]] = [{"step": s, "distill/divergence": 1 / s} for s in range(1, 9)]
    records[3]["valid/general/exact"] = 0.4
    summary = {"before": SIDE | {"general/exact": 0.9}, "after": SIDE | {"general/exact": 0.6}}
    steps, shares = _general(records, summary)
    assert (steps.tolist(), shares.tolist()) == ([0, 4, 8], [0.9, 0.4, 0.6])
    assert [part.tolist() for part in _general(records[:2], {"before": SIDE})] == [[], []]
    assert size_of_png(draw_run(write(tmp_path / "m.jsonl", records), summary, tmp_path / "a.png")) == (1600, 700)


def test_steps_are_sorted_and_the_last_writing_counts(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"step": 2, "reward": 1}, {"step": 1, "reward": 2}, {"step": 2, "reward": 3}]
    assert _read_steps(write(tmp_path / "m.jsonl", records)) == [{"step": 1, "reward": 2}, {"step": 2, "reward": 3}]


def test_a_line_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", [{"step": 1, "reward": 1}])
    path.write_text(path.read_text() + '{"step": 2, "rew')
    assert _read_steps(path) == [{"step": 1, "reward": 1}]
    path.write_text(path.read_text() + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2 is no JSON"):
        _read_steps(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"m\.jsonl:1 is no JSON object"):
        _read_steps(path)


def test_running_mean() -> None:
    assert _running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]


def test_no_heavy_imports_and_no_pyplot() -> None:
    heavy = "{'torch', 'vllm', 'ray', 'trl', 'matplotlib.pyplot'}"
    code = f"import sys, rl.metrics, rl.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
