"""What a person looks at after a run: a table and one picture of before, after and the way between."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.table import Table

from rl.metrics import EvalResult

BAR_METRICS = ("hr@1", "hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50")

# Okabe-Ito: told apart with any colour vision, and by lightness in print.
_BEFORE, _AFTER, _SIGNAL, _GENERAL = "#999999", "#0072B2", "#D55E00", "#009E73"


def table(before: EvalResult | None, after: EvalResult | None, keys: Sequence[str] | None = None) -> Table:
    """Metrics before and after with their 95 % intervals.

    The last column marks rows whose intervals do not overlap: up where the metric rose, down where it fell. That is the
    stricter test; `rl.metrics.paired_difference` sees smaller changes on the same users.

    Args:
        before: evaluation before training, None when there was none.
        after: evaluation after training, None when there was none.
        keys: metrics to show, in order; None shows all.
    """
    shown = keys if keys is not None else list(dict.fromkeys([*_values(before), *_values(after)]))
    rows = before.rows if before else after.rows if after else 0
    if before is None or after is None:  # one evaluation: nothing to compare
        only, single = (
            after or before,
            Table(title=f"Evaluation on {rows:,} users", caption="[ ] 95 % interval over users"),
        )
        single.add_column("metric", no_wrap=True)
        single.add_column("value", justify="right", no_wrap=True)
        for key in shown:
            single.add_row(key, _cell(_values(only).get(key), _intervals(only).get(key)))
        return single
    result = Table(title=f"Evaluation on {rows:,} users", caption="[ ] 95 % interval over users · ▲ ▼ intervals apart")
    result.add_column("metric", no_wrap=True)
    for name in ("before", "after", "change"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("", no_wrap=True)
    for key in shown:
        old, new = _values(before).get(key), _values(after).get(key)
        mark = _mark(_intervals(before).get(key), _intervals(after).get(key))
        cells = (_cell(old, _intervals(before).get(key)), _cell(new, _intervals(after).get(key)), _change(old, new))
        result.add_row(key, *cells, mark, style="bold" if mark else None)
    return result


def draw_run(metrics_jsonl: Path, summary: Mapping[str, Any], out: Path) -> Path:
    """One PNG (1600 x 700) of a run: reward, legal rate and zero-signal groups by step; HR and NDCG before and after.

    With `eval.general` the share of general answers met stands beside the other shares, at each evaluation. A run
    without rewards, of distillation alone, shows its distance from the teacher in their place.

    What is missing (no step logged yet, no evaluation) leaves its panel with a note; the rest is drawn. pyplot and its
    global state are not touched.

    Args:
        metrics_jsonl: one JSON object per step with `step`, `reward`, `legal_rate`, `zero_signal_groups` and, where
            valid was evaluated, `valid/general/exact`; other keys are passed over, a repeated step (resumed run) counts
            as last written. A missing file is an empty one.
        summary: may hold `before` and `after`, metric -> value, and `before_interval` and `after_interval`,
            metric -> [low, high].
        out: where the PNG goes.

    Returns:
        `out`.

    Raises:
        ValueError: when a line is no JSON object (a last line cut short by a killed run is passed over).
    """
    records = _read_steps(Path(metrics_jsonl))
    figure = Figure(figsize=(16, 7), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.4, 1), width_ratios=(1, 1.15))
    reward_axes = figure.add_subplot(grid[0, 0])
    share_axes = figure.add_subplot(grid[1, 0], sharex=reward_axes)
    _draw_reward(reward_axes, records)
    _draw_shares(share_axes, records, summary)
    _draw_bars(figure.add_subplot(grid[:, 1]), summary)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return out


def _values(result: EvalResult | None) -> Mapping[str, float]:
    return result.values if result else {}


def _intervals(result: EvalResult | None) -> Mapping[str, tuple[float, float]]:
    return result.intervals if result else {}


def _cell(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    # The backslash keeps rich from reading the bracket as markup.
    return f"{value:.4f}" + (f" \\[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _change(old: float | None, new: float | None) -> str:
    """Relative change; none from 0, where it has no meaning."""
    if old is None or new is None or (old == 0 and new != 0):
        return "-"
    return f"{(new - old) / old if old else 0.0:+.1%}"


def _mark(old: tuple[float, float] | None, new: tuple[float, float] | None) -> str:
    if old is None or new is None:
        return ""
    return "▲" if new[0] > old[1] else "▼" if new[1] < old[0] else ""


def _read_steps(path: Path) -> list[dict[str, Any]]:
    """Records with a step, in step order, each step once."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps: dict[float, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is no JSON object")
        if "step" in record:
            steps[record["step"]] = steps.get(record["step"], {}) | record
    return [steps[step] for step in sorted(steps)]


