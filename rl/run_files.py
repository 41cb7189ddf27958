"""The folder of a run: taken before it starts, filled when it ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import RunConfig
from rl.cache import write_json
from rl.progress import console

if TYPE_CHECKING:
    from rl.evaluate import Evaluation
    from rl.recorder import Recorder
    from rl.task import Task
    from rl.trl_trainer import SidTrainer
    from rollout.engine import EngineSpec
    from rollout.ray_fleet import Fleet


def claim_folder(folder: Path, config: RunConfig) -> None:
    """Make the run's folder.

    Raises:
        ValueError: when it holds another run already and this run does not resume it.
    """
    if config.resume is None and (folder / "config.yaml").exists():
        raise ValueError(f"output_dir={folder} holds a run already: --resume {folder} continues it, or name another")
    folder.mkdir(parents=True, exist_ok=True)


def write_outputs(
    config: RunConfig,
    task: Task,
    trainer: SidTrainer,
    recorder: Recorder,
    before: Evaluation | None,
    after: Evaluation | None,
    spec: EngineSpec,
    fleet: Fleet,
    seconds: float,
) -> dict[str, Any]:
    """Write adapter or model, merged model on request, picture and `summary.json`; returns the summary."""
    from rl.report import draw_run

    folder = Path(config.output_dir or "")
    name = "adapter" if config.lora.enabled else "model"
    trainer.policy.save_pretrained(folder / name)
    task.tokenizer.save_pretrained(folder / name)
    if config.output.merged_model and config.lora.enabled:
        write_merged(trainer, task, folder / "merged")
    summary = {
        "algo": config.algo,
        "engine": spec.kind,
        "engines": fleet.about,
        "model": str(task.model_path),
        "seed": config.seed,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "legal_rate": min([recorder.legal_rate, *([after.legal_rate] if after else [])]),
        "skipped_rows": task.skipped,
    }
    for key, evaluation in (("before", before), ("after", after)):
        if evaluation:
            summary[key] = evaluation.flat()
            summary[f"{key}_interval"] = {k: list(pair) for k, pair in evaluation.result.intervals.items()}
    draw_run(recorder.metrics, summary, folder / "report.png")
    write_json(folder / "summary.json", summary)
    return summary


def write_merged(trainer: SidTrainer, task: Task, folder: Path) -> None:
    """The base model with the adapter folded in, as one Hugging Face folder."""
    from rollout.hf_engine import open_policy
    from rollout.weights import merged_weights

    plain = open_policy(task.model_path, trainer.config.model)
    plain.load_state_dict(merged_weights(trainer.policy), strict=False)
    if folder.exists():
        shutil.rmtree(folder)
    plain.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)


def show_summary(summary: dict[str, Any], folder: Path) -> None:
    """A table for people, and where to look."""
    from rl.metrics import EvalResult
    from rl.report import BAR_METRICS, table

    before, after = (
        EvalResult(
            summary[key],
            {k: (low, high) for k, (low, high) in summary[f"{key}_interval"].items()},
            {},
            summary[key]["rows"],
        )
        if key in summary
        else None
        for key in ("before", "after")
    )
    if before or after:
        general = [key for key in (after or before).values if key.startswith("general/")]  # type: ignore[union-attr]
        more = ["mrr", "coverage@10", "diversity@10", "unconstrained_legal", *general]
        console.print(table(before, after, [*BAR_METRICS, *more]))
    console.print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, legal rate {summary['legal_rate']:.4f}, "
        f"engine {summary['engine']}"
    )
    for name in ("summary.json", "report.png", "metrics.jsonl", "rollouts", "adapter", "model", "merged"):
        if (folder / name).exists():
            console.print(f"  {folder / name}", markup=False)
