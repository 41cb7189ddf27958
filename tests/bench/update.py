"""One policy update, ours against TRL's own GRPOTrainer, on the same batch and model, in one process, alternating.

    python -m tests.bench.update --prompt 256 --group 16 --groups 4 --vocab 32768
    python -m tests.bench.update --sweep --groups 1 --picture docs/update_sweep.png

Both sides run the real loss path (`compute_loss`) and `backward`. Ours scores under the trie and packs each group into
one row; the gradients are compared with ours on the whole vocabulary (`rl.support: full`), which is TRL's distribution.
The last line is JSON: medians of seconds, their ratio, the gradients' relative difference, peak memory. `--sweep` goes
through prompts and group sizes, prints a table and draws seconds against tokens: P + G·C of ours, G·(P + C) of theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from configs.schema import RolloutConfig, RunConfig
from configs.update import LoraConfig, RLConfig
from rewards.runner import RewardSet
from rl.algorithms import build_algorithm
from rl.progress import Progress
from rl.recorder import Recorder
from rl.scoring import support_places
from rl.task import Task
from rl.tiny import build_tokenizer
from rl.trl_trainer import SidTrainer
from rollout.catalog import Catalog
from rollout.data.prompts import sid_vocab
from rollout.decode import Decoder
from rollout.sid import letters_format
from rollout.support import WHOLE_VOCABULARY, TorchTrie
from rollout.types import Record, Sample
from tests.bench.memory import Peak, return_memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--group", type=int, default=16, help="rollouts of a group, G")
    parser.add_argument("--groups", type=int, default=4, help="groups of the batch")
    parser.add_argument("--vocab", type=int, default=32768, help="size of the vocabulary")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="measure many prompts and group sizes")
    parser.add_argument("--picture", type=Path, default=Path("runs/update_sweep.png"), help="where the sweep is drawn")
    options = parser.parse_args()
    print(json.dumps(sweep(options) if options.sweep else measure(options)))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds, gradients and memory of both sides at one size."""
    bench = Bench(options)
    difference = bench.gradient_difference()
    took = bench.medians(options.repeats)
    peaks = bench.peaks()
    return {
        "ours_s": round(took["ours"], 4),
        "trl_s": round(took["trl"], 4),
        "ratio": round(took["trl"] / took["ours"], 2),
        "grad_rel_diff": difference,
        "ours_peak_mb": round(peaks["ours"], 1),
        "trl_peak_mb": round(peaks["trl"], 1),
    }


