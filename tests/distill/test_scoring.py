"""The loss of texts: against full logits row by row, with items in the vocabulary, packed or not, in chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from distill.losses import Divergence
from distill.scoring import Teacher, TextLoss, text_loss
from distill.vocabulary import SharedVocabulary, text_before_items
from rl.tiny import build_tokenizer
from rollout.sid import letters_format, onerec_format

TEXT, ITEMS = 40, 12  # token ids 40 … 51 are items, which the teacher has not
GROUP, PROMPT, LENGTH = 3, 4, 6


def model(seed: int, vocab: int, tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=12, tie_word_embeddings=tied,
    )  # fmt: skip
    policy = Qwen3ForCausalLM(config).eval()
    for parameter in policy.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy


def texts(items: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts with three texts each, some shorter, some that go on into items."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, TEXT, (2 * GROUP, PROMPT + LENGTH), generator=generator)
    ids[:GROUP, :PROMPT], ids[GROUP:, :PROMPT] = ids[0, :PROMPT].clone(), ids[GROUP, :PROMPT].clone()
    mask = torch.ones_like(ids)
    mask[GROUP:, :2] = 0  # a shorter prompt
    mask[1, -2:] = 0
    if items:
        ids[2, PROMPT + 2] = TEXT + 3
        ids[2, PROMPT + 4] = TEXT + 5
        ids[4, PROMPT] = TEXT
    return ids, mask


SHARED = SharedVocabulary(np.arange(TEXT), TEXT + ITEMS)


def plain(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor,
    divergence: Divergence,
    punish: bool,
) -> torch.Tensor:
    """Row by row, without padding, from full logits."""
    losses = []
    for row, seen in zip(ids, mask.bool(), strict=True):
        written = int(seen[-LENGTH:].sum())
        tokens = row[seen]
        mine = student(input_ids=tokens[None]).logits[0, -1 - written : -1] / 1.3
        other = teacher(input_ids=tokens[None].clamp(max=TEXT - 1)).logits[0, -1 - written : -1].detach() / 1.3
        for step, token in enumerate(tokens[-written:].tolist()):
            if token >= TEXT:
                if punish:
                    losses.append(-divergence.low * mine[step].log_softmax(dim=0)[token])
                break
            shared, known = mine[step, :TEXT].log_softmax(dim=0), other[step, :TEXT].log_softmax(dim=0)
            losses.append(divergence(shared[None], known[None], torch.tensor([token]))[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd", "top_k", "sampled"])
@pytest.mark.parametrize("punish", [False, True], ids=["left out", "punished"])
@pytest.mark.parametrize("group", [None, GROUP], ids=["rows", "packed"])
def test_loss_and_gradient(kind: Any, punish: bool, group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the plain computation, whatever the chunks."""
    student, teacher = model(1, TEXT + ITEMS), model(2, TEXT, tied=False)
    divergence, (ids, mask) = Divergence(kind, top_k=5), texts()
    expected = plain(student, teacher, ids, mask, divergence, punish)
    expected_gradient = torch.autograd.grad(expected, list(student.parameters()))
    for rows in (1_000, 3):
        monkeypatch.setattr("distill.scoring.chunk_rows", lambda _, rows=rows: rows)
        found = text_loss(
            student, Teacher.of(teacher), ids, mask, LENGTH, divergence=divergence, shared=SHARED, group=group,
            temperature=1.3, item_tokens="punish" if punish else "leave_out",
        )  # fmt: skip
        assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        gradient = torch.autograd.grad(found.loss, list(student.parameters()))
        gap = sum(float((a - b).norm() ** 2) for a, b in zip(gradient, expected_gradient, strict=True)) ** 0.5
        assert gap < 1e-5 * sum(float(b.norm() ** 2) for b in expected_gradient) ** 0.5
        assert found.item_tokens == pytest.approx(2 / 6)
        assert found.tokens == 6 * 6 - 2 - 4 - 6 + 2 * punish


def test_the_base_under_the_adapter_teaches() -> None:
    """No second model: the adapter is off while it is the teacher, and on again afterwards."""
    base = model(1, TEXT + ITEMS)
    apart = model(1, TEXT + ITEMS)
    student = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    ids, mask = texts(items=False)
    everything = SharedVocabulary(np.arange(TEXT + ITEMS), TEXT + ITEMS)

    def loss(teacher: Teacher) -> TextLoss:
        return text_loss(student, teacher, ids, mask, LENGTH, divergence=Divergence(), shared=everything, group=GROUP)

    mine, other = loss(Teacher.base_of(student)), loss(Teacher.of(apart))
    assert float(mine.loss.detach()) == pytest.approx(float(other.loss.detach()), rel=1e-5)
    assert float(mine.loss.detach()) > 0.01
    mine.loss.backward()
    assert any(p.grad is not None and float(p.grad.norm()) > 0 for n, p in student.named_parameters() if "lora" in n)


def test_texts_of_items_alone() -> None:
    """Nothing is counted, and nothing breaks."""
    ids, mask = texts()
    ids[:, PROMPT] = TEXT + 1
    student, teacher = model(1, TEXT + ITEMS), model(2, TEXT)
    found = text_loss(student, Teacher.of(teacher), ids, mask, LENGTH, divergence=Divergence(), shared=SHARED)
    assert (float(found.loss.detach()), found.tokens, found.item_tokens) == (0.0, 0, 1.0)


def test_text_before_items() -> None:
    columns = torch.tensor([[3, 1, -1, 2, -1], [-1, 4, 4, 4, 4], [1, 2, 3, -1, -1]])
    written = torch.tensor([[True] * 5, [True] * 5, [True, True, True, False, False]])
    text, first = text_before_items(columns, written)
    assert text.int().tolist() == [[1, 1, 0, 0, 0], [0] * 5, [1, 1, 1, 0, 0]]
    assert first.int().tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5]


def test_shared_vocabulary() -> None:
    """A student that has item tokens and a teacher of the same text; then one of another text."""
    student, teacher = build_tokenizer(letters_format((4, 4, 4))), build_tokenizer(letters_format((4, 4, 4)))
    both = SharedVocabulary.of(student, teacher, len(student), len(teacher))
    assert both.ids.tolist() == list(range(len(teacher)))
    padded = SharedVocabulary.of(student, teacher, len(student) + 50, len(teacher) + 7)
    assert padded.stop == len(teacher) and padded.student_size == len(student) + 50
    assert padded.column_of(torch.tensor([0, 5, len(teacher)])).tolist() == [0, 5, -1]
    wider = build_tokenizer(onerec_format((4, 4, 4)))
    with pytest.raises(ValueError, match=r"tokens of the teacher are other tokens of the student .* here\)"):
        SharedVocabulary.of(student, wider, len(student), len(wider))
    with pytest.raises(ValueError, match="output matrix has 10 rows"):
        SharedVocabulary.of(student, teacher, 10, len(teacher))


def test_vocabularies_with_gaps() -> None:
    """Columns are picked where ids are not the first ones."""
    some = SharedVocabulary(np.array([1, 4, 5]), 8)
    logits = torch.arange(12.0).view(2, 6)
    assert some.columns(logits).tolist() == [[1, 4, 5], [7, 10, 11]]
    assert some.column_of(torch.tensor([[5, 0], [1, 4]])).tolist() == [[2, -1], [0, 1]]
    assert isinstance(build_tokenizer(letters_format((2, 2))), PreTrainedTokenizerFast)
