"""From files and a command line to a checked `RunConfig`, and back to YAML.

Lowest to highest: defaults of the schema, `configs/algo/<algo>.yaml`, the run named by `--resume`, each `--config` file
in the order given, options on the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from configs.check import ConfigError, check
from configs.files import CONFIG_FOLDER, Layer, read_layer
from configs.keys import allowed, is_free, leaf_types, list_keys, sections, suggestion, unknown_key
from configs.schema import RewardConfig, RunConfig

CONFIG_NAME = "config.yaml"
"""Name of the file in a run's folder that `--resume` reads."""

_COMMAND_LINE = "command line"
_PLAIN_FLAGS = ("help", "print_config")
_BOOL_WORDS = ("true", "false", "yes", "no", "on", "off")


def parse_run(argv: list[str] | None = None, prog: str = "python -m rl.train") -> RunConfig:
    """Settings of a run from the command line; problems go to stderr and end the process with status 2."""
    try:
        return read_run(sys.argv[1:] if argv is None else argv, prog)
    except ConfigError as error:
        _exit(prog, error.problems)


def read_run(argv: list[str], prog: str = "python -m rl.train") -> RunConfig:
    """As `parse_run`, with problems raised.

    Raises:
        ConfigError: anything unknown, of the wrong type, out of range or contradictory.
    """
    line = _CommandLine.read(argv)
    parser = _parser(prog)
    layers = _layers(line)
    values = dataclasses.asdict(RunConfig())
    for layer in layers:
        _parse(parser, [], layer.values, layer)
        values = _merge(values, layer.values)
    if "help" in line.flags:
        parser.set_defaults(_flat({key: value for key, value in values.items() if key != "rewards"}))
        rewards = _build(RunConfig, _parse(parser, [], values, None)).rewards
        shown = ", ".join(f"{{reward: {reward.reward}, weight: {reward.weight:g}}}" for reward in rewards)
        next(action for action in parser._actions if action.dest == "rewards").default = f"[{shown}]"
        parser.parse_args(["--help"])
    namespace = _parse(parser, line.options, values, None)
    config: RunConfig = _build(RunConfig, namespace)
    check(config)
    if "print_config" in line.flags:
        sys.stdout.write(dump(config))
        raise SystemExit(0)
    return config


def dump(config: RunConfig) -> str:
    """The settings as YAML that `--config` reads back to the same `RunConfig`."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=110)


def save(config: RunConfig, path: str | Path) -> None:
    """Write the settings as YAML, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.write_text(dump(config), encoding="utf-8")
    unfinished.replace(target)


@dataclasses.dataclass(frozen=True)
class _CommandLine:
    """The command line, taken apart: which files, which flags, and the options that are settings."""

    configs: list[str]
    flags: set[str]
    options: list[str]

    @classmethod
    def read(cls, argv: list[str]) -> _CommandLine:
        configs: list[str] = []
        flags: set[str] = set()
        options: list[str] = []
        problems: list[str] = []
        tokens = list(argv)
        while tokens:
            token = tokens.pop(0)
            if token == "-h":
                token = "--help"
            if not token.startswith("--") or token == "--":
                problems.append(f"{_COMMAND_LINE}: {token!r} belongs to no option; options are written --name value")
                continue
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            if name in _PLAIN_FLAGS and not equals:
                flags.add(name)
                continue
            problem = _name_problem(name)
            if problem:
                problems.append(f"{_COMMAND_LINE}: {problem}")
            given = value if equals else _next_value(name, tokens)
            if given is None:
                problems += [] if problem else [f"{_COMMAND_LINE}: --{name} needs a value: {_allowed_for(name)}"]
                continue
            if name == "config":
                configs.append(given)
            elif not problem:
                options.append(f"--{name}={given}")
        if problems:
            raise ConfigError(problems)
        return cls(configs, flags, options)

    def last(self, name: str) -> str | None:
        """The value of an option, the last one counting."""
        values = [option.partition("=")[2] for option in self.options if option.startswith(f"--{name}=")]
        return values[-1] if values else None


def _next_value(name: str, tokens: list[str]) -> str | None:
    """Take the value of option `name` from the tokens after it; a bare true/false option means true."""
    follows = bool(tokens) and not re.match(r"--[A-Za-z]", tokens[0])
    if leaf_types().get(name) is bool:
        return tokens.pop(0) if follows and tokens[0].lower() in _BOOL_WORDS else "true"
    return tokens.pop(0) if follows else None


def _name_problem(name: str) -> str | None:
    """What is wrong with an option's name, if anything."""
    base = name.removesuffix("+")
    if name in leaf_types() or name == "config" or is_free(name) or (name != base and base in list_keys()):
        return None
    if name in sections():
        names = ", ".join(f"--{key}" for key in leaf_types() if key.startswith(f"{name}."))
        return f"--{name} is a section; set its parts: {names}"
    for key in list_keys():
        if base.startswith((f"{key}.", f"{key}+.")):
            return f"--{name}: {key} is a list; --{key}+ adds one to it and --{key} sets it, each from YAML"
    if name in _PLAIN_FLAGS:
        return f"--{name} takes no value"
    if name != base and base in leaf_types():
        return f"--{name}: {base} is no list; --{base} sets it"
    hint = suggestion(name, [*leaf_types(), *_PLAIN_FLAGS, "config"])
    return f"unknown option --{name}: {hint}" if hint else f"unknown option --{name}: {unknown_key(name)}"


