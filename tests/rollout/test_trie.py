"""SidTrie against a trie of dicts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.trie import ILLEGAL, SidTrie

VOCAB = 400
Path_ = tuple[int, ...]


class DictTrie:
    """The oracle: prefixes in a dict."""

    def __init__(self, paths: list[Path_]) -> None:
        self.depth = len(paths[0])
        self.children: dict[Path_, list[int]] = {}
        for path in sorted(set(paths)):
            for cut in range(self.depth):
                following = self.children.setdefault(path[:cut], [])
                if path[cut] not in following:
                    following.append(path[cut])
        self.leaves = sorted(set(paths))
        self.row_of = {path: paths.index(path) for path in self.leaves}  # the first input path, duplicates and all


@st.composite
def path_lists(draw: st.DrawFn, max_depth: int = 4) -> list[Path_]:
    """Paths in any order, with duplicates; narrow alphabets make shared prefixes, wide ones several byte widths."""
    depth = draw(st.integers(1, max_depth))
    highs = draw(st.lists(st.sampled_from([0, 1, 3, 300]), min_size=depth, max_size=depth))
    base = draw(st.integers(0, VOCAB - 301))
    path = st.tuples(*(st.integers(base, base + high) for high in highs))
    return draw(st.lists(path, min_size=1, max_size=30))


def node_of(trie: SidTrie, prefix: Path_) -> int:
    node = 0
    for token in prefix:
        node = int(trie.find(np.array([node]), np.array([token]))[0])
    return node


# --- against the oracle


@settings(max_examples=200, deadline=None)
@given(path_lists())
def test_equals_a_dict_trie(paths: list[Path_]) -> None:
    trie, oracle = SidTrie.from_paths(paths, VOCAB), DictTrie(paths)
    assert trie.depth == oracle.depth
    assert trie.num_leaves == len(oracle.leaves)
    assert trie.num_nodes == len(oracle.children) + len(oracle.leaves)
    assert [tuple(path) for path in trie.paths().tolist()] == oracle.leaves
    nodes = {prefix: node_of(trie, prefix) for prefix in oracle.children}
    assert len(set(nodes.values())) == len(nodes)
    for prefix, node in nodes.items():
        assert trie.children(node).tolist() == oracle.children[prefix]
        assert trie.level_of(np.array([node])).tolist() == [len(prefix)]
        if prefix:
            assert trie.token_of(np.array([node])).tolist() == [prefix[-1]]
    leaves = np.array([node_of(trie, path) for path in oracle.leaves])
    assert trie.rows(leaves).tolist() == [oracle.row_of[path] for path in oracle.leaves]
    assert trie.level_of(leaves).tolist() == [oracle.depth] * len(leaves)


@settings(max_examples=100, deadline=None)
@given(path_lists(), st.data())
def test_children_batch(paths: list[Path_], data: st.DataObject) -> None:
    trie, oracle = SidTrie.from_paths(paths, VOCAB), DictTrie(paths)
    prefixes = data.draw(st.lists(st.sampled_from(sorted(oracle.children)), max_size=10))
    tokens, offsets = trie.children_batch(np.array([node_of(trie, prefix) for prefix in prefixes], dtype=np.int64))
    assert len(offsets) == len(prefixes) + 1 and offsets[-1] == len(tokens)
    for row, prefix in enumerate(prefixes):
        assert tokens[offsets[row] : offsets[row + 1]].tolist() == oracle.children[prefix]


@settings(max_examples=100, deadline=None)
@given(path_lists(), st.data())
def test_find_and_walk(paths: list[Path_], data: st.DataObject) -> None:
    trie, oracle = SidTrie.from_paths(paths, VOCAB), DictTrie(paths)
    token = st.one_of(st.sampled_from(sorted({t for path in paths for t in path})), st.integers(-3, VOCAB + 3))
    tried = st.lists(token, min_size=oracle.depth, max_size=oracle.depth).map(tuple)
    tokens = data.draw(st.lists(st.one_of(st.sampled_from(paths), tried), min_size=1, max_size=8))
    nodes_BT = trie.walk(np.array(tokens))
    assert nodes_BT.shape == (len(tokens), oracle.depth + 1)
    for path, nodes in zip(tokens, nodes_BT.tolist(), strict=True):
        assert nodes[0] == 0
        for cut in range(1, oracle.depth + 1):
            legal = any(leaf[:cut] == path[:cut] for leaf in oracle.leaves)
            assert nodes[cut] == (node_of(trie, path[:cut]) if legal else ILLEGAL)
            assert (nodes[cut] != ILLEGAL) == legal
    ends = [oracle.row_of.get(path, ILLEGAL) for path in tokens]
    assert trie.rows(nodes_BT[:, -1]).tolist() == ends


@settings(max_examples=100, deadline=None)
@given(path_lists(), st.data())
def test_subset(paths: list[Path_], data: st.DataObject) -> None:
    trie, oracle = SidTrie.from_paths(paths, VOCAB), DictTrie(paths)
    kept = data.draw(st.lists(st.sampled_from(oracle.leaves), min_size=1, max_size=8))
    part = trie.subset([oracle.row_of[path] for path in kept])
    assert [tuple(path) for path in part.paths().tolist()] == sorted(set(kept))
    assert part.vocab_size == VOCAB
    # Rows keep the numbers of the whole trie, also through a subset of a subset.
    assert part.rows(part.walk(np.array(kept))[:, -1]).tolist() == [oracle.row_of[path] for path in kept]
    smaller = part.subset([oracle.row_of[kept[0]]])
    assert smaller.rows(smaller.walk(np.array(kept[:1]))[:, -1]).tolist() == [oracle.row_of[kept[0]]]


@settings(max_examples=50, deadline=None)
@given(path_lists(), st.randoms())
def test_order_does_not_matter(paths: list[Path_], random: Random) -> None:
    shuffled = list(paths)
    random.shuffle(shuffled)
    one, two = SidTrie.from_paths(paths, VOCAB), SidTrie.from_paths(shuffled, VOCAB)
    for name in ("level_start", "first_child", "bases"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for mine, other in zip(one.edges, two.edges, strict=True):
        np.testing.assert_array_equal(mine, other)
    np.testing.assert_array_equal(np.array(paths)[one.row_of_leaf], np.array(shuffled)[two.row_of_leaf])


# --- by hand

SMALL = [(3, 7), (1, 9), (3, 5), (1, 9)]  # leaves (1,9) (3,5) (3,7); nodes 0 | 1, 3 -> 1, 2 | 3, 4, 5


def small() -> SidTrie:
    return SidTrie.from_paths(SMALL, 10)


def test_small_trie() -> None:
    trie = small()
    assert (trie.depth, trie.num_leaves, trie.num_nodes) == (2, 3, 6)
    assert trie.level_start.tolist() == [0, 1, 3, 6]
    assert trie.first_child.tolist() == [1, 3, 4, 6]
    assert trie.bases.tolist() == [1, 5]
    assert [edges.tolist() for edges in trie.edges] == [[0, 2], [4, 0, 2]]
    assert trie.row_of_leaf.tolist() == [1, 2, 0]  # (1, 9) stands in rows 1 and 3: the first counts
    assert [trie.children(node).tolist() for node in range(3)] == [[1, 3], [9], [5, 7]]
    assert trie.rows(np.array([5, 3, 0, -1, 2])).tolist() == [0, 1, -1, -1, -1]
    assert trie.walk(np.array([[3, 5], [3, 6], [2, 9]])).tolist() == [[0, 2, 4], [0, 2, -1], [0, -1, -1]]


def test_one_item() -> None:
    trie = SidTrie.from_paths([(4, 4, 4)], 5)
    assert (trie.num_leaves, trie.num_nodes) == (1, 4)
    assert [trie.children(node).tolist() for node in range(3)] == [[4], [4], [4]]
    assert trie.walk(np.array([[4, 4, 4]])).tolist() == [[0, 1, 2, 3]]
    assert trie.rows(np.array([3])).tolist() == [0]
    assert trie.paths().tolist() == [[4, 4, 4]]


def test_depth_one() -> None:
    trie = SidTrie.from_paths([[7], [2], [7], [5]], 8)
    assert trie.children(0).tolist() == [2, 5, 7]
    assert trie.find(np.zeros(4, int), np.array([2, 3, 5, 7])).tolist() == [1, -1, 2, 3]
    assert trie.rows(np.array([1, 2, 3])).tolist() == [1, 3, 0]
    assert trie.paths().tolist() == [[2], [5], [7]]
    with pytest.raises(ValueError, match="node 1 has no children"):
        trie.children(1)


def test_wide_token_ids() -> None:
    """Labels beyond 16 bits, and ids near the top of a large vocabulary."""
    paths = [(0, 299_999), (0, 100_000), (299_999, 100_000)]
    trie = SidTrie.from_paths(paths, 300_000)
    assert [edges.dtype for edges in trie.edges] == [np.uint32, np.uint32]
    assert trie.paths().tolist() == [[0, 100_000], [0, 299_999], [299_999, 100_000]]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int32, np.uint64])
def test_any_integer_type(dtype: type) -> None:
    trie = SidTrie.from_paths(np.array([[100, 3], [2, 90], [2, 3]], dtype=dtype), 101)
    assert trie.paths().tolist() == [[2, 3], [2, 90], [100, 3]]
    assert trie.rows(trie.walk(np.array([[2, 90]]))[:, -1]).tolist() == [1]


def test_input_is_not_changed_or_kept() -> None:
    paths = np.array(SMALL)
    trie = SidTrie.from_paths(paths, 10)
    assert paths.tolist() == [list(path) for path in SMALL]
    paths[:] = 0
    assert trie.paths().tolist() == [[1, 9], [3, 5], [3, 7]]


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small().vocab_size = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "the catalogue is empty"),
        (np.zeros((0, 3), int), "the catalogue is empty"),
        (np.zeros((2, 0), int), "at least one level"),
        ([1, 2, 3], r"shape \[N, L\]"),
        ([[0.5]], "integers"),
        ([[1, 2], [3, 10]], r"path 1, level 1: token id 10 is outside the vocabulary \[0, 10\)"),
        ([[1, 2], [-1, 3]], r"path 1, level 0: token id -1 is outside"),
        ([[1, 2], [3]], "inhomogeneous"),
    ],
)
def test_from_paths_refuses(paths: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SidTrie.from_paths(paths, 10)


@pytest.mark.parametrize("node", [-1, 3, 5, 6, 1000])
def test_leaves_and_strangers_have_no_children(node: int) -> None:
    trie = small()
    with pytest.raises(ValueError, match=f"node {node} has no children"):
        trie.children(node)
    with pytest.raises(ValueError, match="nodes must be interior, 0 to 2"):
        trie.children_batch(np.array([0, node]))


def test_children_batch_of_nothing() -> None:
    tokens, offsets = small().children_batch(np.zeros(0, int))
    assert tokens.tolist() == [] and offsets.tolist() == [0]


def test_find_from_leaves_and_dead_prefixes() -> None:
    trie = small()
    nodes = np.array([3, 5, ILLEGAL, 6, 1000, 0])
    assert trie.find(nodes, np.array([9, 7, 1, 1, 1, 1])).tolist() == [-1, -1, -1, -1, -1, 1]
    assert trie.find(np.zeros(0, int), np.zeros(0, int)).tolist() == []
    extreme = np.array([-1, -(2**62), 2**62, 2**31, 256 + 1])  # 257: 1 modulo the labels' byte
    assert trie.find(np.zeros(5, int), extreme).tolist() == [-1] * 5


def test_find_does_not_reach_the_neighbours_children() -> None:
    trie = SidTrie.from_paths([(0, 5), (1, 6), (2, 7)], 10)
    assert trie.find(np.array([1, 2, 2, 3]), np.array([6, 5, 7, 6])).tolist() == [-1, -1, -1, -1]


def test_advance() -> None:
    trie = small()
    assert trie.advance(np.array([0, 2]), np.array([1, 7])).tolist() == [1, 5]
    with pytest.raises(ValueError, match="row 1: token 8 does not follow node 2"):
        trie.advance(np.array([0, 2]), np.array([1, 8]))
    with pytest.raises(ValueError, match="row 0: token 9 does not follow node 3"):
        trie.advance(np.array([3]), np.array([9]))
    with pytest.raises(ValueError, match="row 0: token 1 does not follow node -1"):
        trie.advance(np.array([ILLEGAL]), np.array([1]))


def test_walk_of_prefixes_and_of_too_much() -> None:
    trie = small()
    assert trie.walk(np.array([[3]])).tolist() == [[0, 2]]
    assert trie.walk(np.array([[3, 7, 1]])).tolist() == [[0, 2, 5, -1]]
    assert trie.walk(np.zeros((2, 0), int)).tolist() == [[0], [0]]


def test_subset_refuses() -> None:
    trie = small()
    with pytest.raises(ValueError, match=r"1 of 2 sids are not in the trie, first \[17\]"):
        trie.subset([0, 17])
    with pytest.raises(ValueError, match="1 of 1 sids are not in the trie"):
        trie.subset([3])  # row 3 repeats row 1, which is the leaf's name
    with pytest.raises(ValueError, match="empty"):
        trie.subset([])


# --- files


def assert_same(one: SidTrie, two: SidTrie) -> None:
    assert one.vocab_size == two.vocab_size and one.depth == two.depth and one.nbytes == two.nbytes
    for name in ("level_start", "first_child", "bases", "leaf_rows"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    for mine, other in zip(one.edges, two.edges, strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)


def test_save_and_load(tmp_path: Path) -> None:
    paths = np.random.default_rng(0).integers(0, 300, (500, 3))
    trie = SidTrie.from_paths(paths, 300)
    trie.save(tmp_path / "new" / "trie")
    loaded = SidTrie.load(tmp_path / "new" / "trie")
    assert_same(trie, loaded)
    assert all(isinstance(array, np.memmap) for array in (loaded.first_child, loaded.leaf_rows, *loaded.edges))
    np.testing.assert_array_equal(loaded.walk(paths), trie.walk(paths))
    assert_same(loaded.subset([0, 1]), trie.subset([0, 1]))
    with pytest.raises(ValueError, match="read-only"):
        loaded.first_child[0] = 5


def test_files_are_plain(tmp_path: Path) -> None:
    small().save(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".npy", ".json"}
    for file in tmp_path.glob("*.npy"):
        assert np.load(file, allow_pickle=False).dtype.kind in "iu"


ARRAYS = ["level_start.npy", "first_child.npy", "bases.npy", "leaf_rows.npy", "edges_0.npy", "edges_1.npy"]
FILES = [*ARRAYS, "trie.json"]


@pytest.mark.parametrize("name", FILES)
def test_load_refuses_a_truncated_file(tmp_path: Path, name: str) -> None:
    small().save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"not a saved trie, or is broken"):
        SidTrie.load(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_load_refuses_an_empty_file(tmp_path: Path, name: str) -> None:
    small().save(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"not a saved trie, or is broken"):
        SidTrie.load(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_load_refuses_a_missing_file(tmp_path: Path, name: str) -> None:
    small().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"not a saved trie"):
        SidTrie.load(tmp_path)


@pytest.mark.parametrize("name", ARRAYS)
def test_load_refuses_an_array_of_another_length(tmp_path: Path, name: str) -> None:
    small().save(tmp_path)
    array = np.load(tmp_path / name)
    np.save(tmp_path / name, array[:-1])
    with pytest.raises(ValueError, match=r"do not fit together|is broken"):
        SidTrie.load(tmp_path)


def test_load_refuses_an_absent_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a saved trie"):
        SidTrie.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value"),
    [("kind", "x"), ("version", 1), ("depth", 1), ("depth", 3), ("depth", 0), ("depth", None), ("vocab_size", "many")],
)
def test_load_refuses_a_wrong_header(tmp_path: Path, key: str, value: object) -> None:
    small().save(tmp_path)
    header = json.loads((tmp_path / "trie.json").read_text())
    (tmp_path / "trie.json").write_text(json.dumps(header | {key: value}))
    with pytest.raises(ValueError):
        SidTrie.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", '"trie"', "{}", "null"])
def test_load_refuses_a_header_that_is_no_header(tmp_path: Path, text: str) -> None:
    small().save(tmp_path)
    (tmp_path / "trie.json").write_text(text)
    with pytest.raises(ValueError):
        SidTrie.load(tmp_path)


def test_load_refuses_pickles(tmp_path: Path) -> None:
    small().save(tmp_path)
    np.save(tmp_path / "bases.npy", np.array([1, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="broken"):
        SidTrie.load(tmp_path)


# --- size


def test_bytes_per_item_of_a_million(tmp_path: Path) -> None:
    """A catalogue's paths come sorted: no row of a leaf is stored, and none is read from the file."""
    codes = np.random.default_rng(0).integers(0, 8192, (1_000_000, 3), dtype=np.int32)
    paths = np.unique(codes, axis=0) + np.array([0, 8192, 16384], dtype=np.int32)
    trie = SidTrie.from_paths(paths, 3 * 8192)
    assert trie.nbytes / trie.num_leaves <= 8.01
    assert len(trie.leaf_rows) == 0
    assert trie.row_of_leaf.tolist() == list(range(len(paths)))
    trie.save(tmp_path)
    assert_same(SidTrie.load(tmp_path), trie)
    some = np.arange(0, len(paths), 999)
    np.testing.assert_array_equal(SidTrie.load(tmp_path).rows(trie.walk(paths[some])[:, -1]), some)


@pytest.mark.parametrize("swap", [(0, 1), (2, 3), (5, 6), (0, 7)])
def test_order_is_seen(swap: tuple[int, int]) -> None:
    """Two rows out of place, at any level: the leaves' rows are kept."""
    paths = np.array([(1, 5, 9), (1, 5, 12), (1, 6, 9), (2, 5, 9), (2, 5, 10), (2, 5, 11), (3, 1, 1), (3, 1, 2)])
    trie = SidTrie.from_paths(paths, 20)
    assert len(trie.leaf_rows) == 0
    one, two = swap
    paths[[one, two]] = paths[[two, one]]
    mixed = SidTrie.from_paths(paths, 20)
    np.testing.assert_array_equal(paths[mixed.row_of_leaf], trie.paths())
    assert mixed.row_of_leaf[one] == two and mixed.row_of_leaf[two] == one
