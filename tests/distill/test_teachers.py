"""Teachers in processes of their own: what they say, that the loss is the same from it, and that they act as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from configs.schema import ModelConfig, RolloutConfig, RunConfig
from configs.update import DistillConfig
from distill.known import HFTeacher, Known
from distill.losses import Divergence
from distill.scoring import Teacher, Told, text_loss
from distill.vocabulary import SharedVocabulary
from rl.tiny import build_model, build_tokenizer, save_policy
from rollout.hf_engine import load_policy
from rollout.sid import letters_format
from tests.conftest import need_vllm

TOP, HEAT = 6, 1.3
GAP = np.arange(100, 112)
"""Tokens that the teacher has and the student writes as items."""

Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose distributions are far from uniform."""
    tokenizer = build_tokenizer(letters_format((8, 8, 8)))
    torch.manual_seed(0)
    model = build_model(tokenizer, hidden_size=64, layers=2, heads=2)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("teacher")
    save_policy(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def shared() -> SharedVocabulary:
    size = len(build_tokenizer(letters_format((8, 8, 8))))
    return SharedVocabulary(np.setdiff1d(np.arange(size), GAP), size)


def asked(shared: SharedVocabulary) -> tuple[list[Ids], list[list[Ids]]]:
    """Prompts of several lengths with three texts each, one of them empty."""
    rng = np.random.default_rng(0)

    def some(length: int) -> Ids:
        return tuple(rng.choice(shared.ids, length).tolist())

    return [some(length) for length in (4, 9, 3, 20)], [[some(5), (), some(2)] for _ in range(4)]


@pytest.fixture
def hf(folder: Path, shared: SharedVocabulary) -> HFTeacher:
    return HFTeacher(folder, ModelConfig(), shared, top_k=TOP, temperature=HEAT, batch=3)


def plain(model: PreTrainedModel, shared: SharedVocabulary, prompt: Ids, text: Ids) -> Known:
    """From the model's own logits, in double precision."""
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1].double()
    logps_TV = (logits_TV[:, torch.from_numpy(shared.ids)] / HEAT).log_softmax(dim=-1).numpy()
    order_TV = np.argsort(-logps_TV, axis=1)[:, :TOP]
    columns = np.searchsorted(shared.ids, np.array(text, dtype=np.int64))
    return Known(order_TV, np.take_along_axis(logps_TV, order_TV, 1), logps_TV[np.arange(len(text)), columns])


def same(found: Known, expected: Known) -> None:
    np.testing.assert_array_equal(found.columns, expected.columns)
    np.testing.assert_allclose(found.logps, expected.logps, atol=1e-5)
    np.testing.assert_allclose(found.written, expected.written, atol=1e-5)


def test_what_a_teacher_says(
    hf: HFTeacher, folder: Path, shared: SharedVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its likeliest tokens over what both can say, and the written ones, for texts of any length, in chunks."""
    monkeypatch.setattr("distill.known.CHUNK", 3 * shared.stop)
    model, (prompts, texts) = load_policy(folder, dtype="float32"), asked(shared)
    for prompt, some, said in zip(prompts, texts, hf.score(prompts, texts), strict=True):
        assert [len(known.written) for known in said] == [5, 0, 2]
        for text, known in zip(some, said, strict=True):
            if text:
                same(known, plain(model, shared, prompt, text))
                assert not np.isin(shared.ids[known.columns], GAP).any()
    assert [[known.columns.shape for known in one] for one in hf.score(prompts, [[()]] * 4)] == [[(0, TOP)]] * 4


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_says_the_same(hf: HFTeacher, folder: Path, shared: SharedVocabulary) -> None:
    need_vllm()
    from distill.vllm_teacher import VLLMTeacher

    other = VLLMTeacher(folder, ModelConfig(), RolloutConfig(), shared, top_k=TOP, temperature=HEAT, longest=32)
    prompts, texts = asked(shared)
    for mine, its in zip(hf.score(prompts, texts), other.score(prompts, texts), strict=True):
        for one, two in zip(mine, its, strict=True):
            same(one, two)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_the_loss_from_what_was_said(kind: Any, hf: HFTeacher, folder: Path, shared: SharedVocabulary) -> None:
    """Loss and gradient are those of the teacher in the same process, with items in texts and texts of any length."""
    student = load_policy(folder, dtype="float32")
    torch.manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    rng = np.random.default_rng(5)
    ids = torch.from_numpy(rng.choice(shared.ids, (6, 4 + 5)))
    mask = torch.ones_like(ids)
    mask[2, :2], mask[4, -2:], mask[5, -4:] = 0, 0, 0
    ids[1, 6], ids[3, 4] = int(GAP[0]), int(GAP[3])
    divergence = Divergence(kind, top_k=TOP)
    texts: list[list[Ids]] = []
    for row, item in enumerate([None, 2, None, 0, None, None]):
        written = int(mask[row, 4:].sum()) if item is None else item
        texts.append([tuple(ids[row, 4 : 4 + written].tolist())])
    prompts = [tuple(ids[row, :4][mask[row, :4].bool()].tolist()) for row in range(6)]
    said = [known for (known,) in hf.score(prompts, texts)]
    filled = [
        np.stack([np.concatenate([part, np.zeros((5 - len(part), *part.shape[1:]), part.dtype)]) for part in parts])
        for parts in ([known.columns for known in said], [k.logps for k in said], [k.written for k in said])
    ]
    told = Told(torch.from_numpy(filled[0]).long(), torch.from_numpy(filled[1]), torch.from_numpy(filled[2]))
    results = []
    for teacher in (Teacher.of(load_policy(folder, dtype="float32")), told):
        found = text_loss(
            student, teacher, ids, mask, 5, divergence=divergence, shared=shared, temperature=HEAT,
            item_tokens="punish",
        )  # fmt: skip
        gradient = torch.autograd.grad(found.loss, list(student.parameters()))
        results.append((found, torch.cat([part.flatten() for part in gradient])))
    (one, first), (two, second) = results
    assert float(two.loss.detach()) == pytest.approx(float(one.loss.detach()), rel=1e-5)
    assert two.tokens == one.tokens == 5 + 2 + 5 + 0 + 3 + 1 + 2
    assert two.item_tokens == one.item_tokens == pytest.approx(2 / 6)
    assert float((first - second).norm() / first.norm()) < 1e-5


@pytest.mark.ray
def test_many_act_as_one(ray_local: str, hf: HFTeacher, folder: Path, shared: SharedVocabulary) -> None:
    """Texts are spread over processes, asked for several times before the first answer; answers keep their order."""
    from distill.ray_teachers import Teachers
    from rollout.ray_fleet import FleetError

    rollout = RolloutConfig(engine="hf", cpus_per_engine=0.1, max_batch_prompts=3)
    distill = DistillConfig(
        every=1, teachers=2, gpus_per_teacher=0.0, divergence="top_k", top_k=TOP, temperature=HEAT, max_tokens=5
    )
    config = RunConfig(rollout=rollout, distill=distill)
    two = Teachers(folder, config, shared)
    prompts, texts = asked(shared)
    calls = two.ask(prompts[:3], texts[:3]) + two.ask(prompts[3:], texts[3:])
    assert len(calls) == 3
    for mine, its in zip(hf.score(prompts, texts), two.answers(calls), strict=True):
        for one, other in zip(mine, its, strict=True):
            same(one, other)
    with pytest.raises(FleetError, match="a teacher failed to start"):
        Teachers(folder / "nowhere", config, shared)