def _layers(line: _CommandLine) -> list[Layer]:
    """The files of a run, lowest first; all problems of all files are raised together."""
    problems: list[str] = []
    files: list[Layer] = []
    for path in line.configs:
        try:
            files.append(read_layer(Path(path)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)

    def told(name: str) -> Any:
        values = [layer.values[name] for layer in files if name in layer.values]
        given = line.last(name)
        return given if given is not None else values[-1] if values else None

    resume, algo = told("resume"), told("algo")
    if resume not in (None, "null", ""):
        run = _run_layer(str(resume))
        was = run.values.get("algo", RunConfig.algo)
        if algo not in (None, was):
            raise ConfigError([f"algo={algo} differs from {was}, the algorithm of {run.path}: a run keeps its own"])
        algo = was
        files.insert(0, run)
    if not files and line.last("data.path") in (None, RunConfig().data.path):
        files.append(read_layer(CONFIG_FOLDER / "demo.yaml"))  # nothing configured: sizes that suit the built-in world
    defaults = CONFIG_FOLDER / "algo" / f"{RunConfig.algo if algo is None else algo}.yaml"
    return [read_layer(defaults), *files] if defaults.is_file() else files  # an unknown algo is told as a bad value


def _run_layer(folder: str) -> Layer:
    path = Path(folder, CONFIG_NAME)
    if not path.is_file():
        reason = "holds no config.yaml, so it is no run's folder" if Path(folder).is_dir() else "no such folder"
        raise ConfigError([f"resume={folder}: {reason}"])
    layer = read_layer(path)
    kept = {key: value for key, value in layer.values.items() if key not in ("resume", "dry_run", "output_dir")}
    return dataclasses.replace(layer, values=kept)


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Settings of `high` over those of `low`; sections merge key by key, a list replaces a list."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key of the schema."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= _flat(value, f"{key}.") if key in sections() else {key: value}
    return flat


def _parser(prog: str) -> ArgumentParser:
    width = min(120, shutil.get_terminal_size((110, 24)).columns)
    parser = ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE ...] [--section.name VALUE ...]",
        description=(RunConfig.__doc__ or "").partition("\n")[0],
        epilog=(
            "Defaults shown hold configs/algo/<algo>.yaml and each --config given (configs/demo.yaml where there is "
            "neither a file nor a data.path). `null` unsets a setting."
        ),
        formatter_class=partial(DefaultHelpFormatter, width=width, max_help_position=30),
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; repeatable, later files win.")
    parser.add_argument("--print_config", action="store_true", help="Print the settings as YAML and exit.")
    parser.add_class_arguments(RunConfig, as_group=False)
    for action in parser._actions:
        if action.dest in sections() or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
    return parser


def _parse(parser: ArgumentParser, options: list[str], values: dict[str, Any], layer: Layer | None) -> dict[str, Any]:
    """Values after type checks and conversions, with the options over them; `layer` is the file they came from."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.parse_object(values)
            parsed: dict[str, Any] = parser.parse_args(options, namespace=namespace).as_dict()
    except (ArgumentError, TypeError, ValueError) as error:
        raise ConfigError([_value_problem(str(error), options, values, layer)]) from None
    return parsed


def _value_problem(message: str, options: list[str], values: dict[str, Any], layer: Layer | None) -> str:
    """A problem found by jsonargparse, told in the words of the settings."""
    found = re.search(r'[Pp]arser key "([^"]+)"', message) or re.search(r"argument --(\S+?):", message)
    key = found.group(1).removesuffix("+") if found else ""
    given = _flat(values).get(key)
    for option in options:
        name, _, text = option[2:].partition("=")
        given = text if name.removesuffix("+") == key else given
    place = layer.where(key) if layer else _COMMAND_LINE
    if key not in leaf_types():
        return f"{place}: {message}"
    detail = ""
    if key == "rewards":
        detail = _reward_detail(message)
    elif suggestion(str(given), _choices(key)):
        detail = f"; {suggestion(str(given), _choices(key))}"
    return f"{place}: {key}={_brief(given)} must be {allowed(leaf_types()[key])}{detail}"


def _choices(key: str) -> list[str]:
    return [choice for choice in get_args(leaf_types()[key]) if isinstance(choice, str)]


def _reward_detail(message: str) -> str:
    """Which part of a reward is wrong."""
    names = [field.name for field in dataclasses.fields(RewardConfig)]
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown:
        hint = suggestion(unknown.group(1), names) or f"there are {', '.join(names)}"
        return f"; a reward has no setting {unknown.group(1)!r}: {hint}"
    parts: list[str] = re.findall(r'Parser key "([^"]+)"', message)
    inner = next((part for part in parts if part in names), None)
    return f"; its {inner} must be {allowed(get_type_hints(RewardConfig)[inner])}" if inner else ""


def _allowed_for(name: str) -> str:
    return "a YAML file" if name == "config" else allowed(leaf_types().get(name.removesuffix("+"), str))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _build(schema: Any, values: dict[str, Any]) -> Any:
    """The dataclass, and those inside it, from parsed values."""
    hints = get_type_hints(schema)
    made = {}
    for field in dataclasses.fields(schema):
        value, hint = values[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value)
        elif hint == list[RewardConfig]:
            value = [_build(RewardConfig, part) for part in value]
        made[field.name] = value
    return schema(**made)


def _exit(prog: str, problems: list[str]) -> NoReturn:
    listed = f" {problems[0]}" if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
    sys.stderr.write(f"{prog}: error:{listed}\n(every setting: {prog} --help)\n")
    raise SystemExit(2)
