"""The fleet on a Ray of its own: real actors, real engines. N engines are one engine; whatever goes wrong is told."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from configs.schema import ModelConfig, RolloutConfig
from rollout.decode import Decoder
from rollout.engine import EngineSpec
from rollout.hf_engine import HFEngine
from rollout.types import RolloutGroup, Sample, Sampling, Thought
from rollout.weights import checksum, merged_weights
from tests import oracle
from tests.conftest import MAX_PROMPT, need_vllm
from tests.rollout.test_weights import adapted

if TYPE_CHECKING:
    from rollout.ray_fleet import Fleet

pytestmark = pytest.mark.ray

StartFleet = Callable[..., "Fleet"]
SAMPLINGS = [
    pytest.param(Sampling(4, seed=3), id="sample"),
    pytest.param(Sampling(6, "beam"), id="beam"),
    pytest.param(Sampling(2, constrained=False, seed=3), id="whole vocabulary"),
]


def spec(folder: Path, engines: int = 1, kind: str = "hf") -> EngineSpec:
    rollout = RolloutConfig(num_engines=engines, cpus_per_engine=0.5, gpus_per_engine=0.0, threads=1)
    return EngineSpec(kind, "a test", str(folder), ModelConfig(dtype="float32"), rollout, MAX_PROMPT, 0)


@pytest.fixture(scope="module")
def start(ray_local: str, tiny_policy: Path, tiny_decoder: Decoder) -> Iterator[StartFleet]:
    """Start a fleet; it is closed when the module's tests are over."""
    from rollout.ray_fleet import Fleet

    fleets = []

    def run(engines: int, kind: str = "hf") -> Fleet:
        fleets.append(Fleet(spec(tiny_policy, engines, kind), tiny_decoder))
        return fleets[-1]

    yield run
    for fleet in fleets:
        fleet.close()


@pytest.fixture(scope="module")
def one(start: StartFleet) -> Fleet:
    return start(1)


@pytest.fixture(scope="module")
def two(start: StartFleet) -> Fleet:
    return start(2)


@pytest.fixture
def fleets(one: Fleet, two: Fleet, tiny_model: Qwen3ForCausalLM) -> Iterator[tuple[Fleet, Fleet]]:
    """Fleets of one and of two engines, brought back to version 0 afterwards."""
    yield one, two
    weights = merged_weights(tiny_model)
    for fleet in (one, two):
        fleet.sync(weights, 0, checksum(weights))


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def assert_same(mine: list[RolloutGroup], other: list[RolloutGroup]) -> None:
    """The same groups in the same order; log-probabilities up to the rounding of other batch shapes."""
    assert [group.sample for group in mine] == [group.sample for group in other]
    for a, b in zip(mine, other, strict=True):
        assert [r.token_ids for r in a.rollouts] == [r.token_ids for r in b.rollouts]
        assert [(r.sids, r.items, r.on_trie, r.policy_version) for r in a.rollouts] == [
            (r.sids, r.items, r.on_trie, r.policy_version) for r in b.rollouts
        ]
        np.testing.assert_allclose(
            [r.logps_sampler for r in a.rollouts], [r.logps_sampler for r in b.rollouts], atol=2e-5
        )


def test_about(one: Fleet, two: Fleet) -> None:
    """Every engine is a process of its own."""
    assert [len(one.about), len(two.about)] == [1, 2]
    about = [*one.about, *two.about]
    assert {a["engine"] for a in about} == {"hf"} and {a["version"] for a in about} == {0}
    assert len({a["pid"] for a in about} | {os.getpid()}) == 4


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_two_engines_are_one(
    one: Fleet, two: Fleet, hf_engine: HFEngine, tiny_samples: list[Sample], sampling: Sampling
) -> None:
    """Also an odd number of samples, fewer samples than engines, and the engine in this process."""
    for samples in (tiny_samples, tiny_samples[:7], tiny_samples[3:4]):
        groups = two.generate(samples, sampling)
        assert [group.sample for group in groups] == samples
        assert_same(one.generate(samples, sampling), groups)
        assert_same(hf_engine.generate(samples, sampling), groups)
    assert two.generate([], sampling) == []


def test_order_of_samples_does_not_matter(two: Fleet, tiny_samples: list[Sample]) -> None:
    shuffled = [tiny_samples[row] for row in np.random.default_rng(0).permutation(len(tiny_samples))]
    by_source = {group.sample.record.source: group for group in two.generate(shuffled, Sampling(3))}
    groups = two.generate(tiny_samples, Sampling(3))
    assert_same([by_source[group.sample.record.source] for group in groups], groups)


