"""One distillation update, ours against TRL's DistillationTrainer, on the same texts and models, alternating.

    python -m tests.bench.distill --prompts 8 --prompt 128 --texts 1 --length 64 --vocab 32768

Student and teacher have one vocabulary, since TRL takes no others; the loss is the reverse KL of every token (TRL's
`beta` = 1). Both sides run their real loss path and `backward`; the gradients are compared. `--texts` are written after
each prompt: with several, ours computes the prompt once. The last line is JSON: medians of seconds, their ratio, the
gradients' relative difference, and the memory in MB that an update takes beyond models and gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer

from distill.losses import Divergence
from distill.scoring import Teacher, text_loss
from distill.vocabulary import SharedVocabulary
from rl.tiny import build_tokenizer
from rollout.sid import letters_format
from tests.bench.memory import Peak, return_memory


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--texts", type=int, default=1, help="texts after each prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=6, help="layers of the student; the teacher has twice as many")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        difference = bench.gradient_difference()
        took, peaks = bench.medians(options.repeats), bench.peaks()
    result = {f"{side}_s": round(seconds, 4) for side, seconds in took.items()}
    print(
        json.dumps(
            result
            | {
                "ratio": round(took["trl"] / took["ours"], 2),
                "grad_rel_diff": difference,
                "peak_mb": {side: round(peak, 1) for side, peak in peaks.items()},
            }
        )
    )


class Bench:
    """One student, one teacher, one batch of texts."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        torch.manual_seed(0)
        self.options, self.device = options, "cuda" if torch.cuda.is_available() else "cpu"
        self.student, self.teacher = (self._model(layers * options.layers) for layers in (1, 2))
        prompts = torch.randint(10, options.vocab, (options.prompts, options.prompt)).repeat_interleave(
            options.texts, 0
        )
        texts = torch.randint(10, options.vocab, (len(prompts), options.length))
        self.batch = {
            "prompt_ids": prompts.to(self.device),
            "prompt_mask": torch.ones_like(prompts).to(self.device),
            "completion_ids": texts.to(self.device),
            "completion_mask": torch.ones_like(texts).to(self.device),
            "num_items_in_batch": torch.tensor(float(texts.numel())).to(self.device),
        }
        self.known = Teacher.of(self.teacher)
        self.shared = SharedVocabulary(torch.arange(options.vocab).numpy(), options.vocab)
        arguments = DistillationConfig(
            output_dir=folder, beta=1.0, report_to="none", bf16=self.device == "cuda", gradient_checkpointing=False,
            per_device_train_batch_size=len(prompts), max_steps=1,
        )  # fmt: skip
        self.trl = DistillationTrainer(
            self.student, self.teacher, args=arguments, train_dataset=Dataset.from_dict({"prompt": ["x"]}),
            processing_class=build_tokenizer(letters_format((4, 4, 4))),
        )  # fmt: skip

    def medians(self, repeats: int) -> dict[str, float]:
        """Median seconds of each side, alternating; the first round warms up."""
        rounds = [{side: self._seconds(side) for side in ("ours", "trl")} for _ in range(repeats + 1)]
        return {side: statistics.median(one[side] for one in rounds[1:]) for side in ("ours", "trl")}

    def peaks(self) -> dict[str, float]:
        """Memory in MB of each side's update; gradients stand there before and after it."""
        megabytes = {}
        for side in ("ours", "trl"):
            self.student.zero_grad(set_to_none=False)
            return_memory()
            with Peak() as peak:
                self._loss(side).backward()
            megabytes[side] = peak.megabytes
        return megabytes

    def gradient_difference(self) -> float:
        """Relative difference of the gradients."""
        gradients = []
        for side in ("ours", "trl"):
            self.student.zero_grad(set_to_none=True)
            self._loss(side).backward()
            gradients.append(
                torch.cat([p.grad.flatten().double() for p in self.student.parameters() if p.grad is not None])
            )
        return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())

    def _seconds(self, side: str) -> float:
        self.student.zero_grad(set_to_none=False)
        start = time.perf_counter()
        self._loss(side).backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _loss(self, side: str) -> torch.Tensor:
        self.student.train()
        if side == "trl":
            loss: torch.Tensor = self.trl.compute_loss(self.student, dict(self.batch))
            return loss
        ids, mask = (
            torch.cat([self.batch[f"prompt_{name}"], self.batch[f"completion_{name}"]], dim=1)
            for name in ("ids", "mask")
        )
        return text_loss(
            self.student, self.known, ids, mask, self.options.length, divergence=Divergence(), shared=self.shared,
            group=self.options.texts,
        ).loss  # fmt: skip

    def _model(self, layers: int) -> Qwen3ForCausalLM:
        options = self.options
        config = Qwen3Config(
            vocab_size=options.vocab, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
            num_hidden_layers=layers, num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64, head_dim=64, tie_word_embeddings=True,
        )  # fmt: skip
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return Qwen3ForCausalLM(config).to(self.device, dtype)


if __name__ == "__main__":
    main()
