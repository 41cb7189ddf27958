"""From the names in the configuration to callables: `ndcg@10`, entry points, modules, files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from configs.schema import RewardConfig
from rewards.lists import Diversity, Overlong, Popularity, Validity
from rewards.peers import Prefix, RankPenalty
from rewards.plugins import did_you_mean, installed, load, origin
from rewards.protocol import Reward, RewardError, describe
from rewards.ranking import Hit, Mrr, Ndcg, Recall

BUILTINS: dict[str, Callable[..., Any]] = {
    "ndcg": Ndcg,
    "recall": Recall,
    "hit": Hit,
    "mrr": Mrr,
    "prefix": Prefix,
    "rank_penalty": RankPenalty,
    "validity": Validity,
    "diversity": Diversity,
    "popularity": Popularity,
    "overlong": Overlong,
}


@dataclass(frozen=True)
class NamedReward:
    """A reward as the run knows it: its name in metrics, its weight, and the callable with its params bound."""

    name: str
    weight: float
    call: Reward


def build(configs: Sequence[RewardConfig]) -> list[NamedReward]:
    """The configured rewards, in order.

    Raises:
        RewardError: for the first entry that cannot be honoured: unknown name, failing plugin, params that do not fit,
            a weight that is not finite, a name that is taken.
    """
    if not configs:
        raise RewardError("rewards is empty: name at least one, such as ndcg@10")
    built: dict[str, NamedReward] = {}
    for config in configs:
        name = config.name or config.reward
        if name in built:
            raise RewardError(f"two rewards are named {name!r}: set `name` of one of them")
        try:
            if not isinstance(config.weight, int | float) or not math.isfinite(config.weight):
                raise RewardError(f"weight={config.weight!r} must be a finite number")
            built[name] = NamedReward(name, float(config.weight), _bind(config))
        except RewardError as error:
            raise RewardError(f"reward {config.reward!r}: {error}") from error.__cause__
    return list(built.values())


def resolve(spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function or class that a reward's name stands for, and the params that the name sets (`k` of `ndcg@10`).

    Raises:
        RewardError: when the name stands for nothing, for two things, or for something that does not load.
    """
    if ":" in spec:
        return _callable(load(spec)), {}
    base, at, k = spec.partition("@")
    target = _by_name(base)
    if not at:
        return target, {}
    if not _takes_k(target):
        raise RewardError(f"{base} has no k: write {base!r}")
    if not (k.isascii() and k.isdigit() and int(k) > 0):
        raise RewardError(f"{k!r} after the @ must be a whole number of at least 1")
    return target, {"k": int(k)}


def parameters(target: Callable[..., Any]) -> str:
    """The params that a reward takes, as they are written in Python."""
    try:
        found = list(inspect.signature(target).parameters.values())
    except ValueError:
        return "unknown"
    if not inspect.isclass(target):
        found = found[2:]
    return ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in found)


def _by_name(base: str) -> Callable[..., Any]:
    points = installed().get(base, [])
    claims = [f"the built-in {base!r}"] * (base in BUILTINS) + [f"the entry point {origin(point)}" for point in points]
    if not claims:
        known = sorted([*BUILTINS, *installed()])
        raise RewardError(f"no such reward{did_you_mean(base, known)} (known: {', '.join(known)})")
    if len(claims) > 1:
        either = " and ".join(claims)
        raise RewardError(f"{base!r} names {either}: rename the entry point, or take it as package.module:Name")
    return BUILTINS[base] if base in BUILTINS else _callable(load(points[0].value))


def _callable(target: Any) -> Callable[..., Any]:
    if not callable(target):
        raise RewardError(f"it is {target!r} of type {type(target).__name__}, which cannot be called")
    return cast(Callable[..., Any], target)


def _takes_k(target: Callable[..., Any]) -> bool:
    try:
        return "k" in inspect.signature(target).parameters
    except ValueError:
        return False


def _bind(config: RewardConfig) -> Reward:
    """The reward with its params: a class is constructed, a function gets them as keywords of every call."""
    target, from_name = resolve(config.reward)
    both = sorted(from_name.keys() & config.params.keys())
    if both:
        raise RewardError(f"{both[0]} is set twice, in the name and in params")
    params = from_name | config.params
    if not inspect.isclass(target):
        _check_fit(target, (None, None), params)
        return partial(target, **params)
    _check_fit(target, (), params)
    try:
        reward = target(**params)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"constructing it failed: {describe(error)}") from error
    if not callable(reward):
        raise RewardError(f"class {target.__name__} lacks __call__(self, group, catalog): its objects cannot be called")
    _check_fit(reward, (None, None), {})
    return cast(Reward, reward)


def _check_fit(target: Callable[..., Any], args: tuple[None, ...], params: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError as error:
        raise RewardError(f"its parameters cannot be read: {error}") from error
    try:
        signature.bind(*args, **params)
    except TypeError as error:
        unknown = [name for name in params if name not in signature.parameters]
        hint = did_you_mean(unknown[0], list(signature.parameters)) if unknown else ""
        takes = f"it is called as (group, catalog{', params' if params else ''}) and" if args else "it"
        plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        raise RewardError(f"{error}; {takes} takes {inspect.Signature(plain)}{hint}") from error
