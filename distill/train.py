"""`python -m distill.train`: on-policy distillation, by itself or beside RL.

    python -m distill.train --distill.every 1 --distill.prompts FOLDER --distill.teacher FOLDER --model.path FOLDER

The student writes its own answers to general prompts, the teacher says how it would have gone on at each token, and the
student takes a step down the divergence. Everything else is `rl.train`: settings, engines, checkpoints, evaluation of
the recommendations before and after, what is written. `distill.every=1` distils in every step, `N` in every N-th one,
with RL in the others; `distill.weight` mixes texts into the batches of RL.
"""

from __future__ import annotations

import sys
from typing import Any

from configs.schema import RunConfig
from rl.progress import Progress, fail_clearly
from rl.train import launch
from rl.train import run as train


def main(argv: list[str] | None = None) -> None:
    """Read the settings, then train in a Ray worker (or, with `--dry-run`, only check and tell)."""
    launch(argv, "distill.train")


def run(config: RunConfig, progress: Progress) -> dict[str, Any]:
    """The whole run, in the process that trains; returns what `summary.json` holds.

    Raises:
        ValueError: when settings, data, student and teacher do not fit each other.
        FleetError: when a rollout engine fails or serves the wrong weights.
    """
    from distill.trainer import distilling

    return train(config, progress, trainer_of=distilling)


if __name__ == "__main__":
    with fail_clearly():
        main(sys.argv[1:])
