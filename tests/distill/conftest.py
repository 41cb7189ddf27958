"""Trainers for the tests of this folder are made as those of `tests/rl` are."""

from tests.rl.conftest import cache_folder, data, make_config, make_policy, make_run, world  # noqa: F401