def test_groups_come_in_as_they_are_drawn(two: Fleet, tiny_samples: list[Sample]) -> None:
    """Calls of three prompts each, in order, and the same groups as by one call an engine."""
    whole = two.generate(tiny_samples, Sampling(3, seed=5))
    two.prompts_per_call = 3
    try:
        parts = list(two.collect(two.start(tiny_samples, Sampling(3, seed=5))))
    finally:
        two.prompts_per_call = 0
    assert [len(part) for part in parts] == [3] * 8
    assert_same([group for part in parts for group in part], whole)


def test_texts(two: Fleet, hf_engine: HFEngine, tiny_samples: list[Sample]) -> None:
    """Free text after any prompt, the same by one engine as by two; items may be written, nothing is banned."""
    sampling = Sampling(1, temperature=1.2, thought=Thought(7, end=5), seed=4)
    parts = list(two.write(tiny_samples[:7], sampling, 3, parts=2))
    assert [len(part) for part in parts] == [2, 2, 2, 1]
    texts = [of_prompt for part in parts for of_prompt in part]
    assert [len(of_prompt) for of_prompt in texts] == [3] * 7
    alone = hf_engine.write(tiny_samples[:7], sampling, 3)
    assert [[text.token_ids for text in one] for one in texts] == [[text.token_ids for text in one] for one in alone]
    assert all(1 <= len(text.token_ids) == len(text.logps) <= 7 for one in texts for text in one)
    assert len({text.token_ids for one in texts for text in one}) > 15


def test_calls_are_of_the_version_they_were_made_at(
    fleets: tuple[Fleet, Fleet], tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample]
) -> None:
    """Drawn ahead: weights queue up behind what was asked for before, and before what is asked for later."""
    _, two = fleets
    samples = tiny_samples[:6]
    asked = [two.start(samples, Sampling(3, seed=1))]
    for version in (1, 2):
        weights = merged_weights(adapted(tiny_model, seed=version))
        two.sync(weights, version, checksum(weights), wait=False)
        asked.append(two.start(samples, Sampling(3, seed=1)))
    drawn = [[group for part in two.collect(pending) for group in part] for pending in asked]
    assert [{group.policy_version for group in groups} for groups in drawn] == [{0}, {1}, {2}]
    weights = merged_weights(adapted(tiny_model, seed=1))
    two.sync(weights, 1, checksum(weights))
    assert_same(two.generate(samples, Sampling(3, seed=1)), drawn[1])


def test_a_wrong_checksum_is_found_though_nobody_waits(
    fleets: tuple[Fleet, Fleet], tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample]
) -> None:
    from rollout.ray_fleet import FleetError

    one, _ = fleets
    one.sync(merged_weights(adapted(tiny_model)), 3, "not that", wait=False)
    pending = one.start(tiny_samples[:2], Sampling(2))
    with pytest.raises(FleetError, match="after loading version 3 with checksum not that"):
        list(one.collect(pending))


def test_the_catalogue_changes_everywhere(two: Fleet, tiny_decoder: Decoder, tiny_samples: list[Sample]) -> None:
    """Items that are gone are written by no engine; no process is started anew."""
    part = tiny_decoder.trie.subset(np.arange(0, tiny_decoder.trie.num_leaves, 4))
    pids = [about["pid"] for about in two.about]
    two.serve(Decoder(tiny_decoder.catalog, part))
    try:
        groups = two.generate(tiny_samples, Sampling(8, seed=2))
    finally:
        two.serve(tiny_decoder)
    assert {r.token_ids for g in groups for r in g.rollouts} <= {tuple(path) for path in part.paths().tolist()}
    assert [about["pid"] for about in two.about] == pids
    assert (
        len({r.sids for g in two.generate(tiny_samples, Sampling(8, seed=2)) for r in g.rollouts})
        > part.num_leaves // 2
    )


def test_sync_reaches_every_engine(
    fleets: tuple[Fleet, Fleet],
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
    tiny_samples: list[Sample],
) -> None:
    """Each engine of the two writes by the new weights, and says so."""
    import ray

    paths = [tuple(path) for path in tiny_decoder.paths.tolist()]
    for version in (1, 2):
        policy = adapted(tiny_model, seed=version)
        weights = merged_weights(policy)
        for fleet in fleets:
            fleet.sync(weights, version, checksum(weights))
            assert fleet.version == version
        assert {a["version"] for a in ray.get([e.about.remote() for e in fleets[1].engines])} == {version}
        mine, other = (fleet.generate(tiny_samples, Sampling(3, seed=1)) for fleet in fleets)
        assert_same(mine, other)
        for group in other:
            assert group.policy_version == version
            tokens = np.array([rollout.token_ids for rollout in group.rollouts])
            expected = oracle.token_logps(policy, group.sample.prompt_ids, tokens, paths)
            np.testing.assert_allclose([r.logps_sampler for r in group.rollouts], expected, atol=1e-4)


