"""The trie as a vLLM logits processor, for both of vLLM's model runners.

A request opts in by `SamplingParams(extra_args={"sidrl": n})`: the last n tokens of its prompt already belong to the
item, so that its first output token starts n levels below the trie's root (0 for a whole item, more for beams). More is
said by a mapping instead of n, see `Wish`. The trie itself is named once per engine, by
`additional_config={"sidrl_trie": folder}`, and mapped from that folder; a wish may name another one (a catalogue that
has changed), which then takes its place.

vLLM's V1 runner (CPU, and GPUs without V2) tells of rows that come, go and move; a row is a request. The V2 runner
(default on GPUs) reorders rows each step and keeps requests in slots. One class serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from rollout.allowed import mask_logits_
from rollout.support import TorchTrie
from rollout.trie import SidTrie
from rollout.views import Restriction, Views

OPT_IN = "sidrl"
TRIE_FOLDER = "sidrl_trie"


@dataclass(frozen=True)
class Wish:
    """What a request asks of the trie; `extra_args["sidrl"]` holds these as a mapping, or `prefix` alone.

    Attributes:
        prefix: item tokens that the prompt ends with.
        only: leaves that it may write, None for all.
        without: leaves that it may not write.
        items: items of its completion, all different.
        marks: tokens set between two of them.
        trie: folder of the trie, where it is not the engine's first.
        banned: for free text: the ranges [first, last + 1) of tokens that it may not hold; nothing else is asked then.
    """

    prefix: int = 0
    only: Sequence[int] | None = None
    without: Sequence[int] = ()
    items: int = 1
    marks: Sequence[int] = ()
    trie: str | None = None
    banned: Sequence[Sequence[int]] | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> Wish | None:
        """The wish of a request, None where it has none.

        Raises:
            ValueError: when it is no such thing.
        """
        value = (params.extra_args or {}).get(OPT_IN)
        if value is None:
            return None
        if value == 0 and type(value) is int:
            return WHOLE_ITEM
        known = {field.name for field in fields(cls)}
        mapping = isinstance(value, Mapping) and set(value) <= known
        wish = cls(**value) if mapping else cls(prefix=value)  # type: ignore[arg-type]
        if isinstance(wish.prefix, bool) or not isinstance(wish.prefix, int) or wish.prefix < 0 or wish.items < 1:
            raise ValueError(
                f"extra_args[{OPT_IN!r}] is the number of item tokens the prompt ends with, or a mapping of "
                f"{', '.join(sorted(known))}; got {value!r}"
            )
        return wish

    @property
    def plain(self) -> bool:
        """One item of the whole trie."""
        return self.only is None and not len(self.without) and self.items == 1


WHOLE_ITEM = Wish()

IN_PROCESS: dict[str, SidTrie] = {}
"""Tries of engines in this process by their folder: their arrays (of Ray's object store) need no second mapping."""


class TrieProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Leaves the children of each constrained request's node and nothing else; a dead prefix raises."""

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        """`runner` is `(device, is_pin_memory)` under V1 and `(req_states,)` under V2."""
        self.req_states = runner[0] if len(runner) == 1 else None
        self.device = runner[0].device if len(runner) == 1 else runner[0]
        # V1: constrained row -> item tokens that its prompt ends with, its live list of output tokens, its wish.
        self.rows: dict[int, tuple[Sequence[int], Sequence[int], Wish]] = {}
        # V2: the wish of each slot, and on the device the item tokens its prompt ends with (-1: no trie).
        self.slots: dict[int, Wish] = {}
        self.texts: dict[int, Wish] = {}
        self.prefix_len = torch.full((getattr(self.req_states, "max_num_reqs", 0),), -1, dtype=torch.long)
        self.first: str = vllm_config.additional_config[TRIE_FOLDER]
        self._serve(self.first)

    def _serve(self, folder: str) -> None:
        self.folder, self.trie = folder, IN_PROCESS.get(folder) or SidTrie.load(folder)
        self.torch_trie = TorchTrie(self.trie, self.device)

    def _follow(self, wishes: Iterable[Wish]) -> None:
        """Open the trie that the running requests name, if it is another one than before."""
        named = {wish.trie or self.first for wish in wishes} or {self.folder}
        if len(named) > 1:
            raise ValueError(f"requests of several tries are running at once: {sorted(named)}")
        if named - {self.folder}:
            self._serve(named.pop())

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError when the opt-in is none that is known."""
        Wish.of(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """The trie changes which token is the likeliest."""
        return False

    # V1 runner -------------------------------------------------------------------------------------------------------

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows that leave, enter and move."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, prompt_ids, output_ids in batch_update.added:
            self.rows.pop(row, None)
            wish, prompt = Wish.of(params), prompt_ids or []
            if wish is None:
                continue
            if wish.prefix > len(prompt):
                raise ValueError(f"a prompt of {len(prompt)} tokens cannot end with {wish.prefix} item tokens")
            self.rows[row] = (prompt[len(prompt) - wish.prefix :], output_ids, wish)
        self._follow(wish for _, _, wish in self.rows.values() if wish.banned is None)
        for source, target, direction in batch_update.moved:
            moved, displaced = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = displaced

    def apply(self, logits: torch.Tensor, ctx: LogitsContext | None = None) -> torch.Tensor:
        """Mask logits [B, V] in place."""
        return self._apply_v1(logits) if ctx is None else self._apply_v2(logits, ctx)

    def _apply_v1(self, logits: torch.Tensor) -> torch.Tensor:
        plain: dict[int, list[int]] = {}
        others: dict[int, list[int]] = {}
        for row, (prefix, output_ids, wish) in self.rows.items():
            if wish.banned is not None:
                _ban_row_(logits, row, wish)
                continue
            (plain if wish.plain else others).setdefault(len(prefix) + len(output_ids), []).append(row)
        for depth, rows in plain.items():
            if depth >= self.trie.depth:
                raise ValueError(
                    f"a constrained request of {self.trie.depth} tokens an item has written {depth} and asks for more"
                )
            nodes = np.zeros(len(rows), dtype=np.int64)
            if depth:
                written = np.array([[*self.rows[row][0], *self.rows[row][1]] for row in rows])
                for step in range(depth):
                    nodes = self.trie.advance(nodes, written[:, step])
            self._keep(logits, np.array(rows), nodes, depth)
        for position, rows in others.items():
            written = np.array([[*self.rows[row][0], *self.rows[row][1]] for row in rows], dtype=np.int64)
            wishes = [self.rows[row][2] for row in rows]
            self._keep_special(
                logits, torch.tensor(rows, device=logits.device), wishes, written.reshape(len(rows), position)
            )
        return logits

    def _keep(self, logits: torch.Tensor, rows: np.ndarray, nodes: np.ndarray, depth: int) -> None:
        """All but the children becomes -inf: in one pass on the CPU.

        Elsewhere their values are taken out, the rows filled, and the values put back.
        """
        if logits.device.type == "cpu" and logits.dtype == torch.float32:
            mask_logits_(self.trie, logits, rows, nodes)
            return
        row_ids = torch.from_numpy(rows).to(logits.device)
        if depth == 0:  # one support for all rows: the indices broadcast
            index = (row_ids[:, None], torch.from_numpy(self.trie.children(0)).to(logits.device)[None])
        else:
            tokens, offsets = self.trie.children_batch(nodes)
            owners = np.repeat(rows, np.diff(offsets))
            index = (torch.from_numpy(owners).to(logits.device), torch.from_numpy(tokens).to(logits.device))
        kept = logits[index]
        logits.index_fill_(0, row_ids, float("-inf"))
        logits[index] = kept

    def _keep_special(
        self, logits: torch.Tensor, row_ids: torch.Tensor, wishes: Sequence[Wish], written_NP: np.ndarray
    ) -> None:
        """The same for rows with views of the trie or slates, all of which have written as many tokens."""
        position, depth = written_NP.shape[1], self.trie.depth
        marks = np.array([wish.marks for wish in wishes], dtype=np.int64).reshape(len(wishes), -1)
        period = depth + marks.shape[1]
        item, level = divmod(position, period)
        if item >= min(wish.items for wish in wishes):
            raise ValueError(f"a constrained request has written {position} tokens and asks for more")
        if level >= depth:  # a mark is set, not chosen
            logits.index_fill_(0, row_ids, float("-inf"))
            logits[row_ids, torch.from_numpy(marks[:, level - depth]).to(logits.device)] = 0.0
            return
        views, view_N = self._views(wishes)
        if item:
            taken = [written_NP[:, start : start + depth] for start in range(0, item * period, period)]
            leaves_NK = np.stack([self.trie.walk(tokens)[:, -1] for tokens in taken], axis=1)
            views = views.without(view_N, leaves_NK)
            view_N = np.arange(1, len(wishes) + 1)
        shown = self.torch_trie.under(views)
        place_N = torch.from_numpy(view_N * self.trie.num_nodes).to(logits.device)
        written = torch.from_numpy(written_NP[:, item * period :]).to(logits.device)
        for step in range(level):
            place_N = shown.find(place_N, written[:, step], step)
        if bool((place_N < 0).any()):
            raise ValueError("a constrained request left its view of the trie")
        self._keep_children(logits, row_ids, shown, place_N, level + 1)

    @staticmethod
    def _keep_children(
        logits: torch.Tensor, row_ids: torch.Tensor, trie: TorchTrie, place_N: torch.Tensor, depth: int | None = None
    ) -> None:
        child_NC, _ = trie.children(place_N)
        tokens_NC = trie.tokens(child_NC, depth)
        # Padded entries repeat a real child with its own value, so writing them twice changes nothing.
        kept = logits[row_ids[:, None], tokens_NC]
        logits.index_fill_(0, row_ids, float("-inf"))
        logits[row_ids[:, None], tokens_NC] = kept

    def _views(self, wishes: Sequence[Wish]) -> tuple[Views, np.ndarray]:
        """Views of rows; rollouts of one prompt share theirs."""
        number: dict[tuple[int, int], int] = {}
        restrictions: list[Restriction] = []
        view_N = np.zeros(len(wishes), dtype=np.int64)
        for row, wish in enumerate(wishes):
            key = (id(wish.only), id(wish.without))  # requests of a group come with the same lists
            if key not in number:
                number[key] = len(restrictions) + 1
                only = None if wish.only is None else np.array(wish.only, dtype=np.int64)
                restrictions.append(Restriction(only, wish.without))
            view_N[row] = number[key]
        return Views.build(self.trie, restrictions), view_N

    # V2 runner -------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note what the request of this slot asks of the trie."""
        wish = Wish.of(sampling_params)
        self.slots.pop(req_idx, None)
        self.texts.pop(req_idx, None)
        self.prefix_len[req_idx] = -1 if wish is None or wish.banned is not None else wish.prefix
        if wish is not None:
            (self.slots if wish.banned is None else self.texts)[req_idx] = wish
        return wish is not None

    def _apply_v2(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        assert self.req_states is not None
        slots = ctx.expanded_idx_mapping.long()
        if self.texts:
            for row, slot in enumerate(slots.tolist()):
                if slot in self.texts:
                    _ban_row_(logits, row, self.texts[slot])
        prefix_len = self.prefix_len.to(slots.device)[slots]
        row_ids = (prefix_len >= 0).nonzero()[:, 0]
        if not len(row_ids):
            return logits
        slots = slots[row_ids]
        if self.folder != self.first or any(wish.trie for wish in self.slots.values()):
            self._follow(self.slots[slot] for slot in slots.tolist())
        item_start = self.req_states.prompt_len.gpu[slots].long() - prefix_len[row_ids]
        written = ctx.pos[row_ids].long() + 1 - item_start
        if not all(wish.plain for wish in self.slots.values()):
            plain = torch.tensor([self.slots[slot].plain for slot in slots.tolist()], device=slots.device)
            for position in written[~plain].unique().tolist():
                some = (~plain & (written == position)).nonzero()[:, 0]
                steps = item_start[some][:, None] + torch.arange(position, device=slots.device)
                tokens = self.req_states.all_token_ids.gpu[slots[some][:, None], steps]
                wishes = [self.slots[slot] for slot in slots[some].tolist()]
                self._keep_special(logits, row_ids[some], wishes, tokens.cpu().numpy().astype(np.int64))
            slots, item_start, written, row_ids = (one[plain] for one in (slots, item_start, written, row_ids))
            if not len(row_ids):
                return logits
        nodes = torch.zeros_like(slots)
        for step in range(self.trie.depth):
            place = (item_start + step).clamp(max=self.req_states.all_token_ids.gpu.shape[1] - 1)
            tokens = self.req_states.all_token_ids.gpu[slots, place].long()
            nodes = torch.where(step < written, self.torch_trie.find(nodes, tokens, step), nodes)
        done = written >= self.trie.depth
        if bool((done | (nodes < 0)).any()):
            raise ValueError("a constrained request left the trie, or asks for more tokens than an item has")
        self._keep_children(logits, row_ids, self.torch_trie, nodes)
        return logits


def _ban_row_(logits: torch.Tensor, row: int, wish: Wish) -> None:
    """Take from a row of free text what it may not hold, a few slices."""
    for first, stop in wish.banned or ():
        logits[row, first:stop] = float("-inf")
