"""`python -m rl.evaluate`, and the evaluation before and after training: constrained beam search as deployed."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from configs.load import parse_run
from configs.schema import RunConfig
from rl.ability import general_ability
from rl.batch import BatchScorer
from rl.cache import write_json
from rl.candidates import rank_candidates
from rl.metrics import EvalResult, evaluate_lists
from rl.progress import Progress, console, fail_clearly
from rl.quiet import quiet_libraries
from rl.task import Task, load_data, policy_folder, prepare_task
from rl.thoughts import thought_first
from rollout.hf_engine import HFEngine, batches_by_length, open_policy
from rollout.search import beam
from rollout.types import Sample, Sampling


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        result: metrics of the constrained beams.
        legal_rate: share of listed items that are in the catalogue (1.0: the trie allows nothing else).
        unconstrained_legal: share of legal items when the policy writes without the trie.
        seconds: how long it took.
        general: perplexity and exact answers on `eval.general`, empty without it.
    """

    result: EvalResult
    legal_rate: float
    unconstrained_legal: float
    seconds: float
    general: dict[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """Flat keys for `summary.json`."""
        return {
            **self.result.values,
            **self.general,
            "legal_rate": self.legal_rate,
            "unconstrained_legal": self.unconstrained_legal,
            "rows": self.result.rows,
            "seconds": round(self.seconds, 2),
        }


def evaluate(
    model: PreTrainedModel, task: Task, config: RunConfig, split: str, progress: Progress, phase: str = "evaluate"
) -> Evaluation:
    """Beam search of `eval.beam_width` for the rows of a split, scored at item and Sid level.

    A row that thinks does so first, greedily. What a row may not be recommended is left out of its list. Under
    `--algo pl` the list of a row with candidates is these, ranked by what that algorithm trains: their probabilities
    under the whole trie.
    """
    start = time.perf_counter()
    settings = config.eval
    samples = task.samples[split][: settings.max_samples or None]
    was_training = model.training
    model.eval()
    engine = HFEngine(model, task.decoder, max_batch_prompts=settings.batch_prompts)
    samples = thought_first(engine, samples, task.thought)
    lists: list[list[int]] = [[] for _ in samples]
    ranks = config.algo == "pl"
    whole = [row for row, sample in enumerate(samples) if not ranks or sample.record.candidates is None]
    beams = beam_lists(engine, [samples[row] for row in whole], config, progress, phase)
    restricted = sorted(set(range(len(samples))) - set(whole))
    scorer = BatchScorer(task, config, engine.trie, nullcontext)
    ranked = rank_candidates(model, scorer, [samples[row] for row in restricted], settings.batch_prompts)
    for row, sids in zip([*whole, *restricted], [*beams, *ranked], strict=True):
        lists[row] = sids
    listed = np.concatenate([np.asarray(sids) for sids in lists])
    free = samples[: settings.unconstrained_samples]
    groups = engine.generate(
        free, Sampling(1, temperature=config.rollout.temperature, constrained=False, seed=config.seed)
    )
    model.train(was_training)
    result = evaluate_lists(
        [[sid for sid in sids if sid >= 0] for sids in lists],
        [sample.targets for sample in samples],
        [sample.gains for sample in samples],
        task.decoder.catalog,
        bootstrap=settings.bootstrap,
        seed=config.seed,
    )
    legal = [group.rollouts[0].legal for group in groups]
    return Evaluation(
        result,
        float((listed >= 0).mean()),
        float(np.mean(legal)) if legal else float("nan"),
        time.perf_counter() - start,
        general_ability(model, task.general, task.tokenizer.pad_token_id, settings.batch_prompts)
        if task.general
        else {},
    )


def beam_lists(
    engine: HFEngine, samples: list[Sample], config: RunConfig, progress: Progress, phase: str
) -> list[list[int]]:
    """The sid indices each sample's beam lists, best first; -1 would be a path outside the catalogue."""
    width = min(config.eval.beam_width, engine.decoder.trie.num_leaves)
    lists: list[list[int]] = [[] for _ in samples]
    done = 0
    for rows in batches_by_length(samples, config.eval.batch_prompts):
        batch = [samples[row] for row in rows]
        prompts, views = [sample.prompt_ids for sample in batch], engine.decoder.views(batch)
        leaves, _ = beam(engine.model, engine.trie, prompts, width, views=views)
        for row, sids in zip(rows, engine.decoder.trie.rows(leaves.reshape(-1)).reshape(leaves.shape), strict=True):
            lists[row] = sids.tolist()
        done += len(rows)
        progress.update(phase, done, len(samples))
    return lists


def main(argv: list[str] | None = None) -> None:
    """Evaluate `model.path` (or the warm policy) and print a table; JSON goes to `--output_dir` if it is set."""
    from rl.report import table
    from rl.warmup import warm_up

    config = parse_run(argv, prog="python -m rl.evaluate")
    quiet_libraries(None)
    progress = Progress()
    with progress.shown():
        world, folder = load_data(config, progress.say)
        path = policy_folder(
            config, world, folder, progress.say, lambda scratch: warm_up(config, world, scratch, progress)
        )
        task = prepare_task(config, world, path, progress.say)
        model = open_policy(path, config.model)
        evaluation = evaluate(model, task, config, config.eval.split, progress)
    console.print(table(None, evaluation.result))
    if evaluation.general:
        console.print(", ".join(f"{name} {value:.4g}" for name, value in evaluation.general.items()))
    console.print(
        f"{evaluation.result.rows} rows of {config.eval.split} in {evaluation.seconds:.1f} s; legal items: "
        f"{evaluation.legal_rate:.1%} with the trie, {evaluation.unconstrained_legal:.1%} without it"
    )
    if config.output_dir:
        target = Path(config.output_dir) / f"evaluation_{config.eval.split}.json"
        write_json(target, report(evaluation, path))
        console.print(f"wrote {target}", markup=False)


def report(evaluation: Evaluation, model_path: Path) -> dict[str, Any]:
    """An evaluation as plain data."""
    return {
        "model": str(model_path),
        "values": evaluation.flat(),
        "intervals": {key: list(pair) for key, pair in evaluation.result.intervals.items()},
    }


if __name__ == "__main__":
    with fail_clearly():
        main(sys.argv[1:])
