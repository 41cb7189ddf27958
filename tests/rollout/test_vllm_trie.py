"""The trie as a logits processor, under both of vLLM's interfaces, driven by hand: no engine, no model.

Every step is compared with a mask from Python sets: legal logits untouched, the others -inf, other rows untouched.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollout.trie import SidTrie
from tests.conftest import need_vllm
from tests.oracle import Path_, legal_next

pytestmark = pytest.mark.vllm  # importing vLLM takes seconds

VOCAB, LEVELS = 30, 3
SLOTS, MAX_LEN = 9, 16
CODES = np.random.default_rng(0).integers(0, 8, (40, LEVELS))
PATHS: list[Path_] = sorted(
    {tuple(path) for path in (CODES + np.array([0, 8, 14])).tolist()}
)  # levels 2 and 3 share ids


@pytest.fixture(scope="module")
def lib() -> SimpleNamespace:
    """What is used of vLLM and of the processor's module."""
    need_vllm()
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    from rollout.vllm_trie import OPT_IN, TRIE_FOLDER, TrieProcessor

    return SimpleNamespace(
        TrieProcessor=TrieProcessor,
        config=TRIE_FOLDER,
        params=lambda prefix: SamplingParams(extra_args=None if prefix is None else {OPT_IN: prefix}),
        other_params=SamplingParams(extra_args={"not ours": 2}),
        BatchUpdate=BatchUpdate,
        one_way=MoveDirectionality.UNIDIRECTIONAL,
        swap=MoveDirectionality.SWAP,
        LogitsContext=LogitsContext,
    )


