"""Beams under the trie: this project's two ways against Hugging Face's and vLLM's own, in one process, alternating.

    python -m tests.bench.beam --prompts 16 --width 32

- `ours`: the default way of evaluation, `rollout.search.beam` (prompts prefilled once, widened after).
- `engine`: beams of the vLLM engine.
- `hf`: `generate(num_beams=W)` with `PrefixConstrainedLogitsProcessor` over a dict trie.
- `vllm`: vLLM's `beam_search` with the trie as its logits processor.

The last line is JSON: `hf_ratio` and `vllm_ratio` are theirs over ours, `vllm_engine_ratio` is vLLM's over our
engine's; `same` says whether all four list the same beams (ties aside: scores are compared).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import BeamSearchParams

from rollout.hf_engine import load_policy
from rollout.search import beam
from rollout.support import TorchTrie
from rollout.types import Sampling
from rollout.vllm_engine import VLLMEngine
from rollout.vllm_trie import OPT_IN
from tests.bench.world import add_options, make_world

Beams = list[list[tuple[float, tuple[int, ...]]]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, prompts=16, prompt=64, levels=4)
    parser.add_argument("--width", type=int, default=32, help="beams of a prompt")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        sides: dict[str, Callable[[], Beams]] = {
            "ours": bench.ours,
            "engine": bench.engine,
            "hf": bench.hf,
            "vllm": bench.vllm,
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        beams: dict[str, Beams] = {}
        for _ in range(options.repeats + 1):
            for side, run in sides.items():
                start = time.perf_counter()
                beams[side] = run()
                seconds[side].append(time.perf_counter() - start)
    took = {side: statistics.median(times[1:]) for side, times in seconds.items()}  # the first of each warms up
    print(
        json.dumps(
            {
                "hf_ratio": round(took["hf"] / took["ours"], 2),
                "vllm_ratio": round(took["vllm"] / took["ours"], 2),
                "vllm_engine_ratio": round(took["vllm"] / took["engine"], 2),
                "same": all(_same(beams["ours"], other) for other in beams.values()),
                **{f"{side}_s": round(value, 4) for side, value in took.items()},
            }
        )
    )


class Bench:
    """One policy and one catalogue behind four ways to search."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        world = make_world(options, folder)
        self.width, self.samples, self.decoder = options.width, world.samples, world.decoder
        self.model = load_policy(folder, dtype="float32")
        self.trie = TorchTrie(self.decoder.trie, self.model.device)
        self.children = world.dict_trie()
        self.llm = VLLMEngine(str(folder), self.decoder, dtype="float32", max_prompt_tokens=options.prompt + 8)

    def ours(self) -> Beams:
        """Tree-mask beams on the Hugging Face model."""
        prompts = [sample.prompt_ids for sample in self.samples]
        leaves_BW, logps_BWL = beam(self.model, self.trie, prompts, self.width)
        return [
            [
                (float(logp.sum()), tuple(path))
                for logp, path in zip(logps, self.decoder.trie.paths(leaves), strict=True)
            ]
            for leaves, logps in zip(leaves_BW, logps_BWL, strict=True)
        ]

    def engine(self) -> Beams:
        """The vLLM engine's beams."""
        groups = self.llm.generate(self.samples, Sampling(self.width, "beam"))
        return [[(rollout.logp, rollout.token_ids) for rollout in group.rollouts] for group in groups]

    @torch.no_grad()
    def hf(self) -> Beams:
        """Hugging Face's beam search with a dict trie."""
        prompts = torch.tensor([sample.prompt_ids for sample in self.samples], device=self.model.device)
        length = prompts.shape[1]
        depth = self.decoder.trie.depth
        output = self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_beams=self.width,
            num_return_sequences=self.width,
            max_new_tokens=depth,
            do_sample=False,
            eos_token_id=None,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=lambda _, ids: self.children[tuple(ids[length:].tolist())],
            renormalize_logits=True,
        )
        scores = output.sequences_scores.view(len(prompts), -1).tolist()
        paths = output.sequences[:, length:].view(len(prompts), self.width, depth).tolist()
        return [list(zip(one, map(tuple, rows), strict=True)) for one, rows in zip(scores, paths, strict=True)]

    def vllm(self) -> Beams:
        """vLLM's own beam search; each of its steps tells the trie how many item tokens its beams end with."""
        llm, length = self.llm.llm, len(self.samples[0].prompt_ids)
        step = type(llm)._beam_search_step

        def constrained_step(**arguments: Any) -> bool:
            beams = arguments["instances_batch"][0].beams
            arguments["base_sampling_params"].extra_args = {OPT_IN: len(beams[0].tokens) - length}
            return step(llm, **arguments)

        llm._beam_search_step = constrained_step
        prompts = [{"prompt_token_ids": list(sample.prompt_ids)} for sample in self.samples]
        settings = BeamSearchParams(beam_width=self.width, max_tokens=self.decoder.trie.depth, ignore_eos=True)
        outputs = llm.beam_search(prompts, settings)
        return [[(beam.cum_logprob, tuple(beam.tokens[length:])) for beam in output.sequences] for output in outputs]


def _same(one: Beams, other: Beams) -> bool:
    """Whether the beams of every prompt have the same scores."""
    pairs = zip(one, other, strict=True)
    return all(np.allclose([s for s, _ in a], [s for s, _ in b], atol=1e-3) for a, b in pairs)


if __name__ == "__main__":
    main()
