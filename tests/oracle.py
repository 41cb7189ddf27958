"""Items scored the slow and obvious way, to compare fast code with: full logits, a Python set of legal tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

Path_ = tuple[int, ...]


def legal_next(paths: Iterable[Sequence[int]], prefix: Sequence[int]) -> list[int]:
    """Tokens that may follow a prefix, ascending; empty when no path begins with it."""
    cut = len(prefix)
    return sorted({int(path[cut]) for path in paths if tuple(path[:cut]) == tuple(prefix)})


@torch.no_grad()
def token_logps(
    model: PreTrainedModel,
    prompt: Sequence[int],
    tokens_NL: np.ndarray,
    paths: Iterable[Sequence[int]] | None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Log-probability [N, L] of each token of completions of one prompt, without padding, cache or trie.

    `paths` are the legal ones; None takes the softmax over the whole vocabulary.
    """
    tokens = torch.as_tensor(np.asarray(tokens_NL), dtype=torch.long)
    count, depth = tokens.shape
    ids = torch.cat([torch.tensor(list(prompt)).expand(count, -1), tokens], dim=1)
    was_training = model.training
    model.eval()
    logits = model(input_ids=ids.to(model.device)).logits[:, len(prompt) - 1 : -1].float().cpu() / temperature
    model.train(was_training)
    if paths is not None:
        everything = {tuple(int(token) for token in path) for path in paths}
        allowed: dict[Path_, list[int]] = {}
        for row, completion in enumerate(tokens.tolist()):
            for step in range(depth):
                prefix = tuple(completion[:step])
                if prefix not in allowed:
                    allowed[prefix] = legal_next(everything, prefix)
                mask = torch.full((logits.shape[-1],), float("-inf"))
                mask[allowed[prefix]] = 0.0
                logits[row, step] += mask
    logps = logits.log_softmax(dim=-1).gather(2, tokens[:, :, None])[:, :, 0]
    return logps.double().numpy()


def greedy_path(model: PreTrainedModel, prompt: Sequence[int], paths: Iterable[Sequence[int]]) -> Path_:
    """The likeliest legal token at each step."""
    everything = [tuple(int(token) for token in path) for path in paths]
    written: Path_ = ()
    for _ in range(len(everything[0])):
        options = legal_next(everything, written)
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *written]], device=model.device)
            logits = model(input_ids=ids).logits[0, -1].cpu()
        written = (*written, options[int(logits[options].argmax())])
    return written


def beams(logps_SL: np.ndarray, paths: Sequence[Sequence[int]], width: int) -> list[int]:
    """Items that a beam of this width finds, best first: at each level only the `width` best prefixes live on.

    `logps_SL` are the log-probabilities of the tokens of `paths`, all distinct.
    """
    live: set[Path_] = {()}
    for level in range(1, logps_SL.shape[1] + 1):
        score = {
            tuple(path[:level]): float(logps[:level].sum())
            for path, logps in zip(paths, logps_SL, strict=True)
            if tuple(path[: level - 1]) in live
        }
        live = set(sorted(score, key=lambda prefix: -score[prefix])[:width])
    found = [index for index, path in enumerate(paths) if tuple(path) in live]
    return sorted(found, key=lambda index: -float(logps_SL[index].sum()))