@pytest.fixture(scope="module")
def config(lib: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The part of vLLM's configuration that names the trie."""
    folder = tmp_path_factory.mktemp("trie")
    SidTrie.from_paths(PATHS, VOCAB).save(folder)
    return SimpleNamespace(additional_config={lib.config: str(folder)})


@dataclass
class Request:
    """A request as vLLM would hold it. `prefix` None: not constrained."""

    prompt: list[int]
    prefix: int | None
    outputs: list[int] = field(default_factory=list)

    @classmethod
    def random(cls, rng: np.random.Generator) -> Request:
        prefix = None if rng.random() < 0.3 else int(rng.integers(0, LEVELS))
        path = PATHS[int(rng.integers(len(PATHS)))]
        text = rng.integers(0, VOCAB, int(rng.integers(0 if prefix else 1, 6))).tolist()
        return cls([*text, *path[: prefix or 0]], prefix)

    @property
    def item(self) -> Path_:
        """Tokens of the item so far."""
        assert self.prefix is not None
        return (*self.prompt[len(self.prompt) - self.prefix :], *self.outputs)

    @property
    def done(self) -> bool:
        return len(self.outputs) + (self.prefix or 0) >= LEVELS

    def write(self, rng: np.random.Generator) -> None:
        options = range(VOCAB) if self.prefix is None else legal_next(PATHS, self.item)
        self.outputs.append(int(rng.choice(options)))


def expected(logits_BV: torch.Tensor, requests: Sequence[Request | None]) -> torch.Tensor:
    """The masked logits; None is a row of nobody."""
    result = logits_BV.clone()
    for row, request in enumerate(requests):
        if request is not None and request.prefix is not None:
            mask = torch.full((VOCAB,), float("-inf"))
            legal = legal_next(PATHS, request.item)
            mask[legal] = logits_BV[row, legal]
            result[row] = mask
    return result


# --- V1: rows that come, go and move


class V1:
    """A processor built for V1, with short ways to tell it what happened."""

    def __init__(self, lib: SimpleNamespace, config: SimpleNamespace) -> None:
        self.lib = lib
        self.processor = lib.TrieProcessor(config, torch.device("cpu"), False)

    def update(
        self,
        removed: Sequence[int] = (),
        added: Sequence[tuple[int, Request]] = (),
        moved: Sequence[tuple[int, int, Any]] = (),
    ) -> None:
        news = [(row, self.lib.params(r.prefix), r.prompt, r.outputs) for row, r in added]
        self.processor.update_state(self.lib.BatchUpdate(SLOTS, removed, news, moved))

    def check(self, requests: Sequence[Request | None], seed: int = 0) -> None:
        logits_BV = torch.randn((len(requests), VOCAB), generator=torch.Generator().manual_seed(seed))
        wanted = expected(logits_BV, requests)
        assert torch.equal(self.processor.apply(logits_BV), wanted)


@pytest.fixture
def v1(lib: SimpleNamespace, config: SimpleNamespace) -> V1:
    return V1(lib, config)


def request(*outputs: int, prompt: Sequence[int] = (1, 2), prefix: int | None = 0) -> Request:
    return Request(list(prompt), prefix, list(outputs))


def test_v1_follows_the_live_outputs(v1: V1) -> None:
    """vLLM appends to the list it handed over and says nothing; `update_state(None)` means no change."""
    one, free = request(), request(prefix=None)
    v1.update(added=[(0, one), (2, free)])
    v1.check([one, None, free])
    for token in PATHS[7][:2]:
        one.outputs.append(token)
        free.outputs.append(3)
        v1.processor.update_state(None)
        v1.check([one, None, free])


def test_v1_prompts_that_end_within_an_item(v1: V1) -> None:
    first, second, _ = PATHS[5]
    requests = [
        request(prompt=[9, first], prefix=1),
        request(prompt=[first, second], prefix=2),  # the prompt is the prefix
        request(second, prompt=[9, 9, first], prefix=1),  # one token given, one written
        request(first, prompt=[first, second], prefix=0),  # what looks like an item in the prompt is history
    ]
    v1.update(added=list(enumerate(requests)))
    v1.check(requests)


def test_v1_removed_rows_are_free(v1: V1) -> None:
    one, two = request(), request(PATHS[0][0])
    v1.update(added=[(0, one), (1, two)])
    v1.update(removed=[0])
    v1.check([None, two])
    free = request(prefix=None)
    v1.update(added=[(1, free)])  # replaced without having been removed
    v1.check([None, free])
    v1.update(removed=[1], added=[(1, one)])
    v1.check([None, one])


def test_v1_moves(v1: V1, lib: SimpleNamespace) -> None:
    one, two, free = request(PATHS[0][0]), request(*PATHS[9][:2]), request(prefix=None)
    v1.update(added=[(0, one), (1, two), (2, free)])
    v1.update(moved=[(0, 1, lib.swap)])
    v1.check([two, one, free])
    v1.update(moved=[(1, 2, lib.swap)])  # constrained against free
    v1.check([two, free, one])
    v1.update(moved=[(1, 0, lib.swap), (0, 2, lib.swap)])
    v1.check([one, two, free])
    v1.update(removed=[0], moved=[(1, 0, lib.one_way)])  # the batch closes up
    v1.check([two, None, free])
    v1.update(moved=[(2, 0, lib.one_way)])  # a free request onto a constrained row
    v1.check([free, None, None])
    v1.update(added=[(1, one)], moved=[(1, 4, lib.one_way)])
    v1.check([free, None, None, None, one])
    v1.update(moved=[(4, 3, lib.swap)])  # with an empty row
    v1.check([free, None, None, one, None])


@pytest.mark.parametrize("seed", range(8))
def test_v1_through_a_random_life(v1: V1, lib: SimpleNamespace, seed: int) -> None:
    """A persistent batch as vLLM keeps it, for 40 steps: requests end, others take their rows, the batch closes up."""
    rng = np.random.default_rng(seed)
    rows: list[Request | None] = [None] * SLOTS
    masked = 0
    for step in range(40):
        removed = [row for row, r in enumerate(rows) if r and (r.done or rng.random() < 0.1)]
        for row in removed:
            rows[row] = None
        added = []
        for row in [row for row, r in enumerate(rows) if r is None]:
            if rng.random() < 0.4:
                rows[row] = new = Request.random(rng)
                added.append((row, new))
                if row in removed and rng.random() < 0.5:
                    removed.remove(row)  # vLLM leaves out removals of rows that are taken again
        moved = []
        while None in rows and any(rows[rows.index(None) :]) and rng.random() < 0.8:
            target, source = rows.index(None), max(row for row, r in enumerate(rows) if r)
            rows[target], rows[source] = rows[source], None
            moved.append((source, target, lib.one_way))
        for _ in range(int(rng.integers(0, 3))):
            a, b = (int(row) for row in rng.choice(SLOTS, 2, replace=False))
            rows[a], rows[b] = rows[b], rows[a]
            moved.append((a, b, lib.swap))
        if removed or added or moved:
            v1.update(removed, added, moved)
        else:
            v1.processor.update_state(None)
        v1.check(rows, seed=step)
        for r in rows:
            if r:
                masked += r.prefix is not None
                r.write(rng)
    assert masked > 40


@pytest.mark.parametrize(
    "bad",
    [
        request(29),  # no item begins with it
        request(PATHS[0][0], 0),  # a token of another level
        request(prompt=[29], prefix=1),
        request(*PATHS[0][:2], prompt=[4, 29], prefix=1),
    ],
)
def test_v1_a_dead_prefix_raises(v1: V1, bad: Request) -> None:
    v1.update(added=[(0, request()), (1, bad)])
    with pytest.raises(ValueError, match=r"does not follow node|has written"):
        v1.processor.apply(torch.zeros(2, VOCAB))


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_v1_more_tokens_than_an_item_has_raise(v1: V1, prefix: int) -> None:
    path = PATHS[3]
    v1.update(added=[(0, request(*path[prefix:], prompt=[7, *path[:prefix]], prefix=prefix))])
    with pytest.raises(ValueError, match="3 tokens an item has written 3 and asks for more"):
        v1.processor.apply(torch.zeros(1, VOCAB))


def test_v1_a_prefix_longer_than_the_prompt_raises(v1: V1) -> None:
    with pytest.raises(ValueError, match="cannot end with 2 item tokens"):
        v1.update(added=[(0, request(prompt=[PATHS[0][0]], prefix=2))])


def test_v1_leaves_foreign_requests_alone(v1: V1, lib: SimpleNamespace) -> None:
    v1.processor.update_state(lib.BatchUpdate(1, [], [(0, lib.other_params, [1], [])], []))
    v1.check([request(prefix=None)])


# --- V2: requests in slots, rows in any order


class V2:
    """A processor built for V2 over tensors as the model runner keeps them; free space holds stale tokens."""

    def __init__(self, lib: SimpleNamespace, config: SimpleNamespace) -> None:
        self.lib, self.rng = lib, np.random.default_rng(5)
        self.tokens = torch.from_numpy(self.rng.integers(0, VOCAB, (SLOTS, MAX_LEN), dtype=np.int32))
        self.prompt_len = torch.zeros(SLOTS, dtype=torch.int32)
        states = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=SLOTS,
            vocab_size=VOCAB,
            all_token_ids=SimpleNamespace(gpu=self.tokens),
            prompt_len=SimpleNamespace(gpu=self.prompt_len),
        )
        self.processor = lib.TrieProcessor(config, states)

    def add(self, slot: int, new: Request) -> None:
        self.prompt_len[slot] = len(new.prompt)
        assert self.processor.add_request(slot, self.lib.params(new.prefix)) == (new.prefix is not None)
        self.processor.apply_staged_writes()

    def apply(self, rows: Sequence[tuple[int, Request]], logits_BV: torch.Tensor) -> torch.Tensor:
        for slot, r in rows:
            text = torch.tensor([*r.prompt, *r.outputs], dtype=torch.int32)
            self.tokens[slot, : len(text)] = text
        slots = torch.tensor([slot for slot, _ in rows], dtype=torch.int32)
        lengths = torch.tensor([len(r.prompt) + len(r.outputs) for _, r in rows])
        context = self.lib.LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_local_pos=torch.zeros(len(rows), dtype=torch.int32),
            input_ids=torch.tensor([[*r.prompt, *r.outputs][-1] for _, r in rows], dtype=torch.int32),
            pos=lengths - 1,
            seq_lens_upper_bound_np=lengths.numpy().astype(np.int32),
        )
        return self.processor.apply(logits_BV, context)

    def check(self, rows: Sequence[tuple[int, Request]], seed: int = 0) -> None:
        logits_BV = torch.randn((len(rows), VOCAB), generator=torch.Generator().manual_seed(seed))
        wanted = expected(logits_BV, [r for _, r in rows])
        assert torch.equal(self.apply(rows, logits_BV), wanted)


