"""Packed groups give the logits and gradients of one plain row per completion."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention.flex_attention import BlockMask, create_mask

from rl.packing import pack_groups
from rollout.hf_engine import load_policy
from tests.rl.conftest import MakePolicy

CLOSE = 1e-5
VOCAB = 200  # every id below it is a token of the tiny policies


def batch(
    lengths: list[int], group: int, completion: int, *, duplicates: bool = True, cut: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of these lengths and right-padded completions; pads are random tokens."""
    generator = torch.Generator().manual_seed(sum(lengths) + 31 * group + completion)
    longest = max(lengths)
    ids = torch.randint(5, VOCAB, (len(lengths) * group, longest + completion), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        rows = slice(row * group, (row + 1) * group)
        ids[rows, :longest] = ids[row * group, :longest]
        mask[rows, : longest - length] = 0
        if duplicates and group > 2:
            ids[row * group + 2] = ids[row * group]
    if cut:  # completions of different lengths
        for row in range(len(ids)):
            mask[row, longest + 1 + row % completion :] = 0
    return ids, mask


def plain_logits(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, completion: int) -> list[torch.Tensor]:
    """Logits [length, V] of each row's written completion tokens, every row alone and without padding."""
    found = []
    for row, seen in zip(ids, mask.bool(), strict=True):
        written = int(seen[-completion:].sum())
        found.append(model(input_ids=row[seen][None], use_cache=False).logits[0, -1 - written : -1])
    return found


def packed_logits(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, completion: int, group: int, blocks: bool = False
) -> list[torch.Tensor]:
    packed = pack_groups(ids, mask, completion, group, torch.float32, blocks=blocks)
    output = model(
        input_ids=packed.ids_MS,
        attention_mask=packed.mask_M1SS,
        position_ids=packed.positions_MS,
        use_cache=False,
        logits_to_keep=packed.keep,
    )
    logits_BTV = output.logits[:, packed.place_GT].flatten(0, 1)
    return [rows[seen] for rows, seen in zip(logits_BTV, mask[:, -completion:].bool(), strict=True)]


def gradients(model: torch.nn.Module, logits: list[torch.Tensor]) -> torch.Tensor:
    """Gradient of a loss in which every logit counts, with a weight of its own."""
    generator = torch.Generator().manual_seed(5)
    logps = torch.cat(logits).log_softmax(dim=-1)
    loss = (logps * torch.rand(logps.shape, generator=generator)).mean()
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def gap(one: torch.Tensor, two: torch.Tensor) -> float:
    """Relative difference in norm."""
    return float(((one - two).norm() / two.norm()).detach())


def policy(folder: Path, kind: str) -> torch.nn.Module:
    """`full`, or `lora` with an adapter that is not zero."""
    model = load_policy(folder)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    ("lengths", "group", "completion", "cut"),
    [([5], 3, 3, False), ([9, 2, 6], 4, 4, False), ([3, 8], 3, 1, False), ([1, 4], 2, 3, False), ([4, 7], 4, 4, True)],
    ids=["one group", "three groups", "one token", "prompt of one token", "cut completions"],
)
def test_packed_is_unpacked(
    make_policy: MakePolicy, tied: bool, kind: str, lengths: list[int], group: int, completion: int, cut: bool
) -> None:
    model = policy(make_policy(tied=tied), kind)
    ids, mask = batch(lengths, group, completion, cut=cut)
    plain = plain_logits(model, ids, mask, completion)
    expected = gradients(model, plain)
    packed = packed_logits(model, ids, mask, completion, group)
    for one, two in zip(packed, plain, strict=True):
        assert gap(one, two) <= CLOSE
    assert expected.norm() > 0
    assert gap(gradients(model, packed), expected) <= CLOSE


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_checkpointing(make_policy: MakePolicy, kind: str) -> None:
    model = policy(make_policy(), kind)
    ids, mask = batch([7, 3], 4, 3)
    expected = gradients(model, plain_logits(model, ids, mask, 3))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    assert gap(gradients(model, packed_logits(model, ids, mask, 3, 4)), expected) <= CLOSE


