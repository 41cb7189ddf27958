"""What the benchmarks of rollouts work on: a catalogue, a random policy on disk, prompts, and a dict trie."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rl.tiny import build_tokenizer, save_policy
from rollout.catalog import Catalog
from rollout.data.prompts import sid_vocab
from rollout.decode import Decoder
from rollout.sid import letters_format
from rollout.types import Record, Sample


@dataclass(frozen=True)
class BenchWorld:
    """A catalogue of random items, a random policy in a folder, and prompts of one length."""

    folder: Path
    decoder: Decoder
    samples: list[Sample]

    def dict_trie(self) -> dict[tuple[int, ...], list[int]]:
        """Children by prefix, as the usual `prefix_allowed_tokens_fn` looks them up."""
        children: dict[tuple[int, ...], dict[int, None]] = {}
        for path in self.decoder.paths.tolist():
            for level, token in enumerate(path):
                children.setdefault(tuple(path[:level]), {})[token] = None
        return {prefix: list(tokens) for prefix, tokens in children.items()}


def add_options(parser: argparse.ArgumentParser, *, prompts: int, prompt: int, levels: int) -> None:
    """The options of a world."""
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--prompt", type=int, default=prompt, help="tokens of a prompt")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--levels", type=int, default=levels)
    parser.add_argument("--codes", type=int, default=256, help="codes of a level")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)


def make_world(options: argparse.Namespace, folder: Path) -> BenchWorld:
    """Build what the options say, always the same."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    fmt = letters_format((options.codes,) * options.levels)
    tokenizer = build_tokenizer(fmt)
    codes = rng.integers(0, options.codes, (options.items, options.levels))
    catalog = Catalog.build(fmt, [str(item) for item in range(options.items)], codes)
    size = -(-len(tokenizer) // 8) * 8
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=size,
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
            head_dim=64,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():  # far from uniform, so that few beams tie
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    save_policy(model, tokenizer, folder)
    decoder = Decoder.build(catalog, sid_vocab(fmt, tokenizer), size)
    prompts = rng.integers(300, len(tokenizer), (options.prompts, options.prompt)).tolist()
    samples = [
        Sample(Record(f"bench:{row}", "", (), (0,), (1.0,)), tuple(prompt)) for row, prompt in enumerate(prompts)
    ]
    return BenchWorld(folder, decoder, samples)