@pytest.fixture
def v2(lib: SimpleNamespace, config: SimpleNamespace) -> V2:
    return V2(lib, config)


@pytest.mark.parametrize("seed", range(8))
def test_v2_through_a_random_life(v2: V2, seed: int) -> None:
    """Slots are used again, rows are shuffled each step and leave some requests out, free requests stand between."""
    rng = np.random.default_rng(seed)
    slots: list[Request | None] = [None] * SLOTS
    masked = 0
    for step in range(40):
        for slot, r in enumerate(slots):
            if r is None or r.done or rng.random() < 0.1:
                slots[slot] = None
                if rng.random() < 0.6:
                    slots[slot] = new = Request.random(rng)
                    v2.add(slot, new)
        active = [(slot, r) for slot, r in enumerate(slots) if r and rng.random() < 0.8]
        rows = [active[index] for index in rng.permutation(len(active))]
        if not rows:
            continue
        v2.check(rows, seed=step)
        for _, r in rows:
            masked += r.prefix is not None
            r.write(rng)
    assert masked > 40


def test_v2_only_free_requests(v2: V2) -> None:
    free = request(prefix=None)
    v2.add(3, free)
    v2.check([(3, free)])
    # A slot that a constrained request had, and the other way round.
    one = request()
    v2.add(3, one)
    v2.check([(3, one)])
    v2.add(3, free)
    v2.check([(3, free)])


