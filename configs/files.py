"""YAML files of settings: read strictly, each key known by its line."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.check import ConfigError
from configs.keys import allowed, dict_keys, is_free, leaf_types, sections, unknown_key
from configs.schema import RunConfig

CONFIG_FOLDER = Path(__file__).resolve().parent
"""Where the configurations that come with sidrl lie."""


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2: 1e-3 is a number (PyYAML reads it as a text)."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Layer:
    """Settings of one file: nested values, and the line of each dotted key."""

    path: str
    values: dict[str, Any]
    lines: dict[str, int]

    def where(self, key: str) -> str:
        """`file:line` of a key, or of the nearest key above it."""
        while key not in self.lines and "." in key:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}" if key in self.lines else self.path


def read_layer(path: Path) -> Layer:
    """Read a YAML file of settings.

    A section left empty counts as absent.

    Raises:
        ConfigError: no such file, no YAML, an unknown or doubled key, a value where a section belongs.
    """
    shown = _shown(path)
    node = _compose(path, shown)
    if node is None:
        return Layer(shown, {}, {})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            [f"{shown}: a file of settings holds `name: value` lines, not a {node.tag.rpartition(':')[2]}"]
        )
    problems: list[str] = []
    lines: dict[str, int] = {}
    values = _mapping(node, "", shown, lines, problems)
    if problems:
        raise ConfigError(problems)
    return Layer(shown, values, lines)


def _shown(path: Path) -> str:
    """The path as a user would write it: relative where the file is below the working folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _compose(path: Path, shown: str) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{shown}: no such file{_close_files(path)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{shown}: cannot be read ({error})"]) from None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            loader.construct_document(node)  # so that a bad tag or number is found here, with its line
        return _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{shown}:{mark.line + 1}" if mark else shown
        raise ConfigError([f"{place}: no valid YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{shown}: no valid YAML: {error}"]) from None


def _close_files(path: Path) -> str:
    """`; did you mean …` with files of the same folder and of the shipped configurations."""
    folders = dict.fromkeys((path.parent, CONFIG_FOLDER))
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.y*ml"))]
    names = {file.stem: _shown(file) for file in reversed(files)}
    close = difflib.get_close_matches(path.stem, names, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(names[name] for name in close)}?"
    return f"; there are {', '.join(dict.fromkeys(map(_shown, files)))}" if files else ""


def _mapping(
    node: yaml.MappingNode, prefix: str, shown: str, lines: dict[str, int], problems: list[str]
) -> dict[str, Any]:
    """Values of a mapping of settings, checked key by key against the schema."""
    _Loader("").flatten_mapping(node)  # merge keys: `<<: *anchor`
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = str(key_node.value).replace("-", "_") if isinstance(key_node, yaml.ScalarNode) else "?"
        key = f"{prefix}{name}"
        if key in lines:
            problems.append(f"{shown}:{line}: {key} is set twice, first on line {lines[key]}")
            continue
        lines[key] = line
        is_dict = key in dict_keys(RunConfig)
        if key in sections() or is_dict:
            if isinstance(value_node, yaml.MappingNode):
                values[name] = _mapping(value_node, f"{key}.", shown, lines, problems)
            elif value_node.tag != "tag:yaml.org,2002:null":
                kind = allowed(dict) if is_dict else "a section of settings"
                problems.append(f"{shown}:{line}: {key}={_construct(value_node)!r} must be {kind}")
        elif key in leaf_types() or is_free(key):
            values[name] = _construct(value_node)
        else:
            problems.append(f"{shown}:{line}: {unknown_key(key)}")
    return values


def _construct(node: yaml.Node) -> Any:
    return _Loader("").construct_object(node, deep=True)  # type: ignore[no-untyped-call]