def test_a_wrong_checksum_is_told(
    fleets: tuple[Fleet, Fleet], tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample]
) -> None:
    """The fleet's version stays, so that what the engines then write is stale and refused."""
    from rollout.ray_fleet import FleetError

    weights = merged_weights(adapted(tiny_model))
    with pytest.raises(FleetError, match=f"engine 0 reports .*{checksum(weights)}.* version 5 with checksum beef"):
        fleets[1].sync(weights, 5, "beef")
    assert fleets[1].version == 0
    with pytest.raises(FleetError, match=r"policy version \[5\] where version 0 was asked for"):
        fleets[1].generate(tiny_samples[:2], Sampling(2))


def test_stale_rollouts_are_refused(fleets: tuple[Fleet, Fleet], tiny_samples: list[Sample]) -> None:
    from rollout.ray_fleet import FleetError

    for fleet in fleets:
        fleet.version = 7
        with pytest.raises(FleetError, match=r"rollouts of policy version \[0\] where version 7 was asked for"):
            fleet.generate(tiny_samples[:3], Sampling(2))


def test_one_engine_behind_the_others_is_found(
    fleets: tuple[Fleet, Fleet], tiny_model: Qwen3ForCausalLM, tiny_samples: list[Sample]
) -> None:
    import ray

    from rollout.ray_fleet import FleetError

    _, two = fleets
    ray.get(two.engines[0].load.remote(merged_weights(tiny_model), 3))
    two.version = 3
    with pytest.raises(FleetError, match=r"policy version \[0\] where version 3"):
        two.generate(tiny_samples[:4], Sampling(2))


def test_weights_that_do_not_fit_are_told(fleets: tuple[Fleet, Fleet], tiny_model: Qwen3ForCausalLM) -> None:
    from rollout.ray_fleet import FleetError

    weights = merged_weights(tiny_model)
    del weights["model.norm.weight"]
    with pytest.raises(FleetError, match=r"(?s)failed to load weights.*missing \['model.norm.weight'\]"):
        fleets[1].sync(weights, 4, checksum(weights))
    assert fleets[1].version == 0


def test_an_engine_that_does_not_start_is_told(
    ray_local: str, tiny_policy: Path, tiny_decoder: Decoder, tmp_path: Path
) -> None:
    from rollout.ray_fleet import Fleet, FleetError

    with pytest.raises(FleetError, match=r"(?s)failed to start.*model.path=.*nowhere: no such folder"):
        Fleet(spec(tmp_path / "nowhere", 1), tiny_decoder)


def test_a_dead_engine_is_told_and_close_ends_processes(start: StartFleet, tiny_samples: list[Sample]) -> None:
    import ray

    from rollout.ray_fleet import FleetError

    fleet = start(2)
    pids = [about["pid"] for about in fleet.about]
    ray.kill(fleet.engines[1])
    with pytest.raises(FleetError, match="failed to generate"):
        fleet.generate(tiny_samples[:4], Sampling(2))
    kept = [*fleet.engines]  # handles that go out of scope would end the actors too
    fleet.close()
    fleet.close()  # closing again is nothing
    assert fleet.engines == [] and len(kept) == 2
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(gone(pid) for pid in pids)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_in_an_actor(
    start: StartFleet,
    hf_engine: HFEngine,
    tiny_model: Qwen3ForCausalLM,
    tiny_decoder: Decoder,
    tiny_samples: list[Sample],
) -> None:
    """The default engine where it runs in production: in its own process, synced through Ray."""
    need_vllm()
    fleet = start(1, "vllm")
    assert fleet.about[0]["engine"] == "vllm"
    paths = [tuple(path) for path in tiny_decoder.paths.tolist()]
    weights = merged_weights(adapted(tiny_model))
    for version in (0, 1):
        if version:
            fleet.sync(weights, version, checksum(weights))
            assert hf_engine.load_weights(weights, version) == checksum(weights)
        beams = fleet.generate(tiny_samples, Sampling(4, "beam"))
        expected = hf_engine.generate(tiny_samples, Sampling(4, "beam"))
        assert [[r.token_ids for r in g.rollouts] for g in beams] == [
            [r.token_ids for r in g.rollouts] for g in expected
        ]
        for group in fleet.generate(tiny_samples, Sampling(3, seed=2)):
            assert group.policy_version == version and all(rollout.legal for rollout in group.rollouts)
            tokens = np.array([rollout.token_ids for rollout in group.rollouts])
            logps = oracle.token_logps(hf_engine.model, group.sample.prompt_ids, tokens, paths)
            np.testing.assert_allclose([r.logps_sampler for r in group.rollouts], logps, atol=1e-4)