def sweep(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Seconds of both sides over prompts and group sizes."""
    rows = []
    print("| P | G | ours tokens | TRL tokens | ours s | TRL s | ratio |\n|" + " ---: |" * 7)
    for prompt in (64, 128, 256, 512):
        for group in (8, 16, 32):
            took = Bench(argparse.Namespace(**{**vars(options), "prompt": prompt, "group": group})).medians(
                options.repeats
            )
            tokens = options.groups * (prompt + group * COMPLETION), options.groups * group * (prompt + COMPLETION)
            rows.append({"prompt": prompt, "group": group, "ours_tokens": tokens[0], "trl_tokens": tokens[1], **took})
            print(
                f"| {prompt} | {group} | {tokens[0]:,} | {tokens[1]:,} | {took['ours']:.3f} | {took['trl']:.3f} "
                f"| {took['trl'] / took['ours']:.1f} |",
                flush=True,
            )
    _draw(rows, options.picture)
    return {"sweep": [{key: round(value, 4) for key, value in row.items()} for row in rows]}


def _draw(rows: list[dict[str, float]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, side, formula in zip(
        figure.subplots(1, 2), ("ours", "trl"), ("P + G·C tokens a group", "G·(P + C) tokens a group"), strict=True
    ):
        tokens, seconds = (np.array([row[key] for row in rows]) for key in (f"{side}_tokens", side))
        slope, start = np.polyfit(tokens, seconds, 1)
        line = np.array([0, tokens.max()])
        axes.plot(line, start + slope * line, color="0.7", zorder=0)
        axes.scatter(tokens, seconds, color="tab:blue" if side == "ours" else "tab:orange")
        explained = 1 - ((seconds - start - slope * tokens) ** 2).sum() / ((seconds - seconds.mean()) ** 2).sum()
        axes.set(xlabel=formula, ylabel="seconds of an update", ylim=0, xlim=0)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(f"{'this project' if side == 'ours' else 'TRL'}: linear in tokens, R² {explained:.3f}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    print(f"drew {picture}")


COMPLETION = 3
"""Tokens of an item in this bench."""


class Bench:
    """One model, one batch, two trainers."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        size = 256
        tokenizer = build_tokenizer(letters_format((size, size, size)))
        catalog = Catalog.build(
            letters_format((size, size, size)),
            [str(item) for item in range(10_000)],
            rng.integers(0, size, (10_000, 3)),
        )
        decoder = Decoder.build(catalog, sid_vocab(catalog.format, tokenizer), options.vocab)
        samples = [
            Sample(
                Record(f"bench:{group}", "", (), (0,), (1.0,)),
                tuple(rng.integers(10, len(tokenizer), options.prompt).tolist()),
            )
            for group in range(options.groups)
        ]
        self.model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=options.vocab,
                hidden_size=options.hidden,
                intermediate_size=3 * options.hidden,
                num_hidden_layers=options.layers,
                num_attention_heads=options.hidden // 64,
                num_key_value_heads=options.hidden // 64,
                head_dim=64,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).to("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = tempfile.TemporaryDirectory()
        self.trainers: dict[str, GRPOTrainer] = {
            "ours": self._ours(options, catalog, decoder, samples, tokenizer),
            "trl": self._trl(options, tokenizer),
        }
        self.trie = TorchTrie(decoder.trie)
        paths = decoder.trie.paths()[rng.integers(0, decoder.trie.num_leaves, (options.groups, options.group))]
        self.batch = self._batch(samples, paths)

    def seconds(self, side: str) -> float:
        """Seconds of one forward and backward."""
        self.model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        self._loss(side).backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def medians(self, repeats: int) -> dict[str, float]:
        """Median seconds of each side, alternating; the first round warms up."""
        rounds = [{side: self.seconds(side) for side in self.trainers} for _ in range(repeats + 1)]
        return {side: statistics.median(one[side] for one in rounds[1:]) for side in self.trainers}

    def peaks(self) -> dict[str, float]:
        """Memory in MB that an update takes beyond what was there, by side; measured apart from the seconds."""
        megabytes = {}
        for side in self.trainers:
            self.model.zero_grad(set_to_none=True)
            return_memory()
            with Peak() as peak:
                self._loss(side).backward()
            megabytes[side] = peak.megabytes
        return megabytes

    def gradient_difference(self) -> float:
        """Relative difference of the gradients on the whole vocabulary."""
        trie = self.batch["places"]
        self.batch["places"] = torch.full_like(trie, WHOLE_VOCABULARY)
        gradients = []
        for side in ("ours", "trl"):
            self.model.zero_grad(set_to_none=True)
            self._loss(side).backward()
            gradients.append(
                torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None])
            )
        self.batch["places"] = trie
        return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())

    def _loss(self, side: str) -> torch.Tensor:
        trainer = self.trainers[side]
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer.compute_loss(self.model, dict(self.batch))

    def _ours(
        self,
        options: argparse.Namespace,
        catalog: Catalog,
        decoder: Decoder,
        samples: list[Sample],
        tokenizer: PreTrainedTokenizerFast,
    ) -> SidTrainer:
        config = RunConfig(
            rl=RLConfig(steps=1, prompts_per_step=options.groups, micro_batch_groups=options.groups),
            rollout=RolloutConfig(group_size=options.group),
            lora=LoraConfig(enabled=False),
        )
        folder = Path(self.folder.name)
        rewards = RewardSet(config.rewards, catalog)
        task = Task(folder, tokenizer, decoder, {"train": samples}, rewards, 0, decoder.trie.depth)
        recorder = Recorder(folder, task, Progress(), rollouts_every=0)
        fleet: Any = None  # nothing is drawn here
        return SidTrainer(self.model, task, fleet, build_algorithm(config), config, recorder, folder / "ours")

    def _trl(self, options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> GRPOTrainer:
        arguments = GRPOConfig(
            output_dir=str(Path(self.folder.name) / "trl"),
            per_device_train_batch_size=options.groups * options.group,
            num_generations=options.group,
            max_steps=1,
            loss_type="grpo",
            bf16=self.model.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            report_to="none",
        )
        rows = Dataset.from_dict({"prompt": ["x"] * options.groups})
        return GRPOTrainer(
            model=self.model,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
        )

    def _batch(self, samples: list[Sample], paths_PGT: np.ndarray) -> dict[str, torch.Tensor]:
        device = self.model.device
        group = paths_PGT.shape[1]
        prompts = torch.tensor([sample.prompt_ids for sample in samples]).repeat_interleave(group, dim=0)
        completions = torch.from_numpy(paths_PGT).flatten(0, 1)
        sampler_logps = torch.full(completions.shape, -5.0).to(device)
        return {
            "prompt_ids": prompts.to(device),
            "prompt_mask": torch.ones_like(prompts).to(device),
            "completion_ids": completions.to(device),
            "completion_mask": torch.ones_like(completions).to(device),
            "advantages": torch.randn(len(prompts)).to(device),
            "old_per_token_logps": sampler_logps,
            "sampler_logps": sampler_logps,
            "views": None,
            "places": support_places(self.trie, completions, torch.ones_like(completions).bool()),
            "num_items_in_batch": torch.tensor(completions.numel()).to(device),
        }


if __name__ == "__main__":
    main()
