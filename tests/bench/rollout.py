"""Rollouts of 64 prompts × G: what the trie costs in vLLM, and what vLLM gains over Hugging Face's generate.

    python -m tests.bench.rollout --prompts 64 --group 16 --items 100000

In one process, alternating: the vLLM engine with the trie and without it (same length), and `generate` with
`PrefixConstrainedLogitsProcessor` over a dict trie. The last line is JSON: items/s of each, `cost` (constrained over
unconstrained seconds) and `hf_ratio` (Hugging Face's over constrained vLLM's).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rollout.hf_engine import load_policy
from rollout.types import Sampling
from rollout.vllm_engine import VLLMEngine
from tests.bench.world import add_options, make_world


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser, prompts=64, prompt=64, levels=3)
    parser.add_argument("--group", type=int, default=16, help="rollouts of a prompt, G")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(options, Path(folder))
        engine = VLLMEngine(folder, world.decoder, dtype="float32", max_prompt_tokens=options.prompt + 8)
        model = load_policy(folder, dtype="float32")
        children, depth = world.dict_trie(), world.decoder.trie.depth
        prompts = torch.tensor([sample.prompt_ids for sample in world.samples], device=model.device)

        def vllm(constrained: bool) -> None:
            engine.generate(world.samples, Sampling(options.group, constrained=constrained))

        @torch.no_grad()
        def hf() -> None:
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                num_return_sequences=options.group,
                max_new_tokens=depth,
                min_new_tokens=depth,
                top_k=0,
                prefix_allowed_tokens_fn=lambda _, ids: children[tuple(ids[options.prompt :].tolist())],
            )

        sides: dict[str, Callable[[], None]] = {
            "constrained": lambda: vllm(True),
            "unconstrained": lambda: vllm(False),
            "hf": hf,
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(options.repeats + 1):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[side].append(time.perf_counter() - start)
    took = {side: statistics.median(times[1:]) for side, times in seconds.items()}  # the first of each warms up
    items = options.prompts * options.group
    print(
        json.dumps(
            {
                "cost": round(took["constrained"] / took["unconstrained"], 3),
                "hf_ratio": round(took["hf"] / took["constrained"], 2),
                **{f"{side}_s": round(value, 4) for side, value in took.items()},
                **{f"{side}_items_per_s": round(items / value) for side, value in took.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
