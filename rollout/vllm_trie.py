"""The trie as a vLLM logits processor, for both of vLLM's model runners.

A request opts in by `SamplingParams(extra_args={"sidrl": n})`: the last n tokens of its prompt already belong to the
item, so that its first output token starts n levels below the trie's root (0 for a whole item, more for beams). The
trie itself is named once per engine, by `additional_config={"sidrl_trie": folder}`, and mapped from that folder.

vLLM's V1 runner (CPU, and GPUs without V2) tells of rows that come, go and move; a row is a request. The V2 runner
(default on GPUs) reorders rows each step and keeps requests in slots. One class serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
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

OPT_IN = "sidrl"
TRIE_FOLDER = "sidrl_trie"


class TrieProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Leaves the children of each constrained request's node and nothing else; a dead prefix raises."""

    def __init__(self, vllm_config: Any, *runner: Any) -> None:
        """`runner` is `(device, is_pin_memory)` under V1 and `(req_states,)` under V2."""
        self.trie = SidTrie.load(vllm_config.additional_config[TRIE_FOLDER])
        if len(runner) == 2:
            # Constrained row -> item tokens that its prompt ends with, and its live list of output tokens.
            self.rows: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        else:
            self.req_states = runner[0]
            self.torch_trie = TorchTrie(self.trie, self.req_states.device)
            # Per slot: item tokens that the prompt ends with, -1 for a request without a trie.
            self.prefix_len = torch.full((self.req_states.max_num_reqs,), -1, dtype=torch.long)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError when the opt-in is not a number of tokens."""
        value = _prefix_length(sampling_params)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ValueError(f"extra_args[{OPT_IN!r}] is the number of item tokens the prompt ends with, got {value!r}")

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
            length = _prefix_length(params)
            if length is not None and length > len(prompt_ids or []):
                raise ValueError(f"a prompt of {len(prompt_ids or [])} tokens cannot end with {length} item tokens")
            if length is not None:
                self.rows[row] = ((prompt_ids or [])[-length:] if length else [], output_ids)
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
        by_depth: dict[int, list[int]] = {}
        for row, (prefix, output_ids) in self.rows.items():
            by_depth.setdefault(len(prefix) + len(output_ids), []).append(row)
        for depth, rows in by_depth.items():
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

    # V2 runner -------------------------------------------------------------------------------------------------------

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note whether the request of this slot is constrained."""
        length = _prefix_length(sampling_params)
        self.prefix_len[req_idx] = -1 if length is None else length
        return length is not None

    def _apply_v2(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots = ctx.expanded_idx_mapping.long()
        prefix_len = self.prefix_len.to(slots.device)[slots]
        row_ids = (prefix_len >= 0).nonzero()[:, 0]
        if not len(row_ids):
            return logits
        slots = slots[row_ids]
        item_start = self.req_states.prompt_len.gpu[slots].long() - prefix_len[row_ids]
        written = ctx.pos[row_ids].long() + 1 - item_start
        nodes = torch.zeros_like(slots)
        for step in range(self.trie.depth):
            place = (item_start + step).clamp(max=self.req_states.all_token_ids.gpu.shape[1] - 1)
            tokens = self.req_states.all_token_ids.gpu[slots, place].long()
            nodes = torch.where(step < written, self.torch_trie.find(nodes, tokens), nodes)
        done = written >= self.trie.depth
        if bool((done | (nodes < 0)).any()):
            raise ValueError("a constrained request left the trie, or asks for more tokens than an item has")
        child_NC, _ = self.torch_trie.children(nodes)
        tokens_NC = self.torch_trie.token_of[child_NC]
        # Padded entries repeat a real child with its own value, so writing them twice changes nothing.
        kept = logits[row_ids[:, None], tokens_NC]
        logits.index_fill_(0, row_ids, float("-inf"))
        logits[row_ids[:, None], tokens_NC] = kept
        return logits


def _prefix_length(params: SamplingParams) -> Any:
    return (params.extra_args or {}).get(OPT_IN)
