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

    Raises:
        ValueError: when an adapter has made a tied output matrix differ from the embedding: no plain model of that
            architecture could hold both.
    """
    with torch.no_grad():
        if not isinstance(model, PeftModel):
            return {name: tensor.detach().to("cpu", copy=True) for name, tensor in _untied(model)}
        base = model.get_base_model()
        weights = dict(_merged(base))
    if base.config.get_text_config().tie_word_embeddings and base.get_output_embeddings() is not None:
        head, embedding = _vocabulary_names(base)
        if not {head, embedding} <= set(weights) or not torch.equal(weights[head], weights[embedding]):
            raise ValueError(
                "the adapter changes the vocabulary of a model whose output matrix is tied to its embedding: set "
                "ensure_weight_tying (lora.extra.ensure_weight_tying: true), or leave the vocabulary out of it"
            )
        del weights[head]
    return weights


def _merged(base: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    merged: dict[str, torch.Tensor] = {}
    for name, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "merge"):
            inner = layer.get_base_layer()
            kept = {key: tensor.clone() for key, tensor in inner.state_dict().items()}
            layer.merge()
            for key, tensor in inner.state_dict().items():
                merged[f"{name}.{key}"] = tensor.detach().to("cpu", copy=True)
                tensor.copy_(kept[key])
            layer.merged_adapters = []
    for name, tensor in base.state_dict().items():
        if "lora_" in name or ".original_module" in name:
            continue
        clean = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
        yield clean, merged.get(clean, tensor.detach()).to("cpu", copy=True)


def require_fit(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], version: int) -> None:
    """Raise ValueError unless the weights are, by name and shape, those of the engine's model."""
    missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    other = [
        f"{name} is {tuple(weights[name].shape)} for {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    if missing or unknown or other:
        told = [f"missing {missing[:3]}"] * bool(missing) + [f"unknown {unknown[:3]}"] * bool(unknown) + other[:3]
        raise ValueError(f"weights of version {version} do not fit the engine's model: {'; '.join(told)}")


def shapes_of(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Shape of every weight that `merged_weights` gives of such a model."""
    return {name: tensor.shape for name, tensor in _untied(model)}


def tied_head(model: PreTrainedModel) -> tuple[str, str] | None:
    """Names of an output matrix that is the input embedding, and of that embedding; None when it has its own."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    return _vocabulary_names(model)


def _vocabulary_names(model: PreTrainedModel) -> tuple[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
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
