"""MiniOneRec's files: what is read, and every kind of bad row."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rollout.data import DataError, Problem, World, load_world
from tests.data_dir import shared_data

INDEX: dict[str, Any] = {
    "10": ["<a_1>", "<b_2>", "<c_3>"],
    "11": ["<a_1>", "<b_2>", "<c_300>"],
    "12": ["<a_1>", "<b_2>", "<c_3>"],
    "13": ["<a_255>", "<b_0>", "<c_0>"],
}
ITEMS: dict[str, dict[str, Any]] = {
    "10": {"title": "ten, 'quoted'", "categories": ""},
    "11": {"title": "eleven", "categories": "['Tools', 'Saws']"},
    "12": {"title": "twelve", "categories": [["Toys", "Cars"]]},
    "13": {"title": "thirteen", "categories": "Paint"},
}
HEADER = ["user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid"]


def row(user: str, history: Sequence[str], target: str, **changes: str) -> list[str]:
    """A CSV row as MiniOneRec writes it."""
    sid = {item: "".join(tokens) for item, tokens in INDEX.items()}
    fields = {
        "user_id": user,
        "history_item_title": repr([ITEMS[item]["title"] for item in history]),
        "item_title": str(ITEMS[target]["title"]),
        "history_item_id": f"[{', '.join(history)}]",
        "item_id": target,
        "history_item_sid": repr([sid[item] for item in history]),
        "item_sid": sid[target],
    }
    return list((fields | changes).values())


def write(folder: Path, train: Sequence[Sequence[str]], index: object = INDEX, items: object = ITEMS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Toys.index.json").write_text(json.dumps(index))
    (folder / "Toys.item.json").write_text(json.dumps(items))
    write_csv(folder / "train.csv", [HEADER, *train])
    return folder


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def problems_of(world: World) -> list[tuple[str, int | str, str]]:
    return [(problem.file, problem.row, problem.why) for problem in world.problems]


def test_reads_catalogue_and_rows(tmp_path: Path) -> None:
    folder = write(
        tmp_path, [row("u1", ["10", "11"], "13"), row("u1", ["10", "11", "13"], "12"), row("u2", ["13"], "12")]
    )
    (folder / "info.txt").write_text("<a_1><b_2><c_3>\tten\t10\n\n<a_255><b_0><c_0>\tthirteen\t13\n")
    world = load_world(folder)
    catalog = world.catalog
    assert (world.format, world.problems) == ("minionerec", ())
    assert (catalog.format.patterns, catalog.format.sizes) == (("<a_{}>", "<b_{}>", "<c_{}>"), (256, 256, 512))
    assert catalog.item_ids == ("10", "11", "12", "13")
    assert catalog.codes_NL.tolist() == [[1, 2, 3], [1, 2, 300], [1, 2, 3], [255, 0, 0]]
    assert catalog.titles == ("ten, 'quoted'", "eleven", "twelve", "thirteen")
    assert catalog.categories == ("", "Tools", "Toys", "Paint")
    assert catalog.collisions == 1
    assert catalog.popularity_N.tolist() == [0, 0, 2, 1]
    records = world.splits["train"]
    assert list(world.splits) == ["train"]
    assert [record.source for record in records] == ["train.csv:2", "train.csv:3", "train.csv:4"]
    assert [(r.user, r.history, r.targets) for r in records] == [
        ("u1", (0, 1), (3,)),
        ("u1", (0, 1, 3), (2,)),
        ("u2", (3,), (2,)),
    ]


def test_same_history_keeps_each_row_its_own_target(tmp_path: Path) -> None:
    targets = ["11", "12", "13", "11"]
    world = load_world(write(tmp_path, [row(f"u{i}", ["10", "11"], target) for i, target in enumerate(targets)]))
    assert [record.targets for record in world.splits["train"]] == [(1,), (2,), (3,), (1,)]
    assert len({record.history for record in world.splits["train"]}) == 1


def test_original_layout_of_several_catalogues(tmp_path: Path) -> None:
    for name in ("Toys", "Office_Products"):
        write(tmp_path / "flat" / name, [])
        (tmp_path / "index").mkdir(exist_ok=True)
        (tmp_path / "index" / f"{name}.index.json").write_text(json.dumps(INDEX))
        for split in ("train", "valid", "test"):
            write_csv(tmp_path / split / f"{name}_5_2016-10-2018-11.csv", [HEADER, row(name, ["10"], "11")])
    with pytest.raises(DataError, match=r"needs one \*.index.json.*Office_Products.index.json.*Toys.index.json"):
        load_world(tmp_path)
    world = load_world(tmp_path / "index" / "Toys.index.json")
    assert world.problems == ()
    assert {split: [(r.user, r.source) for r in rows] for split, rows in world.splits.items()} == {
        split: [("Toys", f"{split}/Toys_5_2016-10-2018-11.csv:2")] for split in ("train", "valid", "test")
    }
    assert world.catalog.titles == ("", "", "", "")


def test_rows_with_sids_alone_count_every_item_of_a_sid(tmp_path: Path) -> None:
    folder = write(tmp_path, [])
    header = ["user_id", "history_item_sid", "item_sid"]
    good = ["u", "['<a_1><b_2><c_3>', '<a_255><b_0><c_0>']", "<a_1><b_2><c_3>"]
    bad = [["u", "[]", "<a_1><b_2>"], ["u", "[]", "<a_1><b_999><c_3>"], ["u", "['<a_9><b_9><c_9>']", "<a_1><b_2><c_3>"]]
    write_csv(folder / "train.csv", [header, good, *bad])
    world = load_world(folder)
    (record,) = world.splits["train"]
    assert (record.history, record.targets, record.gains) == ((0, 3), (0, 2), (1.0, 1.0))
    assert [problem.why for problem in world.problems] == ["bad-sid", "code-out-of-range", "unknown-item"]


def test_lines_are_counted_over_fields_with_line_breaks(tmp_path: Path) -> None:
    rows = [
        row("u1", ["10"], "11", item_title="two\nlines"),
        row("u2", ["10"], "11"),
        row("u3", ["99"][:0], "11", item_id="99"),
    ]
    world = load_world(write(tmp_path, rows))
    assert [record.source for record in world.splits["train"]] == ["train.csv:2", "train.csv:4"]
    assert problems_of(world) == [("train.csv", 5, "unknown-item")]


@pytest.mark.parametrize(
    ("changes", "why", "said"),
    [
        ({"item_id": "99"}, "unknown-item", "target item '99' is not in the catalogue"),
        ({"history_item_id": "[10, 98]"}, "unknown-item", "history item '98'"),
        ({"user_id": ""}, "missing-field", "user_id is empty"),
        ({"history_item_id": ""}, "missing-field", "history_item_id is empty"),
        ({"item_id": ""}, "empty-target", "item_id is empty"),
        ({"history_item_id": "[10, 11"}, "wrong-type", "no Python list"),
        ({"history_item_id": "10"}, "wrong-type", "must be a list of item ids"),
        ({"history_item_id": "[1.5]"}, "wrong-type", "must be a list of item ids"),
        ({"history_item_id": "__import__('os').abort()"}, "wrong-type", "no Python list"),
        ({"history_item_sid": "{1: 2}"}, "wrong-type", "must be a list of texts"),
        ({"item_sid": "<a_1><b_2><c_3>"}, "sid-mismatch", "item 13 is '<a_1><b_2><c_3>' here and <a_255>"),
        ({"history_item_sid": "['<a_1><b_2><c_3>', '<a_1>']"}, "sid-mismatch", "the history is"),
    ],
)
def test_bad_row_is_named_and_left_out(tmp_path: Path, changes: dict[str, str], why: str, said: str) -> None:
    good = row("good", ["10"], "11")
    world = load_world(write(tmp_path, [good, row("u", ["10", "11"], "13", **changes), good]))
    (problem,) = world.problems
    assert (problem.file, problem.row, problem.why) == ("train.csv", 3, why)
    assert said in problem.detail
    assert [record.source for record in world.splits["train"]] == ["train.csv:2", "train.csv:4"]


def test_rows_of_wrong_width_are_named(tmp_path: Path) -> None:
    good = row("u", ["10"], "11")
    world = load_world(write(tmp_path, [good[:-1], [*good, "more"], good]))
    assert problems_of(world) == [("train.csv", 2, "missing-field"), ("train.csv", 3, "missing-field")]


def test_equal_lists_written_otherwise_are_no_mismatch(tmp_path: Path) -> None:
    changes = {"history_item_id": '["10",11 ]', "history_item_sid": '["<a_1><b_2><c_3>","<a_1><b_2><c_300>"]'}
    world = load_world(write(tmp_path, [row("u", ["10", "11"], "13", **changes)]))
    assert world.problems == () and world.splits["train"][0].history == (0, 1)


def test_bad_items_are_named_and_left_out(tmp_path: Path) -> None:
    bad = {
        "20": ["<a_1>", "<b_2>"],
        "21": "<a_1><b_2><c_3>",
        "22": ["<a_x>", "<b_2>", "<c_3>"],
        "23": ["<b_1>", "<a_2>", "<c_3>"],
        "24": ["<a_01>", "<b_2>", "<c_3>"],
        "25": ["<a_70000>", "<b_2>", "<c_3>"],
        "26": ["<a_" + "9" * 50 + ">", "<b_2>", "<c_3>"],
        "27": [],
    }
    folder = write(tmp_path, [row("u", ["10"], "11"), row("u", ["10"], "11", item_id="20")], index=INDEX | bad)
    (folder / "Toys.item.json").write_text(json.dumps(ITEMS | {"30": {"title": "x"}, "13": "thirteen"}))
    info = [
        "no tabs",
        "<a_1><b_2><c_3>\ta\t99",
        "<a_1><b_2><c_4>\tb\t10",
        "x\tc\t20",
        "<a_255><b_0><c_0>\tfrom info\t13",
    ]
    (folder / "info.txt").write_text("\n".join(info))
    world = load_world(folder)
    assert world.catalog.item_ids == ("10", "11", "12", "13")
    assert world.catalog.titles[3] == "from info"
    index, item = "Toys.index.json", "Toys.item.json"
    assert sorted(problems_of(world), key=str) == sorted(
        [
            (index, "20", "wrong-depth"),
            (index, "21", "wrong-type"),
            (index, "22", "bad-sid"),
            (index, "23", "bad-sid"),
            (index, "24", "bad-sid"),
            (index, "25", "code-out-of-range"),
            (index, "26", "code-out-of-range"),
            (index, "27", "wrong-type"),
            (item, "30", "missing-sid"),
            (item, "13", "wrong-type"),
            ("info.txt", 1, "missing-field"),
            ("info.txt", 2, "unknown-item"),
            ("info.txt", 3, "sid-mismatch"),
            ("train.csv", 3, "unknown-item"),
        ],
        key=str,
    )


def test_repeated_key_of_the_index_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, [row("u", ["10"], "11")])
    text = json.dumps(INDEX)[:-1] + ', "10": ["<a_9>", "<b_9>", "<c_9>"]}'
    (folder / "Toys.index.json").write_text(text)
    world = load_world(folder)
    assert world.problems == (
        Problem("Toys.index.json", "10", "duplicate-item", "the key stands twice; the first is kept"),
    )
    assert world.catalog.sid(0) == (1, 2, 3)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("Toys.index.json", b"", "cannot be read as JSON"),
        ("Toys.index.json", b'{"10": ["<a_1>", "<b', "cannot be read as JSON"),
        ("Toys.index.json", b"[1, 2]", "must hold a JSON object, holds a list"),
        ("Toys.index.json", b'{"10": 3}', "has no usable item; the first of 1 problems.*10: wrong-type"),
        ("Toys.index.json", b'{"1": ["<1>", "<2>"]}', "share a pattern"),
        ("Toys.index.json", b"\xff\xfe\x00", "cannot be read as JSON"),
        ("Toys.item.json", b'{"10": {', "cannot be read as JSON"),
        ("info.txt", b"\xff\xff", "cannot be read as UTF-8 text"),
        ("train.csv", b"", "needs the columns user_id"),
        ("train.csv", b"user_id,item_id\nu,10\n", "needs the columns user_id"),
        ("train.csv", b"history_item_id,item_id\n[],10\n", "needs the columns user_id"),
        ("train.csv", b"\xff\xff\xff,\n", "cannot be read as UTF-8 text"),
        (
            "train.csv",
            b'user_id,history_item_id,item_id\nu,[10],10\nu,"[10, 11],10\nu,[10],11\n',
            "begins on line 3 is not CSV",
        ),
    ],
)
def test_broken_file_is_an_error_that_names_it(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    folder = write(tmp_path, [row("u", ["10"], "11")])
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        load_world(folder)
    assert file in str(error.value)


def test_missing_rows_and_double_rows(tmp_path: Path) -> None:
    folder = write(tmp_path, [row("u", ["10"], "11")])
    write_csv(folder / "train" / "more.csv", [HEADER])
    with pytest.raises(DataError, match="the train rows stand in both train.csv and train/"):
        load_world(folder)
    (folder / "train" / "more.csv").unlink()
    (folder / "train.csv").unlink()
    with pytest.raises(DataError, match="no row files; expected train.csv"):
        load_world(folder)


def test_real_amazon_industrial() -> None:
    world = load_world(shared_data("amazon-industrial"))
    catalog = world.catalog
    assert world.problems == ()
    assert (len(catalog), len(catalog.sids_SL), catalog.collisions) == (3686, 3670, 16)
    assert catalog.format.sizes == (256, 256, 256)
    assert {split: len(rows) for split, rows in world.splits.items()} == {"train": 10393, "valid": 4532, "test": 4533}
    first = world.splits["train"][0]
    assert (first.source, first.user) == ("train.csv:2", "A5382")
    assert [catalog.item_ids[item] for item in first.history + first.targets] == ["3437", "642"]
    assert catalog.format.format(catalog.sid(first.targets[0])) == "<a_244><b_35><c_73>"
    assert catalog.popularity_N.sum() == 10393
    assert sum(len(rows) for rows in world.splits.values()) == len(
        {(s, r.source) for s, rows in world.splits.items() for r in rows}
    )
