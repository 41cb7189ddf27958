"""Readers of data: catalogue and rows from several formats, prompts, and every bad row named."""

from rollout.data.native import write_world
from rollout.data.problems import DataError, Problem
from rollout.data.prompts import prepare, render, sid_vocab, split_users
from rollout.data.world import World, detect, load_world

__all__ = [
    "DataError",
    "Problem",
    "World",
    "detect",
    "load_world",
    "prepare",
    "render",
    "sid_vocab",
    "split_users",
    "write_world",
]
