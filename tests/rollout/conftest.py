"""Both engines, one after the other, in the tests of this folder."""

from __future__ import annotations

import pytest

from rollout.types import Engine

VLLM = pytest.param("vllm_engine", marks=pytest.mark.vllm, id="vllm")
BOTH = pytest.mark.parametrize("engine", [pytest.param("hf_engine", id="hf"), VLLM], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Engine:
    """One of the engines, named by `BOTH`."""
    named: Engine = request.getfixturevalue(request.param)
    return named
