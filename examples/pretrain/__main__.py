"""A language model learns items, stage by stage.

python -m examples.pretrain new --out base                                  # a small text model, from scratch
python -m examples.pretrain expand --model base --data WORLD --out items    # item tokens for any model
python -m examples.pretrain train --config examples/pretrain/align.yaml --model items --out align
python -m examples.pretrain train --config examples/pretrain/cotrain.yaml --model align/model --out cotrain
python -m examples.pretrain train --config examples/pretrain/sft.yaml --model cotrain/model --out sft
python -m examples.pretrain test --model sft/model --data WORLD             # fit for rl.train?
python -m examples.pretrain merge --model BASE --adapter FOLDER --out FOLDER
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples.pretrain.checks import check_model
from examples.pretrain.train import EXPANSION, StageSettings, run_stage
from examples.pretrain.vocabulary import expand_vocabulary
from examples.stages import appearing, tell_checks
from rl.progress import Progress, console, fail_clearly
from rl.quiet import quiet_libraries
from rl.task import read_model
from rl.tiny import build_model, build_tokenizer, save_policy
from rollout.data import load_world
from rollout.sid import Sid


def new(
    out: Path, hidden_size: int = 128, layers: int = 4, heads: int = 4, dropout: float = 0.0, seed: int = 0
) -> None:
    """Make a small text model with random weights, to start from where no other is at hand.

    Args:
        out: its folder.
        hidden_size: width.
        layers: layers.
        heads: attention heads.
        dropout: on attention weights while it trains.
        seed: of the weights.
    """
    _free(out)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(None)
    model = build_model(tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, dropout=dropout)
    appearing(out, lambda folder: save_policy(model, tokenizer, folder))
    console.print(f"{model.num_parameters() / 1e6:.2f}M parameters in {out}", markup=False)


def expand(
    model: Path,
    data: Path,
    out: Path,
    init: Literal["mean", "text"] = "mean",
    align: int = 256,
    noise: float = 0.02,
    seed: int = 0,
) -> None:
    """Add the item tokens of a data folder to a model.

    Args:
        model: Hugging Face folder.
        data: data folder, whose Sid format says which tokens.
        out: folder of the expanded model.
        init: new rows start as the mean of the old ones, or (text) as the mean of the words of the titles of a code's
            items.
        align: rows become a multiple of this.
        noise: standard deviation of what is added, as a share of that of the old rows.
        seed: of the noise.
    """
    _free(out)
    catalog = load_world(data).catalog
    _, tokenizer = read_model(model, "model")
    policy = AutoModelForCausalLM.from_pretrained(model)
    texts: dict[Sid, list[str]] = {}
    if init == "text":
        for codes, title in zip(catalog.codes_NL.tolist(), catalog.titles, strict=True):
            if title:
                texts.setdefault(tuple(codes), []).append(title)
        if not texts:
            raise ValueError(f"init=text, and no item of {data} has a title: take init=mean")
    added = expand_vocabulary(policy, tokenizer, catalog.format, align=align, noise=noise, texts=texts, seed=seed)

    def write(folder: Path) -> None:
        save_policy(policy, tokenizer, folder)
        (folder / EXPANSION).write_text(json.dumps(asdict(added)))

    appearing(out, write)
    console.print(f"{added.tokens:,} tokens from id {added.first:,} on, {added.rows:,} rows, in {out}", markup=False)


def train(settings: StageSettings) -> None:
    """Train one stage.

    Args:
        settings: the stage.
    """
    progress = Progress()
    with progress.shown():
        folder = run_stage(settings, progress)
    console.print(f"model in {folder}; watch the run with: tensorboard --logdir {settings.out}", markup=False)


def merge(model: Path, adapter: Path, out: Path) -> None:
    """Fold a PEFT adapter into its model.

    Args:
        model: Hugging Face folder of the base.
        adapter: folder of the adapter, such as a checkpoint.
        out: folder of the merged model.
    """
    _free(out)
    _, tokenizer = read_model(model, "model")
    base = AutoModelForCausalLM.from_pretrained(model)
    whole = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()

    def write(folder: Path) -> None:
        save_policy(whole, tokenizer, folder)
        if (model / EXPANSION).exists():
            (folder / EXPANSION).write_text((model / EXPANSION).read_text())

    appearing(out, write)
    console.print(f"merged model in {out}", markup=False)


def test(model: Path, data: Path, same_as: Path | None = None) -> None:
    """Test a model: its tokens, its numbers, what it writes under the trie; exit status 1 when something is wrong.

    Args:
        model: Hugging Face folder.
        data: data folder it is to recommend from.
        same_as: another folder of what should be the same model, such as the one it was converted from.
    """
    tell_checks(check_model(model, data, same_as))


def _free(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} is there already; name a new folder")


if __name__ == "__main__":
    quiet_libraries(None)
    with fail_clearly():
        auto_cli({"new": new, "expand": expand, "train": train, "merge": merge, "test": test}, as_positional=False)
