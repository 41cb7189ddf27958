"""`python -m examples.distill.cotrain FOLDER TASKS SEED`: a small policy of items and general tasks together."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from configs.load import parse_run
from examples.stages import appearing
from rl.general import read_general, tokenise_general
from rl.progress import Progress, fail_clearly
from rl.task import load_data, rl_and_warmup_rows, tokenise
from rl.tiny import build_model, build_tokenizer, save_policy
from rl.trl_sft import sft
from rollout.data.prompts import sid_vocab
from rollout.decode import Decoder

ITEM_ROWS = 1500  # few enough that RL has something left to teach


def main(folder: Path, tasks: Path, seed: int) -> None:
    """Train from scratch and write the policy; it appears whole or not at all."""
    demo = Path(__file__).parents[2] / "configs" / "demo.yaml"
    config = parse_run(["--config", str(demo), f"--seed={seed}"], prog="python -m examples.distill.cotrain")
    settings = replace(config.warmup, max_steps=500, hidden_size=160)
    progress = Progress()
    world, _ = load_data(config, progress.say)
    tokenizer = build_tokenizer(world.catalog.format)
    torch.manual_seed(seed)
    model = build_model(tokenizer, hidden_size=settings.hidden_size, layers=settings.layers, heads=settings.heads)
    decoder = Decoder.build(world.catalog, sid_vocab(world.catalog.format, tokenizer), model.config.vocab_size)
    _, records = rl_and_warmup_rows(config, world)
    train, _ = tokenise(config, world, tokenizer, records[:ITEM_ROWS])
    valid, _ = tokenise(config, world, tokenizer, list(world.splits["valid"]))
    general, _ = tokenise_general(read_general(tasks, 2)[0], tokenizer, 64)
    with tempfile.TemporaryDirectory(prefix="sidrl-cotrain-") as scratch:
        model = sft(
            model, tokenizer, train, valid, decoder, settings, Path(scratch), seed=seed,
            report=lambda step, steps, logs: progress.update("co-training", step, steps, logs), general=general,
        )  # fmt: skip
    appearing(folder, lambda unfinished: save_policy(model, tokenizer, unfinished))


if __name__ == "__main__":
    with fail_clearly():
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
