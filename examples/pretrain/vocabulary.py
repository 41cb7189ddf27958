"""Item tokens for any Hugging Face model: one token a code, new rows in its embeddings, old logits unchanged.

Axes: V vocabulary, D hidden size, N items, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rollout.sid import Sid, SidFormat


@dataclass(frozen=True)
class Expanded:
    """What was added.

    Attributes:
        first: id of the first new token.
        tokens: how many were added.
        rows: rows of the embedding matrix now.
    """

    first: int
    tokens: int
    rows: int

    @property
    def ids(self) -> range:
        """Ids of the new tokens."""
        return range(self.first, self.first + self.tokens)


def expand_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: SidFormat,
    *,
    align: int = 256,
    noise: float = 0.02,
    texts: Mapping[Sid, Sequence[str]] | None = None,
    seed: int = 0,
) -> Expanded:
    """Add the tokens of a Sid format to a tokenizer and a model, in place.

    A new row is the mean of the old tokens' rows plus noise; with `texts`, a code's row is the mean of the rows of the
    words in the texts of its items (plus noise), so that a code starts near what its items are about. Rows of old
    tokens stay as they are to the bit, so what the model says of text is unchanged.

    Args:
        model: any causal language model; tied and untied output matrices are both filled.
        tokenizer: its tokenizer.
        fmt: how Sids are written.
        align: rows become a multiple of this.
        noise: standard deviation of the noise, as a share of that of the old rows.
        texts: titles of the items of each Sid.
        seed: of the noise.

    Raises:
        ValueError: when the tokenizer has some of the tokens already, or would not keep them whole.
    """
    known = tokenizer.get_vocab()
    twice = [token for token in fmt.tokens() if token in known]
    if twice:
        raise ValueError(f"the tokenizer has {len(twice)} of the tokens already, such as {twice[0]!r}: expand it once")
    first = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in fmt.tokens()])
    added = len(tokenizer) - first
    sample = fmt.format(tuple(size - 1 for size in fmt.sizes))
    written = tokenizer(sample, add_special_tokens=False)["input_ids"]
    if added != len(fmt.tokens()) or min(written) < first:
        raise ValueError(f"the tokenizer writes {sample!r} as {tokenizer.convert_ids_to_tokens(written)}: not as codes")
    old = model.get_input_embeddings().weight.shape[0]
    rows = max(-(-len(tokenizer) // align) * align, old)
    model.resize_token_embeddings(rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    heads = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        heads.append(model.get_output_embeddings())
    with torch.no_grad():
        for layer in heads:
            weight_VD = layer.weight
            text_VD = weight_VD[:first].float()
            mean_D, spread = text_VD.mean(dim=0), float(text_VD.std())
            fresh = noise * spread * torch.randn((rows - first, weight_VD.shape[1]), generator=generator)
            new_VD = mean_D + fresh.to(weight_VD.device)
            for token, meaning_D in _meanings(text_VD, tokenizer, fmt, texts or {}).items():
                new_VD[token - first] += meaning_D - mean_D
            weight_VD[first:] = new_VD.to(weight_VD.dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias[first:] = layer.bias[:first].mean()
    return Expanded(first, added, rows)


def _meanings(
    text_VD: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    fmt: SidFormat,
    texts: Mapping[Sid, Sequence[str]],
) -> dict[int, torch.Tensor]:
    """For each code's token, the mean row of all words in the titles of its items."""
    sums: dict[int, tuple[torch.Tensor, int]] = {}
    for sid, titles in texts.items():
        words = tokenizer(" ".join(titles), add_special_tokens=False)["input_ids"]
        words = [word for word in words if word < len(text_VD)]
        if not words:
            continue
        total_D = text_VD[words].sum(dim=0)
        for level, code in enumerate(sid):
            token = int(tokenizer.convert_tokens_to_ids(fmt.token(level, code)))
            before, count = sums.get(token, (torch.zeros_like(total_D), 0))
            sums[token] = (before + total_D, count + len(words))
    return {token: total_D / count for token, (total_D, count) in sums.items()}
