"""SidFormat and SidVocab: hand-written cases, and parse against format at any depth."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.sid import SidFormat, SidVocab, letters_format, onerec_format

THREE = letters_format((256, 256, 256))
ONEREC = onerec_format()


@st.composite
def formats(draw: st.DrawFn) -> SidFormat:
    """Formats of 1 to 6 levels, with or without marks."""
    sizes = tuple(draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=6)))
    maker = draw(st.sampled_from([letters_format, onerec_format]))
    fmt = maker(sizes)
    begin, end = draw(st.sampled_from([("", ""), ("<|b|>", "<|e|>"), ("<|b|>", ""), ("", "[*]")]))
    return SidFormat(fmt.patterns, fmt.sizes, begin, end)


@st.composite
def formats_and_sids(draw: st.DrawFn) -> tuple[SidFormat, list[tuple[int, ...]]]:
    fmt = draw(formats())
    sid = st.tuples(*(st.integers(0, size - 1) for size in fmt.sizes))
    return fmt, draw(st.lists(sid, max_size=5))


def test_writes_what_peers_write() -> None:
    assert THREE.format((236, 231, 226)) == "<a_236><b_231><c_226>"
    assert ONEREC.format((340, 6566, 5603)) == "<|sid_begin|><s_a_340><s_b_6566><s_c_5603><|sid_end|>"
    assert ONEREC.body((340, 6566, 5603)) == "<s_a_340><s_b_6566><s_c_5603>"


@given(formats_and_sids())
def test_parse_and_find_invert_format(case: tuple[SidFormat, list[tuple[int, ...]]]) -> None:
    fmt, sids = case
    for sid in sids:
        assert fmt.parse(fmt.format(sid)) == sid
        assert fmt.parse(f" {fmt.body(sid)}\n") == sid
    assert fmt.find(" and ".join(fmt.format(sid) for sid in sids)) == sids
    assert fmt.find("".join(fmt.body(sid) for sid in sids)) == sids


@given(formats())
def test_dict_round_trip(fmt: SidFormat) -> None:
    assert SidFormat.from_dict(fmt.to_dict()) == fmt


@pytest.mark.parametrize(
    "text", ["", "<a_1><b_2>", "<a_1><b_2><c_3><a_1>", "<b_1><a_2><c_3>", "<a_-1><b_2><c_3>", "1,2,3"]
)
def test_parse_refuses_what_is_no_sid(text: str) -> None:
    with pytest.raises(ValueError, match="is not a sid of the form"):
        THREE.parse(text)


@pytest.mark.parametrize("read", [THREE.parse, THREE.find])
def test_reading_refuses_codes_out_of_range(read: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"code 256 is out of range \[0, 256\) at level 1"):
        read("<a_1><b_256><c_3>")


def test_writing_refuses_wrong_codes_and_depth() -> None:
    with pytest.raises(ValueError, match=r"code -1 is out of range \[0, 256\) at level 2"):
        THREE.format((0, 0, -1))
    with pytest.raises(ValueError, match="has 2 levels, the format has 3"):
        THREE.body((0, 0))


@pytest.mark.parametrize(
    ("patterns", "sizes", "said"),
    [
        ((), (), "0 patterns"),
        (("<a_{}>",), (4, 4), "1 patterns for 2 sizes"),
        (("<a>",), (4,), "exactly one"),
        (("<a_{}{}>",), (4,), "exactly one"),
        (("<a_{}>",), (0,), "level 0 has 0 codes"),
        (("<a_{}>", "<a_{}>"), (4, 4), "share a pattern"),
    ],
)
def test_impossible_formats_are_refused(patterns: tuple[str, ...], sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SidFormat(patterns, sizes)


def test_from_dict_names_keys() -> None:
    with pytest.raises(ValueError, match=r"unknown keys \['size'\], missing keys \['sizes'\]"):
        SidFormat.from_dict({"patterns": ["<a_{}>"], "size": [4]})


def test_tokens_are_marks_then_levels() -> None:
    fmt = SidFormat(("<a_{}>", "<b_{}>"), (2, 1), "<", ">")
    assert fmt.tokens() == ["<", ">", "<a_0>", "<a_1>", "<b_0>"]


def test_vocab_binds_every_code() -> None:
    fmt = SidFormat(("<a_{}>", "<b_{}>"), (2, 3), "<B>")
    ids = {token: 100 + index for index, token in enumerate(fmt.tokens())}
    vocab = SidVocab.bind(fmt, ids.get)
    assert vocab.begin_ids == (100,) and vocab.end_ids == ()
    assert [level.tolist() for level in vocab.level_ids] == [[101, 102], [103, 104, 105]]
    np.testing.assert_array_equal(vocab.paths(np.array([[1, 2], [0, 0]])), [[102, 105], [101, 103]])
    with pytest.raises(ValueError, match=r"row 1: code 3 is out of range \[0, 3\) at level 1"):
        vocab.paths(np.array([[1, 2], [0, 3]]))
    with pytest.raises(ValueError, match="2 levels"):
        vocab.paths(np.array([[1, 2, 0]]))


def test_vocab_refuses_missing_and_shared_tokens() -> None:
    fmt = letters_format((2, 2))
    with pytest.raises(ValueError, match=r"lacks 4 of 4 SID tokens \(<a_0>, <a_1>, <b_0>, <b_1>"):
        SidVocab.bind(fmt, lambda token: None)
    with pytest.raises(ValueError, match="the same id"):
        SidVocab.bind(fmt, lambda token: 7)
