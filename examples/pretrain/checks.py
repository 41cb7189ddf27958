"""Is a model folder fit for post-training? One line a check."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.schema import DataConfig
from rl.scoring import require_exact
from rollout.data import load_world, prepare
from rollout.data.prompts import sid_vocab
from rollout.decode import Decoder
from rollout.hf_engine import HFEngine
from rollout.types import Sampling

ROWS = 8
"""Rows of the data that are written under the trie."""


def check_model(model: Path, data: Path, same_as: Path | None = None) -> Iterator[tuple[str, str]]:
    """Name of each check, and what is wrong ("" for nothing). A check that needs a failed one is left out.

    Raises:
        DataError: when the data cannot be read.
    """
    world = load_world(data)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        yield "loads with transformers", str(error).splitlines()[0]
        return
    yield "loads with transformers", ""
    rows = policy.get_input_embeddings().weight.shape[0]
    yield "a row for each token", "" if len(tokenizer) <= rows else f"{len(tokenizer)} tokens, {rows} rows"
    odd = [name for name, weight in policy.named_parameters() if not bool(weight.isfinite().all())]
    yield "weights are finite", f"{len(odd)} are not, such as {odd[0]}" if odd else ""
    for name, value in (("end of text", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        yield f"a token for {name}", "" if value is not None else "the tokenizer names none"
    try:
        decoder = Decoder.build(world.catalog, sid_vocab(world.catalog.format, tokenizer), rows)
    except ValueError as error:
        yield "one token for each code", str(error)
        return
    yield "one token for each code", ""
    try:
        require_exact(policy, packing=True)
    except ValueError as error:
        yield "logits are those of a known kind, groups can be packed", str(error)
        return
    yield "logits are those of a known kind, groups can be packed", ""
    records = next(iter(world.splits.values()), ())[:ROWS]
    settings = DataConfig()
    samples, problems = prepare(
        records, world.catalog, tokenizer, template=settings.prompt_template, max_history=settings.max_history,
        max_prompt_tokens=8 * settings.max_prompt_tokens,
    )  # fmt: skip
    yield f"prompts of {len(records)} rows", str(problems[0]) if problems else ""
    if samples:
        groups = HFEngine(policy, decoder).generate(samples, Sampling(4, "beam"))
        legal = all(rollout.legal for group in groups for rollout in group.rollouts)
        yield "beams under the trie are legal", "" if legal else "some are not"
    if same_as is not None:
        yield f"the same as {same_as}", _difference(policy, tokenizer, same_as)


def _difference(policy: torch.nn.Module, tokenizer: object, other: Path) -> str:
    known = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()
    if AutoTokenizer.from_pretrained(other).get_vocab() != tokenizer.get_vocab():  # type: ignore[attr-defined]
        return "its tokens are others"
    ids = torch.arange(64)[None] % known.config.get_text_config().vocab_size
    with torch.no_grad():
        gap = float((policy(input_ids=ids).logits - known(input_ids=ids).logits).abs().max())
    return "" if gap < 1e-3 else f"logits differ by {gap:.2g}"
