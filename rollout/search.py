"""Search under the trie: independent draws, beams, draws without replacement, and free text, on a Hugging Face model.

Beams and draws without replacement are one search, `widen`, which any engine can feed with log-probabilities.

Axes: B prompts, W branches per prompt, L levels, V vocabulary, C children, N rows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from rollout.support import TorchTrie, ban_
from rollout.thought import Text
from rollout.tree_decoder import TreeDecoder
from rollout.types import Prompted, Sample, Sampling
from rollout.views import Views


def sample_seed(seed: int, sample: Prompted) -> int:
    """A 63-bit seed of one sample's draws: the same however the samples are ordered or spread over engines."""
    digest = hashlib.blake2b(f"{seed}/{sample.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    trie: TorchTrie,
    samples: Sequence[Sample],
    sampling: Sampling,
    views: Views | None = None,
    marks: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Independent draws (or the greedy path) of `sampling.items` items per branch, with `marks` between them.

    Args:
        model: the policy.
        trie: the whole catalogue.
        samples: prompts.
        sampling: how to draw.
        views: what each sample may recommend, as views 1, 2, …
        marks: tokens set between the items of a slate.

    Returns:
        tokens int64 [B, W, T] and their log-probabilities float32 [B, W, T] on the support they were drawn from.
    """
    batch, width, depth = len(samples), sampling.group_size, trie.trie.depth
    decoder = TreeDecoder(model, [sample.prompt_ids for sample in samples])
    uniforms = [_uniforms(sampling, sample, depth) for sample in samples]
    uniforms_BWT = torch.from_numpy(np.stack(uniforms)).to(trie.device)
    view_N = np.repeat(np.arange(1, batch + 1) if views else np.zeros(batch, dtype=np.int64), width)
    row_N = torch.arange(batch, device=trie.device).repeat_interleave(width)
    leaves_NK = np.zeros((batch * width, 0), dtype=np.int64)
    tokens, logps = [], []

    def extend(token_N: torch.Tensor, logp_N: torch.Tensor) -> torch.Tensor:
        """Write a token on every branch; the hidden states [N, D] after it."""
        parents_BW = torch.arange(width, device=trie.device).expand(batch, -1)
        tokens.append(token_N.view(batch, width))
        logps.append(logp_N.view(batch, width))
        if len(tokens) == sampling.items * depth + (sampling.items - 1) * len(marks):
            return hidden_ND
        return decoder.extend(tokens[-1], parents_BW if len(tokens) > 1 else 0 * parents_BW).flatten(0, 1)

    hidden_ND = decoder.prefill()
    for item in range(sampling.items):
        shown, place_N = trie.under(views), torch.from_numpy(view_N).to(trie.device) * trie.trie.num_nodes
        if item:  # what the slate holds already is gone
            for mark in marks:
                hidden_ND = extend(torch.full_like(row_N, mark), torch.zeros(len(row_N), device=trie.device))
            left = (views or Views.build(trie.trie, [])).without(view_N, leaves_NK)
            shown, place_N = trie.under(left), torch.from_numpy(left.roots_V[1:]).to(trie.device)
        for level in range(depth):
            first = not tokens  # branches of a prompt start from the same logits
            at_N = place_N[::width] if first else place_N
            if sampling.constrained:
                logps_NC, child_NC = decoder.child_logps(shown, level, hidden_ND, at_N, sampling.temperature)
            else:
                logps_NC, child_NC = (decoder.logits(hidden_ND) / sampling.temperature).log_softmax(dim=-1), None
            logps_NC = nucleus(logps_NC, sampling.top_p)
            if first:
                logps_NC, child_NC = logps_NC[row_N], None if child_NC is None else child_NC[row_N]
            if sampling.sampler == "greedy":
                index_N1 = logps_NC.argmax(dim=-1, keepdim=True)
            else:  # inverse transform sampling: one uniform a token, in float64 so that wide supports lose no mass
                cumulative = logps_NC.double().exp().cumsum(dim=-1)
                threshold = uniforms_BWT[:, :, item * depth + level].reshape(-1, 1) * cumulative[:, -1:]
                index_N1 = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
            token_N = index_N1[:, 0]
            if child_NC is not None:
                place_N = child_NC.gather(1, index_N1)[:, 0]
                token_N = shown.tokens(place_N, level + 1)
            hidden_ND = extend(token_N, logps_NC.gather(1, index_N1)[:, 0])
        leaves_NK = np.concatenate([leaves_NK, shown.nodes(place_N).cpu().numpy()[:, None]], axis=1)
    return torch.stack(tokens, dim=2).cpu().numpy(), torch.stack(logps, dim=2).cpu().numpy()


def nucleus(logps_NC: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probabilities of the fewest likeliest entries that hold `top_p` of the mass, -inf for the others.

    Top-p sampling (Holtzman et al., arXiv 1904.09751): an entry stays while those above it hold less than `top_p`.
    """
    if top_p == 1.0:
        return logps_NC
    ordered_NC, order_NC = logps_NC.sort(dim=-1, descending=True)
    above_NC = ordered_NC.exp().cumsum(dim=-1) - ordered_NC.exp()
    gone_NC = torch.zeros_like(logps_NC, dtype=torch.bool).scatter(1, order_NC, above_NC >= top_p)
    return logps_NC.masked_fill(gone_NC, float("-inf")).log_softmax(dim=-1)


def _uniforms(sampling: Sampling, sample: Sample, depth: int) -> np.ndarray:
    rng = np.random.default_rng(sample_seed(sampling.seed, sample))
    return rng.random((sampling.group_size, sampling.items * depth))


@torch.no_grad()
def beam(
    model: PreTrainedModel,
    trie: TorchTrie,
    prompts: Sequence[Sequence[int]],
    width: int,
    temperature: float = 1.0,
    views: Views | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The `width` most likely distinct items of the constrained policy that a beam of this width finds, best first.

    `views` 1, 2, … say what each prompt may recommend.

    Returns:
        leaf nodes int64 [B, W], -1 where the catalogue has fewer items, and log-probabilities float32 [B, W, L] of each
        item's tokens.
    """
    shown = trie.under(views)
    return likeliest(_expander(model, shown, prompts, temperature), shown, roots(views, len(prompts)), width)


@torch.no_grad()
def draw_distinct(
    model: PreTrainedModel, trie: TorchTrie, samples: Sequence[Sample], sampling: Sampling, views: Views | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`sampling.group_size` distinct items drawn without replacement, in drawn order; see `distinct`.

    Returns:
        leaf nodes int64 [B, W] (-1 where the catalogue has fewer items), log-probabilities float32 [B, W, L] of each
        item's tokens, and log inclusion probabilities float64 [B, W].
    """
    prompts, shown = [sample.prompt_ids for sample in samples], trie.under(views)
    expand = _expander(model, shown, prompts, sampling.temperature)
    return distinct(expand, shown, roots(views, len(samples)), samples, sampling.group_size, sampling.seed)


def roots(views: Views | None, batch: int) -> torch.Tensor:
    """Where each sample's item starts: the root of its view [B]."""
    return torch.zeros(batch, dtype=torch.long) if views is None else torch.from_numpy(views.roots_V[1:])


Expander = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(places [B, W], parents [B, W], alive [B, W]) -> log-probabilities [B·W, C] of the children, and the children.

`parents` says which branch of the last call each place continues; branches that are not alive may give anything.
"""


@dataclass(frozen=True)
class Found:
    """What a search came back with.

    Attributes:
        leaves_BW: leaf nodes, best key first; -1 where there are fewer items.
        logps_BWL: log-probabilities of each item's tokens.
        keys_BW: what they were ranked by.
    """

    leaves_BW: np.ndarray
    logps_BWL: np.ndarray
    keys_BW: np.ndarray


def widen(
    expand: Expander,
    trie: TorchTrie,
    start_B: torch.Tensor,
    root_B1: torch.Tensor,
    width: int,
    rank: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Found:
    """Level by level, keep the `width` branches of highest key.

    Args:
        expand: gives the log-probabilities of children.
        trie: the catalogue.
        start_B: the place each prompt starts at.
        root_B1: key of each prompt's root, float64.
        width: branches to keep.
        rank: (log-probabilities of the children's paths [B, W, C], keys of their parents [B, W]) -> keys [B, W, C].
    """
    batch, device, keys_BW = len(root_B1), root_B1.device, root_B1
    places_BW = start_B.to(device)[:, None]
    scores_BW = torch.zeros((batch, 1), device=device)
    history_BWL = torch.zeros((batch, 1, 0), device=device)
    parents_BW = torch.zeros((batch, 1), dtype=torch.long, device=device)
    for _ in range(trie.trie.depth):
        now = places_BW.shape[1]
        logps_NC, child_NC = expand(places_BW, parents_BW, scores_BW.isfinite())
        wide = logps_NC.shape[1]
        total_BWC = scores_BW[:, :, None] + logps_NC.view(batch, now, wide)
        all_keys = rank(total_BWC, keys_BW).reshape(batch, -1)
        keys_BW, flat_BW = all_keys.topk(min(width, all_keys.shape[1]), dim=1)
        # Places beyond the last legal path carry -inf: drop them where no prompt needs them, mark them at the end.
        needed = max(int(keys_BW.isfinite().sum(dim=1).max()), 1)
        keys_BW, flat_BW = keys_BW[:, :needed].double(), flat_BW[:, :needed]
        scores_BW = total_BWC.view(batch, -1).gather(1, flat_BW)
        step_BW = logps_NC.view(batch, -1).gather(1, flat_BW)
        places_BW = child_NC.view(batch, -1).gather(1, flat_BW)
        parents_BW = flat_BW // wide
        past = history_BWL.gather(1, parents_BW[:, :, None].expand(-1, -1, history_BWL.shape[2]))
        history_BWL = torch.cat([past, step_BW[:, :, None]], dim=2)
    leaves = torch.where(scores_BW.isfinite(), trie.nodes(places_BW), -1)
    return Found(leaves.cpu().numpy(), history_BWL.cpu().numpy(), keys_BW.cpu().numpy())


def likeliest(expand: Expander, trie: TorchTrie, start_B: torch.Tensor, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Beam search: leaf nodes [B, W] and log-probabilities of tokens [B, W, L], likeliest first."""
    root_B1 = torch.zeros((len(start_B), 1), dtype=torch.float64, device=trie.device)
    found = widen(expand, trie, start_B, root_B1, width, lambda total_BWC, _: total_BWC)
    return found.leaves_BW, found.logps_BWL


def distinct(
    expand: Expander, trie: TorchTrie, start_B: torch.Tensor, samples: Sequence[Sample], width: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items without replacement: stochastic beam search, Gumbel-top-k over the trie (Kool et al., arXiv 1903.06059).

    Each item's log-probability is perturbed by Gumbel noise, and the `width` largest are kept: exactly draws one after
    the other from what is left, likeliest first to appear. The noise of an inner node is the maximum of its leaves', so
    children are drawn given that maximum (appendix B.3 there), and only branches that can win are ever looked at.

    An item is among the drawn ones, given the largest perturbed value κ that was not, with probability
    q = 1 - exp(-exp(log p - κ)); Σ p / q · f over the drawn items is an unbiased estimate of Σ p · f over all (eq. 12).

    Returns:
        leaf nodes [B, W], log-probabilities of tokens [B, W, L] and log q [B, W], all in drawn order.
    """
    generators = [np.random.default_rng(sample_seed(seed, sample)) for sample in samples]

    def rank(total_BWC: torch.Tensor, keys_BW: torch.Tensor) -> torch.Tensor:
        # The noise of a prompt must not depend on how wide its neighbours' nodes are: as many numbers as it needs.
        legal_BWC = total_BWC.isfinite()
        noise_BWC = torch.zeros(total_BWC.shape, dtype=torch.float64)
        for row, generator in enumerate(generators):
            legal = legal_BWC[row].cpu()
            noise_BWC[row][legal] = torch.from_numpy(generator.gumbel(size=int(legal.sum())))
        free_BWC = (total_BWC.double() + noise_BWC.to(total_BWC.device)).masked_fill(~legal_BWC, float("-inf"))
        most_BW1 = free_BWC.max(dim=2, keepdim=True).values
        key_BW1 = keys_BW[:, :, None]
        # -log(exp(-key) - exp(-most) + exp(-free)) without overflow
        v_BWC = key_BW1 - free_BWC + torch.log1p(-torch.exp(free_BWC - most_BW1))
        given_BWC = key_BW1 - v_BWC.clamp(min=0) - torch.log1p(torch.exp(-v_BWC.abs()))
        return given_BWC.masked_fill(~legal_BWC, float("-inf"))

    root_B1 = torch.tensor([[generator.gumbel()] for generator in generators], dtype=torch.float64)
    found = widen(expand, trie, start_B, root_B1.to(trie.device), width + 1, rank)
    leaves_BW, logps_BWL, keys_BW = (array[:, :width] for array in (found.leaves_BW, found.logps_BWL, found.keys_BW))
    if found.leaves_BW.shape[1] > width:
        kappa_B1 = found.keys_BW[:, width:]
        with np.errstate(invalid="ignore", over="ignore"):
            rate_BW = np.exp(logps_BWL.sum(axis=2, dtype=np.float64) - kappa_B1)  # infinite where nothing was left out
        inclusion_BW = np.log(-np.expm1(-rate_BW))
    else:
        inclusion_BW = np.zeros(keys_BW.shape)
    return leaves_BW, logps_BWL, np.where(leaves_BW >= 0, inclusion_BW, 0.0)


def _expander(
    model: PreTrainedModel, trie: TorchTrie, prompts: Sequence[Sequence[int]], temperature: float
) -> Expander:
    """Children by the tree decoder: prompts computed once, then a token a branch."""
    decoder = TreeDecoder(model, prompts)

    def expand(
        places_BW: torch.Tensor, parents_BW: torch.Tensor, alive_BW: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if decoder.started:
            hidden_ND = decoder.extend(trie.tokens(places_BW, decoder.depth + 1), parents_BW).flatten(0, 1)
        else:
            hidden_ND = decoder.prefill()
        return decoder.child_logps(trie, decoder.depth, hidden_ND, places_BW.reshape(-1), temperature)

    return expand


@torch.no_grad()
def write(model: PreTrainedModel, samples: Sequence[Prompted], sampling: Sampling, count: int) -> list[list[Text]]:
    """`count` independent texts after each prompt; see `rollout.thought`."""
    thought, batch = sampling.thought, len(samples)
    assert thought is not None
    decoder = TreeDecoder(model, [sample.prompt_ids for sample in samples])
    device = model.device
    generators = [np.random.default_rng([sample_seed(sampling.seed, sample), 1]) for sample in samples]
    uniforms_BWT = torch.from_numpy(np.stack([g.random((count, thought.max_tokens)) for g in generators])).to(device)
    row_N = torch.arange(batch, device=device).repeat_interleave(count)
    parents_BW = torch.arange(count, device=device).expand(batch, -1)
    stops = torch.tensor([thought.end, *thought.stops], device=device)
    lengths_N = torch.zeros(batch * count, dtype=torch.long, device=device)
    running_N = torch.ones(batch * count, dtype=torch.bool, device=device)
    tokens, logps = [], []
    hidden_ND = decoder.prefill()[row_N]
    for step in range(thought.max_tokens):
        logits_NV = ban_(decoder.logits(hidden_ND) / sampling.temperature, thought.banned)
        logps_NV = nucleus(logits_NV.log_softmax(dim=-1), sampling.top_p)
        if sampling.sampler == "greedy":
            token_N1 = logps_NV.argmax(dim=-1, keepdim=True)
        else:
            cumulative = logps_NV.double().exp().cumsum(dim=-1)
            threshold = uniforms_BWT[:, :, step].reshape(-1, 1) * cumulative[:, -1:]
            token_N1 = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[1] - 1)
        tokens.append(token_N1[:, 0])
        logps.append(logps_NV.gather(1, token_N1)[:, 0])
        lengths_N += running_N
        running_N &= ~torch.isin(tokens[-1], stops)
        if not bool(running_N.any()) or step + 1 == thought.max_tokens:
            break
        parents = parents_BW if step else 0 * parents_BW
        hidden_ND = decoder.extend(tokens[-1].view(batch, count), parents).flatten(0, 1)
    tokens_NT, logps_NT = torch.stack(tokens, dim=1).tolist(), torch.stack(logps, dim=1).tolist()
    texts = [
        Text(tuple(row[:length]), tuple(values[:length]))
        for row, values, length in zip(tokens_NT, logps_NT, lengths_N.tolist(), strict=True)
    ]
    return [texts[start : start + count] for start in range(0, len(texts), count)]
