"""Log-probabilities of completion tokens under a policy, on the support that they were drawn from.

The trunk runs once over packed groups (or a row per completion). The output matrix is multiplied only where a token is
predicted, and at a SID position only by the rows of that level's tokens: a few thousand of the vocabulary's hundred
thousand. Free text takes the whole vocabulary, a chunk of positions at a time, recomputed in the backward pass.

Axes: B rows, P prompt positions (left padded), T completion tokens, D hidden size, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rl.packing import pack_groups
from rollout.output_layer import OutputLayer, probe_ids, require_known_logits, trunk_of
from rollout.support import WHOLE_VOCABULARY, TorchTrie

FORCED = -2
"""In place of a place of the trie: the token was set, not drawn. It has no log-probability."""

CHUNK = 2**24
"""Most logits that are computed at once; 64 MB in float32."""


@dataclass(frozen=True)
class TokenScores:
    """What a policy says of each completion token; zeros where a row has no token or a forced one.

    Attributes:
        logps_BT: log-probability of the token on its support, float32.
        entropies_BT: entropy of that support, float32.
        hidden_BTD: the trunk's last hidden state at the position that predicts the token (what a value head reads).
    """

    logps_BT: torch.Tensor
    entropies_BT: torch.Tensor
    hidden_BTD: torch.Tensor


def support_places(
    trie: TorchTrie, tokens_BT: torch.Tensor, on_trie_BT: torch.Tensor, roots_BK: torch.Tensor | None = None
) -> torch.Tensor:
    """The place of the trie each token was drawn at, `WHOLE_VOCABULARY` for tokens of free text.

    An item starts at the root: at the first token on the trie after other text, and after each whole item.

    Args:
        trie: the catalogue, as views show it.
        tokens_BT: completions.
        on_trie_BT: which tokens were drawn from the trie.
        roots_BK: where the first, second, … item of each row starts; by default at the root of the whole trie.

    Raises:
        ValueError: when a token on the trie continues no path.
    """
    places_BT = torch.full_like(tokens_BT, WHOLE_VOCABULARY)
    if roots_BK is None:
        roots_BK = torch.zeros_like(tokens_BT)
    item_B1 = torch.zeros_like(tokens_BT[:, :1])
    at_B = roots_BK[:, 0]
    for step in range(tokens_BT.shape[1]):
        on_B = on_trie_BT[:, step]
        places_BT[:, step] = torch.where(on_B, at_B, WHOLE_VOCABULARY)
        next_B = trie.find(at_B, tokens_BT[:, step])
        if bool((on_B & (next_B < 0)).any()):
            row = int((on_B & (next_B < 0)).nonzero()[0])
            raise ValueError(
                f"row {row}, token {step}: {int(tokens_BT[row, step])} follows no node "
                f"{int(trie.nodes(at_B)[row])} of the trie"
            )
        whole_B = on_B & (trie.depths(next_B) == trie.trie.depth)
        item_B1 = (item_B1 + whole_B[:, None]).clamp(max=roots_BK.shape[1] - 1)
        root_B = roots_BK.gather(1, item_B1)[:, 0]
        at_B = torch.where(on_B & ~whole_B, next_B, root_B)
    return places_BT


def score_tokens(
    model: torch.nn.Module,
    trie: TorchTrie,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    places_BT: torch.Tensor,
    *,
    group: int | None,
    temperature: float = 1.0,
) -> TokenScores:
    """Score the last T tokens of each row.

    Args:
        model: a causal language model, with or without a LoRA adapter.
        trie: the supports.
        input_ids: left-padded prompts followed by right-padded completions [B, P + T].
        attention_mask: 1 on real tokens.
        places_BT: where each completion token was drawn: a place of the trie, `WHOLE_VOCABULARY`, or `FORCED`.
        group: rows of a group, to compute its prompt once; None computes each row by itself.
        temperature: logits are divided by it.
    """
    hidden_BTD = hidden_states(model, input_ids, attention_mask, places_BT.shape[1], group=group)
    written_BT = attention_mask[:, -places_BT.shape[1] :].bool() & (places_BT != FORCED)
    tokens_BT = input_ids[:, -places_BT.shape[1] :]
    head = OutputLayer(model)
    hidden_ND, places_N, tokens_N = hidden_BTD[written_BT], places_BT[written_BT], tokens_BT[written_BT]
    scores_N2 = hidden_ND.new_zeros((len(places_N), 2), dtype=torch.float32)
    depths_N = trie.depths(places_N)
    for depth in depths_N.unique().tolist():
        rows = (depths_N == depth).nonzero()[:, 0]
        first, stop = trie.token_range(depth) if depth >= 0 else (0, trie.trie.vocab_size)

        def scores(
            hidden: torch.Tensor, places: torch.Tensor, tokens: torch.Tensor, first: int = first, stop: int = stop
        ) -> torch.Tensor:
            logits = head.logits(hidden, first, stop).float() / temperature
            return torch.stack(trie.token_logps(logits, places, tokens, first_token=first), dim=1)

        found_N2 = in_chunks(scores, (hidden_ND[rows], places_N[rows], tokens_N[rows]), max(1, CHUNK // (stop - first)))
        scores_N2 = scores_N2.index_copy(0, rows, found_N2)
    blank_BT = torch.zeros(tokens_BT.shape, device=scores_N2.device)
    logps_BT, entropies_BT = (blank_BT.masked_scatter(written_BT, scores_N2[:, column]) for column in (0, 1))
    return TokenScores(logps_BT, entropies_BT, hidden_BTD)


def hidden_states(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int, *, group: int | None
) -> torch.Tensor:
    """The trunk's last hidden states [B, T, D] at the positions that predict the last `length` tokens of each row."""
    trunk = trunk_of(model)
    if group is None:
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        output = trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state[:, -length - 1 : -1]
    blocks = trunk.config._attn_implementation == "flex_attention"
    packed = pack_groups(input_ids, attention_mask, length, group, trunk.dtype, blocks=blocks)
    output = trunk(
        input_ids=packed.ids_MS, attention_mask=packed.mask_M1SS, position_ids=packed.positions_MS, use_cache=False
    )
    return output.last_hidden_state[:, packed.keep[packed.place_GT]].flatten(0, 1)


