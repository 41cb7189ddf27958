"""Full weights of a policy under their Hugging Face names, with an adapter folded in, and their checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel


def merged_weights(model: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """The policy's weights on the CPU as a plain Hugging Face state dict.

    A PEFT model's active adapter is folded in. The model itself is left bit-equal: base weights are copied back after
    each layer's merge, since merging and unmerging again would drift by a rounding error each time.
    """
    with torch.no_grad():
        return dict(_merged(model))


def _merged(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    if not isinstance(model, PeftModel):
        for name, tensor in _untied(model):
            yield name, tensor.detach().to("cpu", copy=True)
        return
    base = model.get_base_model()
    merged: dict[str, torch.Tensor] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge"):
            inner = layer.get_base_layer()
            kept = {key: tensor.clone() for key, tensor in inner.state_dict().items()}
            layer.merge()
            merged |= {
                f"{name}.{key}": tensor.detach().to("cpu", copy=True) for key, tensor in inner.state_dict().items()
            }
            for key, tensor in inner.state_dict().items():
                tensor.copy_(kept[key])
            layer.merged_adapters = []
    for name, tensor in _untied(base):
        clean = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        if "lora_" in name or ".original_module" in name:
            continue
        yield clean, merged.get(clean, tensor.detach()).to("cpu", copy=True)


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of an output matrix that is the input embedding, and of that embedding; None when it has its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return f"{names[id(head)]}.weight", f"{names[id(embedding)]}.weight"


def _untied(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """State dict without the second name of tied output weights, which loaders tie again by themselves."""
    tied = tied_head(model)
    for name, tensor in model.state_dict().items():
        if not tied or name != tied[0]:
            yield name, tensor


def checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """128-bit BLAKE2 over names, types, shapes and bytes, independent of order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
