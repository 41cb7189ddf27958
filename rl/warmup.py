"""`python -m rl.warmup`: a small policy from scratch, by next-item SFT on the users that RL will not see."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from configs.load import parse_run
from configs.schema import RunConfig
from rl.progress import Progress, console, fail_clearly
from rl.quiet import quiet_libraries
from rl.task import load_data, rl_and_warmup_rows, tokenise
from rl.tiny import build_model, build_tokenizer, save_policy
from rollout.data.prompts import sid_vocab
from rollout.data.world import World
from rollout.decode import Decoder


def warm_up(config: RunConfig, world: World, folder: Path, progress: Progress) -> None:
    """Train a small Qwen3 on next items and write it to `folder` in Hugging Face format.

    Training stops when the loss on valid has not fallen for `warmup.patience` evaluations; the best model is kept.
    """
    from rl.trl_sft import sft

    settings = config.warmup
    tokenizer = build_tokenizer(world.catalog.format)
    torch.manual_seed(config.seed)
    model = build_model(
        tokenizer,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        heads=settings.heads,
        dropout=settings.dropout,
        max_positions=max(1024, config.data.max_prompt_tokens + 64),
    )
    decoder = Decoder.build(world.catalog, sid_vocab(world.catalog.format, tokenizer), model.config.vocab_size)
    _, records = rl_and_warmup_rows(config, world)
    train, _ = tokenise(config, world, tokenizer, records)
    valid, _ = tokenise(config, world, tokenizer, list(world.splits["valid"]))
    progress.say(f"warming up a policy of {model.num_parameters() / 1e6:.2f}M parameters on {len(train)} rows")
    with tempfile.TemporaryDirectory(prefix="sidrl-warmup-") as scratch:
        model = sft(
            model,
            tokenizer,
            train,
            valid,
            decoder,
            settings,
            Path(scratch),
            seed=config.seed,
            report=lambda step, steps, logs: progress.update("warm-up", step, steps, logs),
        )
    model.config.attention_dropout = 0.0  # a policy is sampled and scored without dropout
    save_policy(model, tokenizer, folder)


def main(argv: list[str] | None = None) -> None:
    """Warm up a policy and write it to `--output_dir`."""
    config = parse_run(argv, prog="python -m rl.warmup")
    if config.output_dir is None:
        raise ValueError("output_dir must name the folder of the policy: --output_dir runs/warm")
    target = Path(config.output_dir)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"output_dir={target} is not empty; name a new folder")
    quiet_libraries(None)
    progress = Progress()
    with progress.shown():
        world, _ = load_data(config, progress.say)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            warm_up(config, world, scratch, progress)
            scratch.chmod(0o755)
            if target.exists():
                target.rmdir()
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    console.print(f"policy written to {target}; train it with: python -m rl.train --model.path {target}")


if __name__ == "__main__":
    with fail_clearly():
        main(sys.argv[1:])
