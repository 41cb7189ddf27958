"""OpenOneRec's Parquet: what is read, and every kind of bad row."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data import DataError, World, load_world

SIDS = {1001: [1, 2, 3], 1002: [8191, 0, 5], 1003: [1, 2, 3]}
A, B, UNKNOWN = "<s_a_1><s_b_2><s_c_3>", "<s_a_8191><s_b_0><s_c_5>", "<s_a_7><s_b_7><s_c_7>"


def mark(body: str) -> str:
    return f"<|sid_begin|>{body}<|sid_end|>"


def chat(user: Any, answer: Any, system: str = "You recommend.") -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]


def row(messages: Any, source: str = "video_rec", metadata: Any = None) -> dict[str, Any]:
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in (messages, metadata)]
    return {"uuid": "x", "source": source, "messages": texts[0], "segments": None, "text": None, "metadata": texts[1]}


def write_map(path: Path, sids: dict[int, Any] = SIDS) -> None:
    pq.write_table(pa.table({"pid": list(sids), "sid": pa.array(list(sids.values()), pa.list_(pa.int64()))}), path)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "train-00000.parquet") -> Path:
    schema = pa.schema([(key, pa.string()) for key in row(None)])
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_map(folder / "pid2sid.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name)
    return folder


def whys(world: World) -> list[tuple[str, int | str, str]]:
    return [(problem.file, problem.row, problem.why) for problem in world.problems]


def test_reads_map_and_chats(tmp_path: Path) -> None:
    asked = f"I watched {mark(B)}{mark(A)}."
    answer = f"<think>surely {mark(B)}</think>\n{mark(A)}"
    parts = [{"type": "text", "text": "I watched "}, {"type": "text", "text": mark(B)}]
    rows = [
        row(chat(asked, answer), metadata={"uid": 7}),
        row(chat(parts, {"type": "text", "text": A + B + A}), "ad_rec"),
    ]
    world = load_world(write(tmp_path, rows))
    write(tmp_path, rows[:1], "val/part.parquet")
    assert (world.format, world.problems) == ("openonerec", ())
    assert world.catalog.format.sizes == (8192, 8192, 8192)
    assert world.catalog.item_ids == ("1001", "1002", "1003")
    first, second = world.splits["train"]
    assert (first.source, first.user, first.task) == ("train-00000.parquet:0", "7", "video_rec")
    assert first.prompt == ({"role": "system", "content": "You recommend."}, {"role": "user", "content": asked})
    assert (first.history, first.targets, first.gains) == ((1, 0), (0, 2), (1.0, 1.0))
    assert (second.user, second.task, second.history, second.targets) == ("", "ad_rec", (1,), (0, 2, 1))
    assert second.prompt is not None and second.prompt[1] == {"role": "user", "content": f"I watched {mark(B)}"}
    assert world.catalog.popularity_N.tolist() == [2, 1, 2]
    assert load_world(tmp_path).splits["valid"][0].source == "val/part.parquet:0"


def test_messages_as_structs_are_read_too(tmp_path: Path) -> None:
    write_map(tmp_path / "map.parquet")
    table = pa.table(
        {"source": ["s"], "messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": A}]]}
    )
    pq.write_table(table, tmp_path / "test.parquet")
    (record,) = load_world(tmp_path).splits["test"]
    assert record.targets == (0, 2) and record.history == ()


def test_several_maps_keep_equal_pids_apart(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(chat("?", B))])
    write_map(folder / "product_pid2sid.parquet", {1001: [8, 8, 8]})
    world = load_world(folder)
    assert world.problems == ()
    assert world.catalog.item_ids == ("pid2sid/1001", "pid2sid/1002", "pid2sid/1003", "product_pid2sid/1001")


def test_sizes_grow_with_the_codes(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(chat("?", A))])
    write_map(folder / "pid2sid.parquet", {1: [1, 2, 3], 2: [9000, 0, 0]})
    assert load_world(folder).catalog.format.sizes == (16384, 8192, 8192)


BAD_ROWS = [
    (None, "missing-field", "messages are empty"),
    ("{not json", "wrong-type", "messages are not JSON"),
    ({"role": "user"}, "wrong-type", "must be a list"),
    (["hi"], "wrong-type", "needs a role"),
    (chat("hi", 5), "wrong-type", "must be text"),
    (chat([{"type": "image"}], A), "wrong-type", "must be text"),
    (chat("hi", A)[:2], "missing-field", "last message must be the assistant's"),
    (chat("hi", A)[2:], "missing-field", "no message stands before"),
    (chat("hi", "a nice video"), "empty-target", "holds no sid"),
    (chat("hi", f"<think>{A}</think>no"), "empty-target", "holds no sid"),
    (chat("hi", f"<think>{A}"), "empty-target", "holds no sid"),
    (chat("hi", UNKNOWN), "unknown-item", "target sid <s_a_7><s_b_7><s_c_7>"),
    (chat(UNKNOWN, A), "unknown-item", "history sid"),
    (chat("hi", "<s_a_8192><s_b_0><s_c_0>"), "code-out-of-range", "code 8192"),
    (chat("<s_a_0><s_b_0><s_c_9999>", A), "code-out-of-range", "code 9999"),
]


@pytest.mark.parametrize(("messages", "why", "said"), BAD_ROWS)
def test_bad_row_is_named_and_left_out(tmp_path: Path, messages: Any, why: str, said: str) -> None:
    good = row(chat("hi", A))
    world = load_world(write(tmp_path, [good, row(messages), good]))
    assert whys(world) == [("train-00000.parquet", 1, why)]
    assert said in world.problems[0].detail
    assert [record.source[-2:] for record in world.splits["train"]] == [":0", ":2"]


def test_bad_metadata_is_named(tmp_path: Path) -> None:
    world = load_world(write(tmp_path, [row(chat("hi", A), metadata="{"), row(chat("hi", A), metadata=[1])]))
    assert whys(world) == [("train-00000.parquet", 0, "wrong-type")]


def test_bad_items_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(chat("hi", A))])
    lists = [[1, 2, 3], None, [1, 2], [1, None, 3], [1, -2, 3], [1, 2, 10**9], [4, 4, 4], [5, 5, 5]]
    pids = ["a", "b", "c", "d", "e", "f", None, "a"]
    pq.write_table(pa.table({"pid": pids, "sid": pa.array(lists, pa.list_(pa.int64()))}), folder / "pid2sid.parquet")
    world = load_world(folder)
    assert world.catalog.item_ids == ("a",)
    kinds = [
        "missing-field",
        "wrong-depth",
        "bad-sid",
        "code-out-of-range",
        "code-out-of-range",
        "missing-field",
        "duplicate-item",
    ]
    assert whys(world) == [("pid2sid.parquet", index + 1, kind) for index, kind in enumerate(kinds)]


def test_broken_files_are_errors_that_name_them(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(chat("hi", A))])
    (folder / "test.parquet").write_bytes(b"PAR1 garbage PAR1")
    with pytest.raises(DataError, match=r"test.parquet: cannot be read as Parquet"):
        load_world(folder)
    (folder / "test.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"test.parquet: cannot be read as Parquet"):
        load_world(folder)
    pq.write_table(pa.table({"messages": ["[]"]}), folder / "test.parquet")
    with pytest.raises(DataError, match=r"test.parquet: lacks the columns \['source'\]; it has \['messages'\]"):
        load_world(folder)
    (folder / "test.parquet").unlink()
    whole = (folder / "train-00000.parquet").read_bytes()
    (folder / "train-00000.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-00000.parquet: cannot be read as Parquet"):
        load_world(folder)


def test_map_without_usable_sids(tmp_path: Path) -> None:
    folder = write(tmp_path, [row(chat("hi", A))])
    write_map(folder / "pid2sid.parquet", {1: None, 2: []})
    with pytest.raises(DataError, match=r"pid2sid.parquet: holds no sid"):
        load_world(folder)
    write_map(folder / "pid2sid.parquet", {1: [-1, 0, 0]})
    with pytest.raises(DataError, match="no usable item; the first of 1 problems"):
        load_world(folder)
    pq.write_table(pa.table({"pid": [1], "sid": ["1,2,3"]}), folder / "pid2sid.parquet")
    with pytest.raises(DataError, match="column 'sid' is string and not list"):
        load_world(folder)
    (folder / "pid2sid.parquet").unlink()
    with pytest.raises(DataError, match="no Parquet file with the columns pid and sid"):
        load_world(folder, "openonerec")