def test_v2_prompts_that_end_within_an_item(v2: V2) -> None:
    first, second, _ = PATHS[5]
    requests = [
        request(prompt=[9, first], prefix=1),
        request(prompt=[first, second], prefix=2),
        request(second, prompt=[9, 9, first], prefix=1),
        request(first, prompt=[first, second], prefix=0),
    ]
    for slot, r in enumerate(requests):
        v2.add(slot, r)
    v2.check(list(enumerate(requests)))


@pytest.mark.parametrize(
    "bad",
    [
        request(29),
        request(PATHS[0][0], 0),
        request(prompt=[29], prefix=1),
        request(*PATHS[3]),  # an item is written, and more is asked for
        request(*PATHS[3], 1),
        request(prompt=[7, *PATHS[3]], prefix=3),
    ],
)
def test_v2_dead_prefixes_and_too_many_tokens_raise(v2: V2, bad: Request) -> None:
    good = request()
    v2.add(0, good)
    v2.add(4, bad)
    with pytest.raises(ValueError, match="left the trie, or asks for more tokens"):
        v2.apply([(4, bad), (0, good)], torch.zeros(2, VOCAB))


def test_v2_at_the_end_of_the_longest_sequence(v2: V2) -> None:
    """The item's last token would be the last place of the slot: reading ahead must not leave the tensor."""
    late = request(*PATHS[2][:2], prompt=[1] * (MAX_LEN - 3))
    v2.add(8, late)
    v2.check([(8, late)])
    early = request(prompt=[1] * MAX_LEN)
    v2.add(7, early)
    v2.check([(7, early), (8, late)])


# --- both


def test_one_step_is_the_same_under_both(v1: V1, v2: V2) -> None:
    rng = np.random.default_rng(3)
    requests = [Request.random(rng) for _ in range(SLOTS)]
    for r in requests:
        while rng.random() < 0.5 and len(r.outputs) + (r.prefix or 0) < LEVELS - 1:
            r.write(rng)
    v1.update(added=list(enumerate(requests)))
    for slot, r in enumerate(requests):
        v2.add(slot, r)
    logits_BV = torch.randn((SLOTS, VOCAB), generator=torch.Generator().manual_seed(1))
    assert torch.equal(v1.processor.apply(logits_BV.clone()), v2.apply(list(enumerate(requests)), logits_BV.clone()))


@pytest.mark.parametrize("value", [-1, True, False, "1", 1.0, [0]])
def test_validate_params_refuses(lib: SimpleNamespace, value: Any) -> None:
    with pytest.raises(ValueError, match="number of item tokens the prompt ends with"):
        lib.TrieProcessor.validate_params(lib.params(value))


@pytest.mark.parametrize("value", [None, 0, 1, 2])
def test_validate_params_accepts(lib: SimpleNamespace, value: Any) -> None:
    lib.TrieProcessor.validate_params(lib.params(value))
    lib.TrieProcessor.validate_params(lib.other_params)


def test_a_missing_trie_is_named(lib: SimpleNamespace, tmp_path: Path) -> None:
    config = SimpleNamespace(additional_config={lib.config: str(tmp_path / "gone")})
    with pytest.raises(ValueError, match="gone is not a saved trie"):
        lib.TrieProcessor(config, torch.device("cpu"), False)


def test_it_changes_the_argmax(v1: V1) -> None:
    """Greedy requests must not skip it."""
    assert v1.processor.is_argmax_invariant() is False
