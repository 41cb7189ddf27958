"""Scores of packed groups with only the rows of the output matrix that count, against one plain row at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rl import scoring
from rl.scoring import require_exact, score_tokens, sum_in_chunks, support_places
from rollout.output_layer import OutputLayer
from rollout.support import TorchTrie
from rollout.trie import SidTrie

CLOSE = 1e-5
VOCAB, PAD = 90, 0
PATHS = np.array([(40, 50, 60), (40, 50, 61), (40, 52, 60), (43, 50, 66), (44, 57, 61), (44, 57, 69)])
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(kind: str) -> torch.nn.Module:
    """`tied`, `untied`, `lora` (all linear layers), `lora head` (the output layer too), `saved head`."""
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=kind == "tied")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 2 * parameter.shape[1] ** -0.5)
    if kind in ("tied", "untied"):
        return model
    targets = ["q_proj", "down_proj"] + (["lm_head"] if kind == "lora head" else [])
    saved = ["lm_head"] if kind == "saved head" else None
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=targets, modules_to_save=saved, task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return adapted


def trie() -> TorchTrie:
    return TorchTrie(SidTrie.from_paths(PATHS, VOCAB))


def batch(texts: list[list[int]], lengths: list[int], group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of unequal prompts; completion i is free text of texts[i] tokens and an item after each. Two rows repeat."""
    rng = np.random.default_rng(sum(lengths))
    prompts = [rng.integers(3, 40, length).tolist() for length in lengths]
    rows: list[list[int]] = []
    completions: list[list[int]] = []
    flags: list[list[bool]] = []
    for index in range(len(lengths) * group):
        written: list[int] = []
        on: list[bool] = []
        for text in texts[index % len(texts)]:
            item = PATHS[rng.integers(len(PATHS))].tolist()
            written += [*rng.integers(3, 40, text).tolist(), *item]
            on += [False] * text + [True] * 3
        if index % group == 2:
            written, on = list(completions[-2]), list(flags[-2])
        rows.append(prompts[index // group])
        completions.append(written)
        flags.append(on)
    wide, long = max(map(len, rows)), max(map(len, completions))
    ids = torch.tensor(
        [[PAD] * (wide - len(p)) + p + c + [PAD] * (long - len(c)) for p, c in zip(rows, completions, strict=True)]
    )
    mask = torch.tensor(
        [
            [0] * (wide - len(p)) + [1] * (len(p) + len(c)) + [0] * (long - len(c))
            for p, c in zip(rows, completions, strict=True)
        ]
    )
    on_trie = torch.tensor([on + [False] * (long - len(on)) for on in flags])
    return ids, mask, on_trie


def plain(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, on_trie: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [B, T], one row at a time, children found by looking through the paths."""
    length = on_trie.shape[1]
    found = []
    for row, seen, on in zip(ids, mask.bool(), on_trie, strict=True):
        written = row[-length:][seen[-length:]]
        logits = model(input_ids=row[seen][None], use_cache=False).logits[0, -len(written) - 1 : -1]
        logps: list[torch.Tensor] = []
        item: list[int] = []
        for step, token in enumerate(written.tolist()):
            if on[step]:
                legal = sorted({int(path[len(item)]) for path in PATHS if path[: len(item)].tolist() == item})
                logps.append(logits[step, legal].log_softmax(dim=-1)[legal.index(token)])
                item = [*item, token] if len(item) < 2 else []
            else:
                logps.append(logits[step].log_softmax(dim=-1)[token])
        found.append(torch.stack([*logps, *[logits.new_zeros(())] * (length - len(written))]))
    return torch.stack(found)


def gradient(model: torch.nn.Module, logps_BT: torch.Tensor) -> torch.Tensor:
    weights = torch.rand(logps_BT.shape, generator=torch.Generator().manual_seed(4)) - 0.3
    model.zero_grad()
    (weights * logps_BT).sum().backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("chunk", [scoring.CHUNK, 3 * VOCAB], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("group", [4, None], ids=["packed", "unpacked"])
@pytest.mark.parametrize("texts", [[[0]], [[1], [0], [4]], [[2, 0, 1], [0], [3, 1]]], ids=["item", "text", "items"])
@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "lora head", "saved head"])
def test_scores_and_gradients_are_those_of_plain_rows(
    kind: str, texts: list[list[int]], group: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    model = model_of(kind)
    ids, mask, on_trie = batch(texts, [5, 2, 9], 4)
    expected = plain(model, ids, mask, on_trie)
    expected_gradient = gradient(model, expected)
    nodes = support_places(trie(), ids[:, -on_trie.shape[1] :], on_trie)
    scores = score_tokens(model, trie(), ids, mask, nodes, group=group)
    torch.testing.assert_close(scores.logps_BT, expected, atol=1e-5, rtol=1e-5)
    assert relative(gradient(model, scores.logps_BT), expected_gradient) <= CLOSE


@pytest.mark.parametrize("kind", ["lora head", "saved head"])
def test_an_adapter_that_is_off_is_left_out(kind: str) -> None:
    model: Any = model_of(kind)
    ids, mask, on_trie = batch([[1]], [4, 6], 2)
    nodes = support_places(trie(), ids[:, -on_trie.shape[1] :], on_trie)
    with torch.no_grad(), model.disable_adapter():
        off = score_tokens(model, trie(), ids, mask, nodes, group=2).logps_BT
        torch.testing.assert_close(off, plain(model, ids, mask, on_trie), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (score_tokens(model, trie(), ids, mask, nodes, group=2).logps_BT - off).abs().max() > 0.01


def test_micro_batches_change_nothing() -> None:
    model = model_of("lora")
    ids, mask, on_trie = batch([[1], [0]], [5, 2, 9, 4], 4)
    nodes = support_places(trie(), ids[:, -on_trie.shape[1] :], on_trie)
    whole = score_tokens(model, trie(), ids, mask, nodes, group=4).logps_BT
    slices = zip(ids.split(4), mask.split(4), nodes.split(4), strict=True)
    parts = [score_tokens(model, trie(), *part, group=4) for part in slices]
    torch.testing.assert_close(torch.cat([part.logps_BT for part in parts]), whole, atol=1e-5, rtol=1e-5)


def test_entropy_is_that_of_the_support() -> None:
    model = model_of("untied")
    ids, mask, on_trie = batch([[0]], [4], 4)
    nodes = support_places(trie(), ids[:, -3:], on_trie)
    scores = score_tokens(model, trie(), ids, mask, nodes, group=4, temperature=0.7)
    logits = model(input_ids=ids[:1], use_cache=False).logits[0, 3] / 0.7
    share = logits[[40, 43, 44]].softmax(dim=-1)
    assert float(scores.entropies_BT[0, 0]) == pytest.approx(float(-(share * share.log()).sum()), rel=1e-4)


def test_support_places_restart_at_each_item() -> None:
    shelf = trie()
    tokens = torch.tensor([[7, 40, 50, 61, 44, 57, 69]])
    on = torch.tensor([[False, True, True, True, True, True, True]])
    (nodes,) = support_places(shelf, tokens, on).tolist()
    walk = shelf.trie.walk(np.array([[40, 50], [44, 57]])).tolist()
    assert nodes == [-1, *walk[0], *walk[1]]
    with pytest.raises(ValueError, match=r"row 0, token 2: 57 follows no node"):
        support_places(shelf, torch.tensor([[7, 40, 57]]), torch.tensor([[False, True, True]]))


def test_only_the_rows_of_the_level_are_multiplied() -> None:
    """No free text, no logits of the whole vocabulary."""
    model: Any = model_of("untied")
    shelf = trie()
    widths: list[int] = []
    whole = OutputLayer.logits

    def watch(self: OutputLayer, hidden: torch.Tensor, first: int, stop: int) -> torch.Tensor:
        widths.append(stop - first)
        return whole(self, hidden, first, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputLayer, "logits", watch)
        ids, mask, on_trie = batch([[0]], [4, 4], 3)
        score_tokens(model, shelf, ids, mask, support_places(shelf, ids[:, -3:], on_trie), group=3)
    assert widths == [5, 8, 10]


# Other architectures --------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0, sliding_window=4096)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=3.0)
    ),
    "cohere": lambda: CohereForCausalLM(
        CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}, logit_scale=0.25)
    ),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_logits_that_are_scaled_or_capped(name: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 3 * parameter.shape[1] ** -0.5)
    require_exact(model, packing=True)
    ids, mask, on_trie = batch([[1], [0]], [5, 3], 2)
    nodes = support_places(trie(), ids[:, -on_trie.shape[1] :], on_trie)
    with torch.no_grad():
        found = score_tokens(model, trie(), ids, mask, nodes, group=2).logps_BT
        torch.testing.assert_close(found, plain(model, ids, mask, on_trie), atol=1e-4, rtol=1e-4)


class Doubled(Qwen3ForCausalLM):
    """Does to its logits what nobody knows of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_logits_of_an_unknown_kind_are_refused() -> None:
    model = Doubled(Qwen3Config(**SMALL))
    with pytest.raises(ValueError, match="Doubled makes its logits in a way that sidrl does not know"):
        require_exact(model, packing=False)


def test_models_without_4d_masks_are_refused() -> None:
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8))
    with pytest.raises(ValueError, match=r"rl\.packing=true needs a model that takes 4-D attention masks, and Mamba"):
        require_exact(mamba, packing=True)
    require_exact(model_of("lora head"), packing=True)


def test_the_refusal_reaches_the_run(make_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        "rl.scoring.pack_groups", lambda *_: (_ for _ in ()).throw(ValueError("a model that takes no such mask"))
    )
    with pytest.raises(ValueError, match=r"set rl\.packing=false"):
        make_run()


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("frozen", ["nothing", "rows", "parameter", "everything"])
def test_sums_in_chunks(size: int, frozen: str) -> None:
    """Value and gradients of a sum are those of all rows at once, whatever needs one; unused parameters get zeros."""
    torch.manual_seed(0)
    rows, index = torch.randn(11, 5), torch.randint(0, 7, (11,))
    rows.requires_grad_(frozen not in ("rows", "everything"))
    weight = torch.nn.Parameter(torch.randn(7, 5), requires_grad=frozen not in ("parameter", "everything"))
    unused = torch.nn.Parameter(torch.randn(3), requires_grad=frozen != "everything")

    def loss(some: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return -(some @ weight.T).log_softmax(dim=1).gather(1, columns[:, None])[:, 0]

    found = sum_in_chunks(loss, (rows, index), [weight, unused], size)
    expected = loss(rows, index).sum()
    torch.testing.assert_close(found, expected)
    wanted = [tensor for tensor in (rows, weight) if tensor.requires_grad]
    assert found.requires_grad == (frozen != "everything")
    if wanted:
        for mine, plain in zip(
            torch.autograd.grad(3 * found, wanted), torch.autograd.grad(3 * expected, wanted), strict=True
        ):
            torch.testing.assert_close(mine, plain)
    assert float(sum_in_chunks(loss, (rows[:0], index[:0]), [weight, unused], size).detach()) == 0
