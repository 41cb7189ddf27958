"""The project's own format: load inverts write, and every kind of bad row."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.catalog import Catalog
from rollout.data import DataError, World, load_world, write_world
from rollout.sid import letters_format, onerec_format
from rollout.types import Record
from tests.data_dir import shared_data

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def assert_same(left: World, right: World) -> None:
    """Catalogue and splits are equal, down to types of arrays."""
    assert left.splits == right.splits
    for name in ("format", "item_ids", "titles", "categories"):
        assert getattr(left.catalog, name) == getattr(right.catalog, name)
    for name in ("codes_NL", "popularity_N", "embeddings_ND"):
        mine, theirs = getattr(left.catalog, name), getattr(right.catalog, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = tuple(draw(st.lists(st.integers(1, 9000), min_size=1, max_size=5)))
    fmt = draw(st.sampled_from([letters_format, onerec_format]))(sizes)
    ids = draw(st.lists(TEXT, min_size=1, max_size=6, unique=True))
    n = len(ids)
    codes = [[draw(st.integers(0, size - 1)) for size in sizes] for _ in ids]
    width = draw(st.sampled_from([0, 1, 3]))
    number = st.floats(-1e6, 1e6, width=32)
    catalog = Catalog.build(
        fmt,
        ids,
        np.array(codes),
        titles=[draw(TEXT) for _ in ids],
        categories=[draw(TEXT) for _ in ids],
        popularity_N=np.array([draw(st.floats(0, 1e9)) for _ in ids]),
        embeddings_ND=np.array([[draw(number) for _ in range(width)] for _ in ids]) if width else None,
    )
    items = st.lists(st.integers(0, n - 1), max_size=4)
    message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
    prompt = st.one_of(st.none(), TEXT, st.lists(message, min_size=1, max_size=3).map(tuple))

    def record(split: str, row: int) -> Record:
        targets = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
        gains = tuple(draw(st.floats(1e-6, 1e6)) for _ in targets)
        candidates = draw(st.one_of(st.none(), st.lists(st.integers(0, n - 1), min_size=1, max_size=4).map(tuple)))
        return Record(
            f"{split}.csv:{row}",
            draw(TEXT),
            tuple(draw(items)),
            tuple(targets),
            gains,
            draw(prompt),
            draw(st.sampled_from(["next_item", "ad_rec", ""])),
            candidates,
            tuple(draw(st.lists(st.sampled_from(range(len(catalog))), unique=True, max_size=3))),
        )

    splits = draw(st.lists(st.sampled_from(["train", "valid", "test"]), min_size=1, unique=True))
    rows = {split: tuple(record(split, row) for row in range(draw(st.integers(0, 3)))) for split in splits}
    return World(catalog, rows, (), "sidrl")


@settings(max_examples=60, deadline=None)
@given(worlds())
def test_load_inverts_write(world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_world(world, Path(folder) / "new" / "world")
        again = load_world(Path(folder) / "new" / "world")
        assert [path.name for path in (Path(folder) / "new").iterdir()] == ["world"]
    assert (again.format, again.problems) == ("sidrl", ())
    assert_same(world, again)


def test_real_data_survives_the_round_trip(tmp_path: Path) -> None:
    world = load_world(shared_data("amazon-industrial"))
    write_world(world, tmp_path / "native")
    assert_same(world, load_world(tmp_path / "native"))


FORMAT = {"patterns": ["<a_{}>", "<b_{}>"], "sizes": [4, 4]}
ITEMS: dict[str, Any] = {"item_id": ["x", "y", "z"], "sid": [[0, 1], [2, 3], [0, 1]]}
ROWS: dict[str, Any] = {"user": ["u", "v"], "history": [["x"], []], "targets": [["y"], ["z", "x"]]}


def write(folder: Path, items: dict[str, Any] = ITEMS, rows: dict[str, Any] = ROWS, fmt: object = FORMAT) -> Path:
    (folder / "format.json").write_text(json.dumps(fmt))
    pq.write_table(pa.table(items), folder / "items.parquet")
    pq.write_table(pa.table(rows), folder / "train.parquet")
    return folder


def whys(world: World) -> list[tuple[str, int | str, str]]:
    return [(problem.file, problem.row, problem.why) for problem in world.problems]


def test_optional_columns_have_defaults(tmp_path: Path) -> None:
    world = load_world(write(tmp_path))
    assert world.problems == ()
    first, second = world.splits["train"]
    assert first == Record("train.parquet:0", "u", (0,), (1,), (1.0,))
    assert second == Record("train.parquet:1", "v", (), (2, 0), (1.0, 1.0))
    assert world.catalog.titles == ("", "", "")
    assert world.catalog.popularity_N.tolist() == [1, 1, 1]
    assert world.catalog.embeddings_ND is None


def test_nulls_of_optional_columns_are_defaults(tmp_path: Path) -> None:
    rows = ROWS | {"user": [None, "v"], "history": [None, []], "gains": [None, [2.0, 0.5]], "task": [None, "t"]}
    items = ITEMS | {"title": ["X", None, "Z"], "popularity": [7, None, 0]}
    world = load_world(write(tmp_path, items, rows))
    first, second = world.splits["train"]
    assert (first.user, first.history, first.gains, first.task) == ("", (), (1.0,), "next_item")
    assert (second.gains, second.task) == ((2.0, 0.5), "t")
    assert world.catalog.titles == ("X", "", "Z")
    assert world.catalog.popularity_N.tolist() == [7, 0, 0]


@pytest.mark.parametrize(
    ("changes", "why", "said"),
    [
        ({"targets": []}, "empty-target", "targets is empty"),
        ({"targets": None}, "empty-target", "targets is empty"),
        ({"targets": ["q"]}, "unknown-item", "targets item 'q'"),
        ({"history": ["q"]}, "unknown-item", "history item 'q'"),
        ({"history": [None]}, "missing-field", "history holds a null"),
        ({"candidates": ["q"]}, "unknown-item", "candidates item 'q'"),
        ({"candidates": []}, "empty-candidates", "null stands for the whole catalogue"),
        ({"targets": ["x", "x"]}, "duplicate-target", "named twice"),
        ({"gains": [1.0, 1.0]}, "bad-gains", "1 targets need as many gains"),
        ({"gains": [0.0]}, "bad-gains", "each > 0"),
        ({"gains": [float("nan")]}, "bad-gains", "each > 0"),
        ({"messages": "{"}, "wrong-type", "not JSON"),
        ({"messages": "[]"}, "missing-field", "messages are empty"),
        ({"messages": "[1]", "prompt": "p"}, "two-prompts", "both a prompt and messages"),
    ],
)
def test_bad_row_is_named_and_left_out(tmp_path: Path, changes: dict[str, Any], why: str, said: str) -> None:
    good = {"user": "u", "history": ["x"], "targets": ["y"]}
    rows = pa.Table.from_pylist(
        [good, good | changes],
        schema=pa.schema(
            [
                ("user", pa.string()),
                ("prompt", pa.string()),
                ("messages", pa.string()),
                ("gains", pa.list_(pa.float64())),
            ]
            + [(name, pa.list_(pa.string())) for name in ("history", "targets", "candidates")]
        ),
    )
    folder = write(tmp_path)
    pq.write_table(rows, folder / "train.parquet")
    world = load_world(folder)
    assert whys(world) == [("train.parquet", 1, why)]
    assert said in world.problems[0].detail
    assert len(world.splits["train"]) == 1


def test_bad_items_are_named_and_left_out(tmp_path: Path) -> None:
    items = {
        "item_id": ["x", "y", "z", "x", "w", None, "q"],
        "sid": [[0, 1], [2, 3], [0, 4], [1, 1], [1], [0, 0], [0, 0]],
        "embedding": [[0.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0]],
    }
    world = load_world(write(tmp_path, items))
    assert world.catalog.item_ids == ("x", "y")
    assert whys(world) == [
        ("items.parquet", 2, "code-out-of-range"),
        ("items.parquet", 3, "duplicate-item"),
        ("items.parquet", 4, "wrong-depth"),
        ("items.parquet", 5, "missing-field"),
        ("items.parquet", 6, "bad-embedding"),
        ("train.parquet", 1, "unknown-item"),
    ]
    assert world.problems[0].detail == "item 'z': code 4 is out of range [0, 4) at level 1"


def test_embeddings_that_are_no_numbers_are_bad(tmp_path: Path) -> None:
    world = load_world(write(tmp_path, ITEMS | {"embedding": [[0.0], [float("nan")], None]}))
    assert whys(world)[:2] == [("items.parquet", 1, "bad-embedding"), ("items.parquet", 2, "bad-embedding")]


def test_an_embedding_column_of_nulls_is_none(tmp_path: Path) -> None:
    world = load_world(write(tmp_path, ITEMS | {"embedding": pa.array([None] * 3, pa.list_(pa.float32()))}))
    assert world.problems == () and world.catalog.embeddings_ND is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fmt": {"patterns": ["<a_{}>"]}}, r"format.json: sid format: unknown keys \[\], missing keys \['sizes'\]"),
        ({"fmt": {"patterns": ["<a_{}>"], "sizes": 4}}, "format.json"),
        ({"fmt": {"patterns": 5, "sizes": [4]}}, "format.json"),
        ({"items": {"item_id": ["x"]}}, r"items.parquet: lacks the columns \['sid'\]; it has \['item_id'\]"),
        ({"items": ITEMS | {"item_id": [[1], [2], [3]]}}, "items.parquet: column 'item_id' is list"),
        ({"items": ITEMS | {"popularity": ["a", "b", "c"]}}, "items.parquet: column 'popularity' is string"),
        ({"items": {"item_id": ["x"], "sid": [[0, 9]]}}, "items.parquet: has no usable item; the first of 1 problems"),
        ({"rows": {"user": ["u"], "history": [["x"]]}}, r"train.parquet: lacks the columns \['targets'\]"),
        ({"rows": ROWS | {"history": ["x", "y"]}}, "train.parquet: column 'history' is string"),
    ],
)
def test_broken_file_is_an_error_that_names_it(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_world(write(tmp_path, **change))


def test_writing_never_overwrites(tmp_path: Path) -> None:
    world = load_world(write(tmp_path))
    with pytest.raises(DataError, match="exists already"):
        write_world(world, tmp_path)
    (tmp_path / "empty").mkdir()
    write_world(world, tmp_path / "empty")
    assert_same(world, load_world(tmp_path / "empty"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    world = load_world(write(tmp_path))
    broken = World(world.catalog, {"train": ("no record",)}, (), "sidrl")  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        write_world(broken, tmp_path / "new" / "world")
    assert list((tmp_path / "new").iterdir()) == []
