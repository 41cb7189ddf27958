"""Amazon Beauty by leave-one-out on CPU: from raw sequences to a trained and post-trained policy, beside SASRec.

    python -m examples.beauty --file ../shared/data/amazon-beauty/sequential_data_processed.txt

Sids come from collaborative embeddings of the training part (factorised PMI, residual k-means, one more code where
items collide). A small policy learns users' whole sequences from scratch, then GRPO goes on from it, on the same rows.
Each stage is a command of its own that this script only calls; finished stages are not run again. Options that this
script does not know go to `rl.train`. The last lines are the table of `docs/results.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from examples.stages import run_module
from rl.progress import console, fail_clearly

KEYS = ("hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@50", "ndcg@50")
PUBLISHED = {"hr@5": 0.0454, "ndcg@5": 0.0321, "hr@10": 0.0648, "ndcg@10": 0.0384}
"""TIGER (arXiv 2305.05065) on the same sequences, with Sids from texts and a model of 13M parameters."""

HERE = Path(__file__).parent


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--file", type=Path, required=True, help="a line for each user: the user, then items")
    parser.add_argument("--folder", type=Path, default=Path("runs/beauty"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, to see that it runs")
    known, options = parser.parse_known_args()
    if not known.file.is_file():
        raise FileNotFoundError(f"{known.file}: no such file")
    console.print(table(run(known, options)), markup=False)


def run(known: argparse.Namespace, more: list[str]) -> dict[str, dict[str, Any]]:
    """Metrics on test of each row of the table; `more` goes to `rl.train`."""
    at, seed, tiny = known.folder, str(known.seed), known.tiny
    log = at / "log.txt"
    rows, sids, world, sft, rl = (at / name for name in ("rows", "sids", "world", "sft", "rl"))

    def stage(done: Path, module: str, *options: str) -> None:
        if not done.exists():
            run_module(module, options, log)

    codes = ["--quantizer.levels", "2", "--quantizer.codes", "8", "--dimensions", "8"] if tiny else []
    few = ["--settings.max_steps", "4", "--settings.evaluate_every", "2", "--settings.save_every", "2"] if tiny else []
    small = {"rl.steps": 2, "rl.prompts_per_step": 8, "rl.micro_batch_groups": 4, "rollout.group_size": 4}
    small |= {"eval.max_samples": 40, "eval.bootstrap": 10, "eval.beam_width": 10, "eval.unconstrained_samples": 8}
    steps = [f"--{key}={value}" for key, value in small.items()] if tiny else []
    stage(rows, "examples.build", "sequences", "--file", str(known.file), "--out", str(rows))
    stage(
        sids / "semantic_id_dict.json", "examples.quantize", "--config", str(HERE / "sids.yaml"), "--out", str(sids),
        "--sequences", str(rows / "sequences.txt"), "--items", str(rows / "items.parquet"), "--quantizer.seed", seed,
        *codes,
    )  # fmt: skip
    stage(world, "examples.build", "world", "--rows", str(rows), "--sids", str(sids), "--out", str(world))
    model = ["--hidden_size", "128", "--layers", "4", "--heads", "4", "--dropout", "0.3", "--seed", seed]
    stage(at / "base", "examples.pretrain", "new", "--out", str(at / "base"), *model)
    items = ["--model", str(at / "base"), "--data", str(world), "--noise", "1.0", "--out", str(at / "items")]
    stage(at / "items", "examples.pretrain", "expand", *items)
    source = json.dumps([{"path": str(world), "kind": "sequences"}])
    given = ["--settings.model", str(at / "items"), "--settings.out", str(sft), "--settings.sources", source]
    resume = ["--settings.resume", "true"] if list(sft.glob("checkpoints/checkpoint-*")) else []
    given += ["--settings.seed", seed, *few, *resume]
    stage(sft / "model", "examples.pretrain", "train", "--config", str(HERE / "sft.yaml"), *given)
    options = [f"--model.path={sft / 'model'}", f"--data.path={world}", f"--seed={seed}", f"--output_dir={rl}"]
    options += [*steps, *more]
    stage(rl / "summary.json", "rl.train", "--config", str(HERE / "rl.yaml"), *options)
    baseline = ["--data", str(world), "--out", str(at / "sasrec.json"), "--seed", seed]
    baseline += ["--epochs", "1"] if tiny else []
    stage(at / "sasrec.json", "examples.beauty.sasrec", *baseline)
    summary = json.loads((rl / "summary.json").read_text())
    sasrec: dict[str, Any] = json.loads((at / "sasrec.json").read_text())
    return {
        "TIGER, published": PUBLISHED,
        "SASRec, trained here": sasrec,
        "policy after SFT": summary["before"],
        "policy after GRPO": summary["after"],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | " + " | ".join(key.upper() for key in KEYS) + " |", "| --- |" + " ---: |" * len(KEYS)]
    for name, values in results.items():
        cells = [f"{values[key]:.4f}" if key in values else "" for key in KEYS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with fail_clearly():
        main()
