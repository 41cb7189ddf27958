"""Semantic ids: codes, how they are written as text, and which token writes which code.

A Sid is a tuple of codes, one per level. Token ids appear only in `SidVocab`, which binds a format to one tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Sid = tuple[int, ...]


@dataclass(frozen=True)
class SidFormat:
    """How a Sid is written: one token per level, and optional begin and end tokens around them.

    Args:
        patterns: one token pattern per level, each with a single `{}` where the code stands, such as `<a_{}>`.
        sizes: number of codes per level; code `c` of level `l` satisfies `0 <= c < sizes[l]`.
        begin: token written before the codes ("" for none). Prompts end with it: it arms the trie.
        end: token written after the codes ("" for none).

    Raises:
        ValueError: if the levels do not match or two of them would write the same tokens.
    """

    patterns: tuple[str, ...]
    sizes: tuple[int, ...]
    begin: str = ""
    end: str = ""

    def __post_init__(self) -> None:
        if not self.patterns or len(self.patterns) != len(self.sizes):
            raise ValueError(
                f"sid format: {len(self.patterns)} patterns for {len(self.sizes)} sizes; one of each a level"
            )
        for level, (pattern, size) in enumerate(zip(self.patterns, self.sizes, strict=True)):
            if pattern.count("{}") != 1:
                raise ValueError(f"sid format: pattern {pattern!r} of level {level} needs exactly one '{{}}'")
            if size < 1:
                raise ValueError(f"sid format: level {level} has {size} codes; at least 1 is needed")
        if len(set(self.patterns)) != len(self.patterns):
            raise ValueError(f"sid format: levels share a pattern in {self.patterns}; tokens could not tell them apart")

    @property
    def depth(self) -> int:
        """Number of levels L."""
        return len(self.sizes)

    def token(self, level: int, code: int) -> str:
        """The token of one code. Raises ValueError when the code is out of the level's range."""
        if not 0 <= code < self.sizes[level]:
            raise ValueError(f"code {code} is out of range [0, {self.sizes[level]}) at level {level}")
        return self.patterns[level].replace("{}", str(code))

    def format(self, sid: Sid) -> str:
        """Write a Sid with its begin and end tokens; the inverse of `parse`."""
        return self.begin + self.body(sid) + self.end

    def body(self, sid: Sid) -> str:
        """Write the codes alone, without begin and end tokens."""
        if len(sid) != self.depth:
            raise ValueError(f"sid {sid} has {len(sid)} levels, the format has {self.depth}")
        return "".join(self.token(level, code) for level, code in enumerate(sid))

    def parse(self, text: str) -> Sid:
        """Read the one Sid that `text` is. Raises ValueError when it is anything else, or a code is out of range."""
        match = self._regex.fullmatch(text.strip())
        if not match:
            raise ValueError(f"{text!r} is not a sid of the form {self.begin}{''.join(self.patterns)}{self.end}")
        return self._checked(match)

    def find(self, text: str) -> list[Sid]:
        """Every Sid in `text`, in order. Raises ValueError when one has a code out of range."""
        return [self._checked(match) for match in self._regex.finditer(text)]

    def tokens(self) -> list[str]:
        """Every token the format writes: begin, end, then level by level."""
        marks = [mark for mark in (self.begin, self.end) if mark]
        return marks + [self.token(level, code) for level, size in enumerate(self.sizes) for code in range(size)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of `from_dict`."""
        return {"patterns": list(self.patterns), "sizes": list(self.sizes), "begin": self.begin, "end": self.end}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SidFormat:
        """Read what `to_dict` wrote. Raises ValueError naming a missing or unknown key."""
        unknown = set(data) - {"patterns", "sizes", "begin", "end"}
        missing = {"patterns", "sizes"} - set(data)
        if unknown or missing:
            raise ValueError(f"sid format: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}")
        sizes = tuple(int(size) for size in data["sizes"])
        return cls(tuple(data["patterns"]), sizes, data.get("begin", ""), data.get("end", ""))

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        parts = [re.escape(p).replace(re.escape("{}"), "(0|[1-9][0-9]*)") for p in self.patterns]
        # Marks are optional when reading: histories in the wild are written both ways.
        begin = f"(?:{re.escape(self.begin)})?" if self.begin else ""
        end = f"(?:{re.escape(self.end)})?" if self.end else ""
        return re.compile(begin + "".join(parts) + end)

    def _checked(self, match: re.Match[str]) -> Sid:
        sid = tuple(int(code) for code in match.groups())
        for level, code in enumerate(sid):
            if code >= self.sizes[level]:
                raise ValueError(
                    f"sid {match.group(0)!r}: code {code} is out of range [0, {self.sizes[level]}) at level {level}"
                )
        return sid


def letters_format(sizes: tuple[int, ...]) -> SidFormat:
    """MiniOneRec's way of writing, up to 26 levels: `<a_1><b_2><c_3>`."""
    _at_most_26(sizes)
    return SidFormat(tuple(f"<{chr(ord('a') + level)}_{{}}>" for level in range(len(sizes))), sizes)


def onerec_format(sizes: tuple[int, ...] = (8192, 8192, 8192)) -> SidFormat:
    """OpenOneRec's way of writing, up to 26 levels: `<|sid_begin|><s_a_1><s_b_2><s_c_3><|sid_end|>`."""
    _at_most_26(sizes)
    patterns = tuple(f"<s_{chr(ord('a') + level)}_{{}}>" for level in range(len(sizes)))
    return SidFormat(patterns, sizes, "<|sid_begin|>", "<|sid_end|>")


def _at_most_26(sizes: tuple[int, ...]) -> None:
    if len(sizes) > 26:
        raise ValueError(f"{len(sizes)} levels: letters name 26 at most; give patterns of your own")


@dataclass(frozen=True, eq=False)
class SidVocab:
    """A SidFormat bound to one tokenizer: the token id of every code.

    Attributes:
        format: the format that is bound.
        level_ids: per level, int32 array [size] of token ids, indexed by code.
        begin_ids: token ids of the begin mark (empty when there is none).
        end_ids: token ids of the end mark (empty when there is none).
    """

    format: SidFormat
    level_ids: tuple[np.ndarray, ...]
    begin_ids: tuple[int, ...]
    end_ids: tuple[int, ...]

    @classmethod
    def bind(cls, fmt: SidFormat, token_to_id: Callable[[str], int | None]) -> SidVocab:
        """Look up every token of the format.

        Args:
            fmt: the format.
            token_to_id: the id of a token that the tokenizer writes as one piece, None when it does not know it.

        Raises:
            ValueError: naming tokens that the tokenizer lacks, or two codes that share a token id.
        """
        tokens = fmt.tokens()
        ids = {token: token_to_id(token) for token in tokens}
        if len(ids) != len(tokens):
            twice = next(token for token in ids if tokens.count(token) > 1)
            raise ValueError(
                f"sid format: the token {twice!r} stands for two codes; levels need patterns that never meet"
            )
        missing = [token for token, token_id in ids.items() if token_id is None]
        if missing:
            shown = ", ".join(missing[:5])
            raise ValueError(
                f"the tokenizer lacks {len(missing)} of {len(ids)} SID tokens ({shown}, …): "
                "expand the vocabulary of the model before training on this catalogue"
            )
        if len(set(ids.values())) != len(ids):
            raise ValueError("the tokenizer gives two SID tokens the same id; each code needs a token of its own")
        levels = tuple(
            np.array([ids[fmt.token(level, code)] for code in range(size)], dtype=np.int32)
            for level, size in enumerate(fmt.sizes)
        )
        marks = [(ids[mark],) if mark else () for mark in (fmt.begin, fmt.end)]
        return cls(fmt, levels, marks[0], marks[1])  # type: ignore[arg-type]

    def paths(self, codes_NL: np.ndarray) -> np.ndarray:
        """Token ids [N, L] of codes [N, L]. Raises ValueError naming the first row with a code out of range."""
        codes_NL = np.asarray(codes_NL)
        if codes_NL.ndim != 2 or codes_NL.shape[1] != self.format.depth:
            raise ValueError(f"codes have shape {codes_NL.shape}, the format has {self.format.depth} levels")
        bad = (codes_NL < 0) | (codes_NL >= np.array(self.format.sizes))
        if bad.any():
            row, level = np.argwhere(bad)[0]
            raise ValueError(
                f"row {row}: code {codes_NL[row, level]} is out of range "
                f"[0, {self.format.sizes[level]}) at level {level}"
            )
        return np.stack([ids[codes_NL[:, level]] for level, ids in enumerate(self.level_ids)], axis=1)