def test_eager_attention(make_policy: MakePolicy) -> None:
    """The additive mask means the same to both attention codes."""
    ids, mask = batch([6, 2], 3, 3)
    model = load_policy(make_policy(), attention="eager")
    expected = torch.cat(plain_logits(load_policy(make_policy()), ids, mask, 3))
    assert gap(torch.cat(packed_logits(model, ids, mask, 3, 3)), expected) <= CLOSE


def test_flex_attention(make_policy: MakePolicy) -> None:
    """Its forward pass, which is all it has on CPU; the block mask is the dense one by another name."""
    ids, mask = batch([11, 4], 4, 3, cut=True)
    model = load_policy(make_policy(), dtype="float32", attention="flex_attention").requires_grad_(False)
    plain = load_policy(make_policy(), dtype="float32")
    for mine, other in zip(packed_logits(model, ids, mask, 3, 4, True), plain_logits(plain, ids, mask, 3), strict=True):
        torch.testing.assert_close(mine[: len(other)], other.detach(), atol=CLOSE, rtol=CLOSE)
    blocks = pack_groups(ids, mask, 3, 4, torch.float32, blocks=True).mask_M1SS
    dense = pack_groups(ids, mask, 3, 4, torch.float32).mask_M1SS
    assert isinstance(blocks, BlockMask) and isinstance(dense, torch.Tensor)
    size = dense.shape[-1]
    assert torch.equal(create_mask(blocks.mask_mod, len(dense), None, size, size, "cpu"), dense == 0)


def test_pads_are_never_seen(make_policy: MakePolicy) -> None:
    """Other tokens under the mask change nothing, bit for bit."""
    model = load_policy(make_policy())
    ids, mask = batch([6, 2], 3, 3)
    other = torch.where(mask.bool(), ids, 17)
    assert not torch.equal(ids, other)
    one, two = (torch.cat(packed_logits(model, rows, mask, 3, 3)) for rows in (ids, other))
    assert torch.equal(one, two)


def test_mask_by_hand() -> None:
    """One group of two completions of three tokens, a prompt of two tokens and one pad before it."""
    ids = torch.tensor([[0, 11, 12, 21, 22, 23], [0, 11, 12, 31, 32, 33]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    packed = pack_groups(ids, mask, 3, 2, torch.float32)
    assert packed.ids_MS.tolist() == [[0, 11, 12, 21, 22, 31, 32]]
    assert packed.positions_MS.tolist() == [[0, 0, 1, 2, 3, 2, 3]]
    assert packed.keep.tolist() == [2, 3, 4, 5, 6]
    assert packed.place_GT.tolist() == [[0, 1, 2], [0, 3, 4]]
    seen = [  # pad 11 12 | 21 22 | 31 32
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 1, 1, 0, 0, 1, 1],
    ]
    lowest = torch.finfo(torch.float32).min
    assert packed.mask_M1SS.shape == (1, 1, 7, 7)
    for row, column in itertools.product(range(7), range(7)):
        assert packed.mask_M1SS[0, 0, row, column] == (0 if seen[row][column] else lowest), (row, column)


def test_sizes() -> None:
    """P + G·(T - 1) tokens a group, where rows of their own would take G·(P + T)."""
    ids, mask = batch([10, 10], 4, 3)
    packed = pack_groups(ids, mask, 3, 4, torch.float32)
    assert packed.ids_MS.shape == (2, 10 + 4 * 2)
    assert len(packed.keep) == 1 + 4 * 2
    assert packed.place_GT.shape == (4, 3)


def test_rows_that_are_no_whole_groups() -> None:
    ids, mask = batch([5, 5], 3, 3)
    with pytest.raises(ValueError, match="5 rows are no whole groups of 3"):
        pack_groups(ids[:5], mask[:5], 3, 3, torch.float32)
    with pytest.raises(ValueError, match="whole and in order"):
        pack_groups(ids[[0, 1, 3, 2, 4, 5]], mask, 3, 3, torch.float32)
    with pytest.raises(ValueError, match="whole and in order"):
        pack_groups(ids, mask, 3, 2, torch.float32)
