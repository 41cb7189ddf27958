"""Train on the built-in world by `configs/demo.yaml` and say where to look.

A finished run in `runs/demo` is shown again, a broken-off one is continued.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rl.progress import console, fail_clearly
from rl.run_files import show_summary
from rl.train import main as train

FOLDER = Path("runs/demo")
CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def main(argv: list[str]) -> None:
    """Run `rl.train` with the demo's settings; further options are passed on."""
    if (FOLDER / "summary.json").exists() and not argv:
        console.print(f"{FOLDER} holds a finished run (rm -r {FOLDER} runs it again)", markup=False)
        show_summary(json.loads((FOLDER / "summary.json").read_text()), FOLDER)
    elif (FOLDER / "config.yaml").exists():
        train(["--resume", str(FOLDER), *argv])
    else:
        train(["--algo", "grpo", "--config", str(CONFIG), "--output_dir", str(FOLDER), *argv])
    console.print(
        f"Look at {FOLDER / 'report.png'} (reward by step, HR and NDCG before and after) first, then at "
        f"{FOLDER / 'summary.json'} and {FOLDER / 'rollouts'}.",
        markup=False,
    )


if __name__ == "__main__":
    with fail_clearly():
        main(sys.argv[1:])
