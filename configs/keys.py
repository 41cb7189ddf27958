"""The schema's dotted keys: what type each has, how to name it to a user, and which one a typo most likely meant."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from configs.schema import RewardConfig, RunConfig


@cache
def leaf_types(schema: type = RunConfig) -> dict[str, Any]:
    """Type of every setting by dotted key (`rl.steps`); a list of dataclasses such as `rewards` is one setting."""
    hints = get_type_hints(schema)
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            leaves |= {f"{field.name}.{key}": kind for key, kind in leaf_types(hint).items()}
        else:
            leaves[field.name] = hint
    return leaves


@cache
def sections(schema: type = RunConfig) -> frozenset[str]:
    """Dotted names that hold settings and are none themselves (`rl`, `lora`)."""
    return frozenset(key.rpartition(".")[0] for key in leaf_types(schema) if "." in key)


@cache
def dict_keys(schema: type = RunConfig) -> tuple[str, ...]:
    """Settings whose own keys are free as far as the schema knows (`trl`, `lora.extra`)."""
    return tuple(key for key, kind in leaf_types(schema).items() if get_origin(kind) is dict)


@cache
def list_keys(schema: type = RunConfig) -> tuple[str, ...]:
    """Settings that are a list of parts (`rewards`)."""
    return tuple(key for key, kind in leaf_types(schema).items() if get_origin(kind) is list)


def is_free(key: str, schema: type = RunConfig) -> bool:
    """Is `key` inside a setting with free keys (`trl.optim`)?"""
    return any(key.startswith(f"{name}.") for name in dict_keys(schema))


def suggestion(key: str, known: Iterable[str]) -> str:
    """`did you mean rl.steps?`, or nothing where no known key is close.

    The whole dotted key is compared; where only its last part is right (`steps`, `optim.steps`), the keys that end in
    it are offered.
    """
    names = sorted(known)
    same_leaf = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, names, n=2, cutoff=0.75) or same_leaf[:3]
    if not close:
        leaves = {name.rpartition(".")[2]: name for name in reversed(names)}
        leaf = difflib.get_close_matches(key.rpartition(".")[2], leaves, n=1, cutoff=0.75)
        close = [leaves[name] for name in leaf] or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else ""


def unknown_key(key: str, schema: type = RunConfig) -> str:
    """What to say about a key that the schema does not have."""
    hint = suggestion(key, leaf_types(schema))
    parent = key.rpartition(".")[0]
    if not hint and parent in sections(schema):
        names = [name.removeprefix(f"{parent}.") for name in leaf_types(schema) if name.startswith(f"{parent}.")]
        hint = f"{parent} has {', '.join(names)}"
    elif not hint and parent in leaf_types(schema):
        hint = f"{parent} is a value, not a section"
    elif not hint:
        hint = f"there are {', '.join(dict.fromkeys(name.partition('.')[0] for name in leaf_types(schema)))}"
    return f"unknown setting {key}: {hint}"


def allowed(kind: Any) -> str:
    """What a setting of this type takes, in words: `an integer`, `one of group, batch, none`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else allowed(part) for part in args)
    if origin is list and args[0] is RewardConfig:
        return "a list such as [{reward: ndcg@10, weight: 1.0}]"
    if origin is list:
        return f"a list, each {allowed(args[0])}"
    if origin is dict or kind is dict:
        return "a mapping such as {name: value}"
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    return names.get(kind, "another value")