def _series(records: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one key, where it is a finite number."""
    points = [
        (record["step"], record[key])
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, of fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return (total[stop] - total[start]) / (stop - start)


def _draw_reward(axes: Axes, records: list[dict[str, Any]]) -> None:
    steps, values = _series(records, "reward")
    title, label = "Reward during training", "mean reward"
    if not len(steps) and len(_series(records, "distill/divergence")[0]):  # distillation alone earns no reward
        steps, values = _series(records, "distill/divergence")
        title, label = "Distance from the teacher during training", "mean divergence of a token"
    _dress(axes, title)
    axes.set_ylabel(label)
    axes.tick_params(labelbottom=False)
    if not len(steps):
        _note(axes, "no step logged")
        return
    window = int(np.clip(len(steps) // 10, 1, 50))
    many = len(steps) > 1
    axes.plot(steps, values, color=_AFTER, alpha=0.3, linewidth=1, marker="" if many else "o", label="each step")
    if window > 1:
        mean = _running_mean(values, window)
        axes.plot(steps, mean, color=_AFTER, linewidth=2.2, label=f"mean of the last {window} steps")
    axes.legend(loc="best", frameon=False)


def _draw_shares(axes: Axes, records: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    _dress(axes, "")
    axes.set_xlabel("step")
    axes.set_ylabel("share")
    axes.set_ylim(-0.04, 1.04)
    lines = (("legal_rate", "legal items", _AFTER, "-"), ("zero_signal_groups", "groups without signal", _SIGNAL, "--"))
    for key, label, colour, dash in lines:
        steps, shares = _series(records, key)
        if len(steps):
            marker = "" if len(steps) > 1 else "o"
            axes.plot(steps, shares, color=colour, linestyle=dash, linewidth=1.6, marker=marker, label=label)
    steps, shares = _general(records, summary)
    if len(steps):
        axes.plot(steps, shares, color=_GENERAL, linestyle=":", linewidth=1.6, marker="D", label="general answers")
    if axes.lines:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
    else:
        _note(axes, "no step logged")


def _general(records: list[dict[str, Any]], summary: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and shares of general answers met: before training, at each evaluation on valid, after training."""
    last = records[-1]["step"] if records else 0
    ends = [(side, (summary.get(side) or {}).get("general/exact")) for side in ("before", "after")]
    told = {0 if side == "before" else last: value for side, value in ends if value is not None}
    between = dict(zip(*(part.tolist() for part in _series(records, "valid/general/exact")), strict=True))
    points = sorted((between | told).items())
    return np.array([step for step, _ in points], dtype=float), np.array([value for _, value in points], dtype=float)


def _draw_bars(axes: Axes, summary: Mapping[str, Any]) -> None:
    _dress(axes, "Recommended lists before and after training")
    axes.grid(visible=False, axis="x")
    sides = [(name, summary.get(name) or {}, summary.get(f"{name}_interval") or {}) for name in ("before", "after")]
    sides = [side for side in sides if any(key in side[1] for key in BAR_METRICS)]
    keys = [key for key in BAR_METRICS if any(key in values for _, values, _ in sides)]
    if not keys:
        _note(axes, "no evaluation")
        return
    axes.set_ylabel("mean over users" + (", 95 % interval" if any(spans for _, _, spans in sides) else ""))
    # A gap sets the two families apart.
    place = np.array([i + 0.4 * key.startswith("ndcg") for i, key in enumerate(keys)])
    width = 0.8 / len(sides)
    top = 0.0
    for number, (name, values, intervals) in enumerate(sides):
        height = np.array([values.get(key, np.nan) for key in keys], dtype=float)
        spans = np.array([intervals.get(key) or (np.nan, np.nan) for key in keys], dtype=float)
        error = np.abs(spans - height[:, None]).T
        known = np.isfinite(error).all(axis=0)
        x = place + (number - (len(sides) - 1) / 2) * width
        colour = _BEFORE if name == "before" else _AFTER
        axes.bar(x, height, width * 0.95, label=name, color=colour)
        axes.errorbar(
            x[known], height[known], yerr=error[:, known], fmt="none", ecolor="black", elinewidth=1.2, capsize=3
        )
        for at, value, high in zip(x, height, np.fmax(height, spans[:, 1]), strict=True):
            if math.isfinite(value):
                text = f"{value:.3f}"
                axes.annotate(text, (at, high), (0, 4), textcoords="offset points", ha="center", fontsize=9)
                top = max(top, float(high))
    axes.set_xticks(place, [key.upper() for key in keys])
    axes.set_ylim(0, top * 1.1 or 1)
    axes.legend(loc="upper left", frameon=False)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=14, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_fontsize(12)
    axes.yaxis.label.set_fontsize(12)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#666666", fontsize=13)
    axes.grid(visible=False)
    axes.tick_params(bottom=False, labelbottom=False, left=False, labelleft=False)  # a shared x axis keeps its ticks