def in_chunks(function: Callable[..., torch.Tensor], rows: tuple[torch.Tensor, ...], size: int) -> torch.Tensor:
    """`function` of so many rows at a time; several chunks keep nothing for the backward pass but their inputs."""
    if len(rows[0]) <= size:
        return function(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def sum_in_chunks(
    function: Callable[..., torch.Tensor],
    rows: tuple[torch.Tensor, ...],
    parameters: Sequence[torch.nn.Parameter],
    size: int,
) -> torch.Tensor:
    """The sum of `function` over all rows, so many at a time; differentiable by the first of `rows` and `parameters`.

    A sum's gradient is known up to a factor as soon as a chunk is computed, so it is taken then and there: nothing of a
    chunk is kept, and nothing is computed again in the backward pass.

    Args:
        function: of a chunk of each tensor of `rows`; a number a row.
        rows: tensors of equal length; the first may require a gradient.
        parameters: what `function` uses besides and requires a gradient.
        size: rows of a chunk.
    """
    total: torch.Tensor = _SumInChunks.apply(function, size, len(rows), *rows, *parameters)
    return total


class _SumInChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, function: Callable[..., torch.Tensor], size: int, count: int, *tensors: torch.Tensor
    ) -> torch.Tensor:
        rows, parameters = tensors[:count], [one for one in tensors[count:] if one.requires_grad]
        total = rows[0].new_zeros((), dtype=torch.float32)
        first = torch.zeros_like(rows[0]) if context.needs_input_grad[3] else None
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, len(rows[0]), size):
            part = [tensor[start : start + size].detach() for tensor in rows]
            wanted = [part[0].requires_grad_(), *parameters] if first is not None else parameters
            with torch.set_grad_enabled(bool(wanted)):
                chunk = function(*part).sum()
            total += chunk.detach()
            found = list(torch.autograd.grad(chunk, wanted, materialize_grads=True)) if wanted else []
            if first is not None:
                first[start : start + size] = found.pop(0)
            for whole, more in zip(sums, found, strict=True):
                whole += more
        context.needed = [one.requires_grad for one in tensors[count:]]
        context.count = count
        context.save_for_backward(*([] if first is None else [first]), *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(context: Any, *factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = [tensor * factor[0] for tensor in context.saved_tensors]
        first = saved.pop(0) if context.needs_input_grad[3] else None
        others = [saved.pop(0) if needed else None for needed in context.needed]
        return (None, None, None, first, *[None] * (context.count - 1), *others)


@torch.no_grad()
def require_exact(model: torch.nn.Module, *, packing: bool) -> None:
    """Compare with the model's own logits on a few tokens, so that nothing is silently scored wrong.

    Raises:
        ValueError: when the output layer does something that is not known here, or when groups are to be packed and the
            model takes no 4-D attention masks (recurrent layers, some attention kernels).
    """
    own_BTV, tolerance = require_known_logits(model)
    if not packing:
        return
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    ids, was_training = probe_ids(model), model.training
    model.eval()
    try:
        hidden_BTD = hidden_states(model, ids, torch.ones_like(ids), 3, group=2)
        found_BTV = OutputLayer(model).logits(hidden_BTD, 0, own_BTV.shape[-1]).float().log_softmax(dim=-1)
        gap = float((found_BTV - own_BTV).abs().max())
    except (TypeError, ValueError, RuntimeError):
        gap = float("inf")
    finally:
        model.train(was_training)
    if gap > tolerance:
        raise ValueError(
            f"rl.packing=true needs a model that takes 4-D attention masks, and {type(inner).__name__} with attention "
            f"{inner.config._attn_implementation} does not: set rl.packing=false"
        )
