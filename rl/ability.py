"""How well a policy still does with general text: a check inside a run, so that forgetting shows beside the gains.

Axes: B rows, T answer tokens, D hidden size, V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rl.batch import evaluating, prompted_rows
from rl.general import TextPrompt
from rl.scoring import CHUNK, hidden_states, in_chunks
from rollout.output_layer import OutputLayer


@torch.no_grad()
def general_ability(model: torch.nn.Module, rows: Sequence[TextPrompt], pad: int, batch: int) -> dict[str, float]:
    """How well a policy gives the answers of general rows.

    - `general/perplexity`: exp of the mean negative log-likelihood of the answers' tokens over the whole vocabulary, so
      that mass which has drifted to items counts as lost.
    - `general/exact`: share of the answers (passages left out) that the policy writes to the letter when it takes the
      likeliest token each time, its end included. That is so if and only if each token of the answer is the likeliest
      after those before it, so one forward pass tells.

    Args:
        model: the policy.
        rows: prompts with answers.
        pad: token that fills rows up.
        batch: rows computed at once.
    """
    head, nll, count, exact = OutputLayer(model), 0.0, 0, []
    vocab = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    device = next(model.parameters()).device

    def told(hidden_ND: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        logps_NV = head.logits(hidden_ND, 0, vocab).float().log_softmax(dim=-1)
        return torch.stack([logps_NV.gather(1, tokens_N[:, None])[:, 0], logps_NV.argmax(dim=1) == tokens_N], dim=1)

    ordered = sorted((row for row in rows if row.answer_ids), key=lambda row: len(row.prompt_ids))
    with evaluating(model):
        for start in range(0, len(ordered), batch):
            some = ordered[start : start + batch]
            ids, mask, length = prompted_rows([row.prompt_ids for row in some], [row.answer_ids for row in some], pad)
            ids, mask = ids.to(device), mask.to(device)
            written_BT, tokens_BT = mask[:, -length:].bool(), ids[:, -length:]
            hidden_BTD = hidden_states(model, ids, mask, length, group=None)
            found_N2 = in_chunks(told, (hidden_BTD[written_BT], tokens_BT[written_BT]), max(1, CHUNK // vocab))
            nll -= float(found_N2[:, 0].double().sum())
            count += len(found_N2)
            right_BT = torch.ones(written_BT.shape, device=device).masked_scatter(written_BT, found_N2[:, 1])
            met_B = right_BT.bool().all(dim=1).tolist()
            exact += [met for met, row in zip(met_B, some, strict=True) if row.exact]
    result = {"general/perplexity": math.exp(min(nll / count, 700.0))} if count else {}
    return result | ({"general/exact": sum(exact) / len(exact)} if exact else {})
