"""Catalog: columns, collisions and errors."""

import numpy as np
import pytest

from rollout.catalog import Catalog, Item
from rollout.sid import letters_format

FMT = letters_format((4, 4))


def build(codes: list[list[int]], **columns: object) -> Catalog:
    return Catalog.build(FMT, [f"i{index}" for index in range(len(codes))], np.array(codes), **columns)  # type: ignore[arg-type]


def test_columns_left_out_are_blank() -> None:
    catalog = build([[0, 1], [3, 2]])
    assert catalog.item(1) == Item(1, "i1", (3, 2), "", "")
    assert catalog.popularity_N.tolist() == [0, 0]
    assert catalog.embeddings_ND is None
    assert catalog.index_of == {"i0": 0, "i1": 1}


def test_collisions_are_known_in_both_directions() -> None:
    catalog = build([[2, 1], [0, 3], [2, 1], [0, 0], [2, 1]])
    assert catalog.sids_SL.tolist() == [[0, 0], [0, 3], [2, 1]]
    assert catalog.sid_index_N.tolist() == [2, 1, 2, 0, 2]
    assert catalog.sid_index_of == {(0, 0): 0, (0, 3): 1, (2, 1): 2}
    assert [catalog.items_of_sid(sid) for sid in range(3)] == [(3,), (1,), (0, 2, 4)]
    assert catalog.cluster_sizes_S.tolist() == [1, 1, 3]
    assert catalog.collisions == 2


def test_catalogue_without_collisions() -> None:
    catalog = build([[1, 1], [0, 1]])
    assert catalog.collisions == 0
    assert [catalog.items_of_sid(catalog.sid_index_of[catalog.sid(item)]) for item in range(2)] == [(0,), (1,)]


@pytest.mark.parametrize(
    ("codes", "columns", "said"),
    [
        ([], {}, "catalogue is empty"),
        ([[0, 0, 0]], {}, "need codes of that shape"),
        ([[0, 4]], {}, r"item 'i0': code 4 is out of range \[0, 4\) at level 1"),
        ([[0, 0], [-1, 0]], {}, r"item 'i1': code -1 is out of range \[0, 4\) at level 0"),
        ([[0, 0]], {"titles": ["a", "b"]}, "column titles has 2 rows for 1 items"),
        ([[0, 0]], {"categories": []}, "column categories has 0 rows"),
        ([[0, 0]], {"popularity_N": np.zeros(3)}, "column popularity_N has 3 rows"),
        ([[0, 0]], {"embeddings_ND": np.zeros((2, 5))}, "column embeddings_ND has 2 rows"),
    ],
)
def test_wrong_columns_are_refused(codes: list[list[int]], columns: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(codes, **columns)


def test_repeated_item_is_named() -> None:
    with pytest.raises(ValueError, match="item id 'x' stands twice"):
        Catalog.build(FMT, ["x", "y", "x"], np.zeros((3, 2)))
