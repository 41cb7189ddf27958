"""The trie at scale: building, opening, allowed logits and masks, beside Hugging Face's processor.

    python -m tests.bench.trie --items 1000000 --batch 1024

`item_ms` is what the trie costs for a whole item of every row: at each level the allowed logits, ready for sampling,
and the step to the next node. `hf_prefix_item_ms` is `PrefixConstrainedLogitsProcessor` over a dict trie for the same.
`mask_ms` is the drop-in mask of the whole vocabulary at the last level, `fill_ms` a bare `fill_(-inf)` of the same
tensor. Sides alternate; medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PrefixConstrainedLogitsProcessor

from rollout.allowed import allowed_logits, mask_logits_
from rollout.trie import SidTrie


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hf-repeats", type=int, default=1, help="0 leaves Hugging Face out (its dict takes memory)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, options.codes, (options.items, options.levels), dtype=np.int32)
    paths = np.unique(codes, axis=0) + options.codes * np.arange(options.levels, dtype=np.int32)
    vocab = options.codes * options.levels
    del codes

    built = _median(lambda: SidTrie.from_paths(paths, vocab), 3)
    trie = SidTrie.from_paths(paths, vocab)
    with tempfile.TemporaryDirectory() as folder:
        trie.save(folder)
        opened = _median(lambda: SidTrie.load(folder), 3)
    chosen = paths[rng.integers(0, len(paths), options.batch)]
    nodes = trie.walk(chosen)
    logits = torch.randn(options.batch, vocab)
    rows, plain = np.arange(options.batch), logits.numpy()

    def step(level: int) -> None:
        allowed_logits(trie, plain, nodes[:, level])
        trie.find(nodes[:, level], chosen[:, level])

    scratch = torch.empty_like(logits)
    sides: dict[str, Callable[[], Any]] = {f"step{level}": partial(step, level) for level in range(trie.depth)}
    sides["mask"] = partial(mask_logits_, trie, scratch, rows, nodes[:, trie.depth - 1])
    sides["fill"] = partial(scratch.fill_, float("-inf"))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.repeats + 1):
        for side, run in sides.items():
            seconds[side].append(_seconds(run))
    took = {side: 1e3 * statistics.median(times[1:]) for side, times in seconds.items()}  # the first compiles
    steps = [took[f"step{level}"] for level in range(trie.depth)]
    result = {
        "items": len(paths),
        "build_s": round(built, 4),
        "open_s": round(opened, 4),
        "bytes_per_item": round(trie.nbytes / len(paths), 3),
        "step_ms": [round(one, 3) for one in steps],
        "item_ms": round(sum(steps), 3),
        "mask_ms": round(took["mask"], 2),
        "fill_ms": round(took["fill"], 2),
        "mask_vs_fill": round(took["mask"] / took["fill"], 3),
    }
    if options.hf_repeats:
        theirs = 1e3 * _hugging_face(paths, chosen, logits, options.hf_repeats)
        result |= {"hf_prefix_item_ms": round(theirs, 1), "ratio_vs_hf": round(theirs / sum(steps), 1)}
    print(json.dumps(result))


def _hugging_face(paths: np.ndarray, chosen: np.ndarray, logits: torch.Tensor, repeats: int) -> float:
    """Seconds of Hugging Face's processor for all levels of every row."""
    children: dict[tuple[int, ...], dict[int, None]] = {}
    for path in paths.tolist():
        for level, token in enumerate(path):
            children.setdefault(tuple(path[:level]), {})[token] = None
    lists = {prefix: list(tokens) for prefix, tokens in children.items()}
    processor = PrefixConstrainedLogitsProcessor(lambda _, ids: lists[tuple(ids[1:].tolist())], num_beams=1)
    ids = torch.cat([torch.zeros((len(chosen), 1), dtype=torch.long), torch.from_numpy(chosen).long()], dim=1)

    def item() -> None:
        for level in range(chosen.shape[1]):
            processor(ids[:, : level + 1], logits)

    return _median(item, repeats)


def _median(run: Callable[[], Any], repeats: int) -> float:
    run()
    return statistics.median(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
