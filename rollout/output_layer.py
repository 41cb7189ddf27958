"""The two halves of a causal language model: its trunk, and the rows of its output matrix that count.

At a SID position a few thousand tokens of the vocabulary's hundred thousand are possible, so only their rows of the
output matrix are multiplied, in search as in the update.

Axes: N positions, D hidden size, B rows, T tokens.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch.nn.functional import linear


class OutputLayer:
    """The output matrix of a causal language model, row by row, with the adapter that is active on it.

    A plain linear layer and vanilla LoRA on one are multiplied by the wanted rows alone; any other layer is called
    whole. What some architectures do to logits afterwards (Gemma's soft cap, the scales of Cohere and Granite) is done
    here too; `require_exact` finds out whether that is all.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        config = inner.config.get_text_config()
        self.head = inner.get_output_embeddings()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """What of it is trained: the matrix itself, an adapter on it, or nothing."""
        return [parameter for parameter in self.head.parameters() if parameter.requires_grad]

    def logits(self, hidden_ND: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        """Logits [N, stop - first] of the tokens `first` to `stop`."""
        logits = _rows(self.head, hidden_ND, first, stop)
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def _rows(head: torch.nn.Module, hidden_ND: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    if isinstance(head, ModulesToSaveWrapper):
        whole = head.disable_adapters or head.active_adapters[0] not in head.modules_to_save
        return _rows(
            head.original_module if whole else head.modules_to_save[head.active_adapters[0]], hidden_ND, first, stop
        )
    if type(head) is torch.nn.Linear:
        return linear(hidden_ND, head.weight[first:stop], None if head.bias is None else head.bias[first:stop])
    active = [name for name in getattr(head, "active_adapters", ()) if name in getattr(head, "lora_A", ())]
    if type(head) is not LoraLinear or any(name in head.lora_variant for name in active):
        return head(hidden_ND)[:, first:stop]
    logits = _rows(head.base_layer, hidden_ND, first, stop)
    if head.disable_adapters or head.merged:
        return logits
    for name in active:
        narrow = head.lora_A[name](head.lora_dropout[name](hidden_ND.to(head.lora_A[name].weight.dtype)))
        lora_B = head.lora_B[name]
        bias = None if lora_B.bias is None else lora_B.bias[first:stop]
        logits = logits + (linear(narrow, lora_B.weight[first:stop], bias) * head.scaling[name]).to(logits.dtype)
    return logits


def trunk_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its output layer; the layers of an active adapter are inside it."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(inner, inner.base_model_prefix)


def probe_ids(model: torch.nn.Module) -> torch.Tensor:
    """Two rows of nine tokens, the first six in common: enough to compare ways of computing."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    config, device = inner.config.get_text_config(), next(model.parameters()).device
    ids = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0)).to(device)
    ids[1, :6] = ids[0, :6]
    return ids


@torch.no_grad()
def require_known_logits(model: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """Compare trunk and output layer with the model's own logits on a few tokens, so that nothing is silently wrong.

    Returns:
        the model's own log-probabilities [B, 3, V] of the last three tokens of `probe_ids`, and how far others may be
        off.

    Raises:
        ValueError: when the model is built in a way that is not known here.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    name, ids, was_training = type(inner).__name__, probe_ids(model), model.training
    model.eval()
    try:
        own_BTV = inner(input_ids=ids, use_cache=False).logits[:, 5:-1].float().log_softmax(dim=-1)
        tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.25
        hidden_BTD = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, 5:-1]
        found_BTV = OutputLayer(model).logits(hidden_BTD, 0, own_BTV.shape[-1]).float().log_softmax(dim=-1)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the policy's {name} is no causal transformer as sidrl knows them: {error}") from error
    finally:
        model.train(was_training)
    gap = float((found_BTV - own_BTV).abs().max())
    if gap > tolerance:
        raise ValueError(
            f"the policy's {name} makes its logits in a way that sidrl does not know (they differ by {gap:.2g}): its "
            "log-probabilities would be wrong"
        )
    return own_BTV, tolerance
