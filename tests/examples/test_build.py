"""Raw data to training sets: what is kept, what is left out and counted, and that the project reads what comes out."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from examples.build.__main__ import check_kling, sequences, world
from examples.build.amazon import Review, Window, active, build_amazon, by_time, month, windows
from examples.build.kling import COLUMNS, FORMAT, build_kling, parse_codes
from examples.build.playlists import build_playlists, expand, set_metrics
from examples.build.preferences import ask_all, chat_api, is_right, keep_right, questions
from examples.build.rows import LeftOut, Row, leave_one_out, with_sids
from examples.build.shards import write_split
from examples.build.tasks import CHATS, TEXTS, build_tasks, possible
from examples.pretrain.sources import RowMaker, Source, read_source
from examples.quantize.sids import SemanticIds
from rl.tiny import build_tokenizer
from rollout.data import load_world
from rollout.data.problems import DataError
from rollout.sid import onerec_format
from tests.rl.conftest import shop


def numbered(names: list[str], sizes: tuple[int, ...] = (8, 8)) -> SemanticIds:
    codes = np.stack(np.unravel_index(np.arange(len(names)), sizes), axis=1)
    return SemanticIds(tuple(names), codes, sizes, {})


# --- sequences


def test_leave_one_out() -> None:
    """The last item for test, the one before for valid, every prefix of the rest for training."""
    left = LeftOut()
    splits = leave_one_out({"u": list("abcde"), "v": list("ab"), "w": list("xyz")}, left, every_prefix=True)
    assert splits["test"] == [Row("u", tuple("abcd"), ("e",)), Row("w", ("x", "y"), ("z",))]
    assert splits["valid"] == [Row("u", tuple("abc"), ("d",)), Row("w", ("x",), ("y",))]
    assert splits["train"] == [Row("u", ("a",), ("b",)), Row("u", ("a", "b"), ("c",))]
    assert leave_one_out({"u": list("abcde")}, left, every_prefix=False)["train"] == [Row("u", ("a", "b"), ("c",))]
    assert left.counts == {"too-few-items": 1}


def test_from_sequences_to_a_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, Sids and a data folder that loads without a problem; the training part never shows what is to be found."""
    (tmp_path / "s.txt").write_text("u a b c d\nv b c e\nu x y z\nw a\n")
    sequences(tmp_path / "s.txt", tmp_path / "rows")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "5 items, 3 users, 1 train, 2 valid, 2 test; left out: 1 duplicate-user, 1 too-few-items" in said
    assert (tmp_path / "rows" / "sequences.txt").read_text() == "u a b\nv b\n"
    numbered(list("abcde")).save(tmp_path / "sids")
    world(tmp_path / "rows", tmp_path / "sids", tmp_path / "world", "onerec")
    found = load_world(tmp_path / "world")
    assert not found.problems and found.catalog.format.begin == "<|sid_begin|>"
    (record,) = found.splits["train"]
    assert [found.catalog.item_ids[item] for item in (*record.history, *record.targets)] == ["a", "b"]
    assert found.catalog.popularity_N.tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(DataError, match="exists already"):
        sequences(tmp_path / "s.txt", tmp_path / "rows")
    with pytest.raises(DataError, match=r"1 items have no Sid, such as \['e'\]"):
        with_sids(tmp_path / "rows", numbered(list("abcd")), tmp_path / "other")
    (tmp_path / "short.txt").write_text("u a\n")
    with pytest.raises(DataError, match="no train row is left; left out were {'too-few-items': 1}"):
        sequences(tmp_path / "short.txt", tmp_path / "none")
    assert not (tmp_path / "none").exists() and not (tmp_path / ".none.unfinished").exists()


# --- Kling

GOOD = {
    "user_id": "u1", "kling_photo_id": "p1", "kling_photo_type": "image", "behavior_type": "recommend",
    "time_stamp": "100", "content_type": "3", "title": "A cat", "semantic_id": "[1, 2, 3]",
}  # fmt: skip


def kling_log(path: Path, rows: list[dict[str, str]], delimiter: str = "\t") -> Path:
    lines = [delimiter.join(COLUMNS)]
    lines += [delimiter.join(row.get(column, "") for column in COLUMNS) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def kling_rows() -> list[dict[str, str]]:
    rows = []
    for user in ("u1", "u2"):
        for time, item in ((400, 4), (100, 1), (300, 3), (200, 2)):
            more = {"user_id": user, "kling_photo_id": f"p{item}", "time_stamp": str(time), "title": f"Work {item}"}
            rows.append({**GOOD, **more, "semantic_id": f"[{item}, 2, 3]"})
    return rows


def test_kling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything in its place: four levels, time order, titles, three training sets, a data folder; the checklist."""
    bad = [
        {**GOOD, "semantic_id": ""},
        {**GOOD, "semantic_id": "[1, 2]"},
        {**GOOD, "semantic_id": "none"},
        {**GOOD, "semantic_id": "[1, 2, 256]"},
        {**GOOD, "user_id": ""},
        {**GOOD, "behavior_type": "LIKE"},
        {**GOOD, "time_stamp": "now"},
        {**GOOD, "content_type": "300"},
        {**GOOD, "semantic_id": "[9, 9, 9]"},
    ]
    untitled = {**GOOD, "kling_photo_id": "p5", "title": "", "introduction": "An introduction", "content_type": "",
                "prompt": "a dog", "time_stamp": "500", "semantic_id": "5 2 3"}  # fmt: skip
    found, left = build_kling(kling_log(tmp_path / "log.tsv", [*kling_rows(), *bad, untitled]), tmp_path / "out")
    assert found == {"lines": 18, "items": 5, "users": 2, "train samples": 3, "valid samples": 2, "test samples": 2}
    assert left.counts == {
        "missing-semantic-id": 1, "bad-semantic-id": 3, "missing-field": 1, "other-behaviour": 1, "bad-time": 1,
        "bad-content-type": 1, "sid-mismatch": 1,
    }  # fmt: skip
    assert "log.tsv:11: bad-semantic-id: '[1, 2]' is no array of 3 codes from 0 to 255" in map(str, left.shown)
    items = json.loads((tmp_path / "out" / "items.json").read_text())
    first = FORMAT.format((1, 2, 3, 3))
    assert items["p1"] == {"title": "Work 1", "description": "", "categories": ["3 > image"], "sid": first}
    assert items["p5"] == {
        "title": "An introduction", "description": "a dog", "categories": ["image"], "sid": FORMAT.format((5, 2, 3, 0))
    }  # fmt: skip
    assert (tmp_path / "out" / "sequences.txt").read_text() == "u1 p1 p2 p3 p4 p5\nu2 p1 p2 p3 p4\n"
    loaded = load_world(tmp_path / "out" / "world")
    assert not loaded.problems and loaded.catalog.format.sizes == (256,) * 4
    maker = RowMaker(build_tokenizer(FORMAT), think=True)
    rows, problems = read_source(Source(tmp_path / "out" / "sid_prediction" / "test.parquet"), maker)
    assert len(rows) == 2 and not problems
    answer = f"<think>\n\n</think>\n\n{items['p5']['sid']}<|im_end|>\n"
    assert maker.tokenizer.decode(rows[0].input_ids).endswith(answer)
    thought = json.loads(pq.read_table(tmp_path / "out" / "reasoning" / "val.parquet").to_pylist()[0]["messages"])[-1]
    assert "3 of 3 works are in 3 > image, so the next one may be too. It may be like Work 4." in thought["content"]
    texts = pq.read_table(tmp_path / "out" / "alignment" / "train.parquet").to_pylist()
    assert all(row["text"].startswith("The work <|sid_begin|>") for row in texts)
    check_kling(tmp_path / "out")
    assert "wrong" not in capsys.readouterr().out
    items["p1"]["sid"] = "<|sid_begin|><s_a_1><|sid_end|>"
    (tmp_path / "out" / "items.json").write_text(json.dumps(items))
    (tmp_path / "out" / "reasoning" / "test.parquet").unlink()
    with pytest.raises(SystemExit):
        check_kling(tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 have not, such as p1" in said and "no test" in said


def test_kling_logs_that_cannot_be_read(tmp_path: Path) -> None:
    kling_log(tmp_path / "log.csv", kling_rows()[:4], ";")
    with pytest.raises(DataError, match="lacks the columns"):
        build_kling(tmp_path / "log.csv", tmp_path / "out")
    kling_log(tmp_path / "empty.tsv", [{**GOOD, "semantic_id": ""}])
    with pytest.raises(DataError, match="none of 1 lines can be used: {'missing-semantic-id': 1}"):
        build_kling(tmp_path / "empty.tsv", tmp_path / "out")
    with pytest.raises(DataError, match="cannot be read as a table"):
        build_kling(tmp_path / "nowhere.tsv", tmp_path / "out")
    assert [parse_codes(text) for text in ("[1,2,3]", "1 2 3", " [ 4 , 5 ] ", "x", "[1, -2]", "")] == [
        (1, 2, 3), (1, 2, 3), (4, 5), None, None, None
    ]  # fmt: skip


# --- Amazon


def at(year: int, month_: int, day: int = 1) -> int:
    return int(datetime(year, month_, day, tzinfo=UTC).timestamp())


def test_active_users_and_items() -> None:
    """The k-core: who falls below takes others along."""
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "y"), ("c", "z")]
    kept = active([Review(user, item, 0.0) for user, item in pairs], 2)
    assert [(review.user, review.item) for review in kept] == pairs[:4]
    assert active([Review("a", "x", 0.0)], 2) == []


def test_windows_of_history() -> None:
    reviews = [Review("u", item, float(time)) for time, item in enumerate("abcd")]
    rows = windows(reviews, 2)
    assert ["".join((*row.history, "|", *row.targets)) for _, row in rows] == ["a|b", "ab|c", "bc|d"]
    assert {name: len(some) for name, some in by_time(rows * 10, (0.8, 0.1, 0.1)).items()} == {
        "train": 24, "valid": 3, "test": 3
    }  # fmt: skip


def test_amazon(tmp_path: Path) -> None:
    """Old and new field names, milliseconds, gzip; the window goes back until there are enough items."""
    rows: list[dict[str, Any]] = []
    for user in range(6):
        for place in range(6):
            rows.append({"reviewerID": f"u{user}", "asin": f"old{place}", "unixReviewTime": at(2016, 8, 1 + place)})
            more = {"user_id": f"u{user}", "parent_asin": f"new{place}", "timestamp": 1000 * at(2016, 11, 1 + place)}
            rows.append(more)
    lines = [json.dumps(row) for row in [*rows, rows[0], {"asin": "x"}]]
    lines += ["no json", json.dumps({"user_id": "u0", "asin": "late", "timestamp": at(2019, 1)})]
    with gzip.open(tmp_path / "reviews.json.gz", "wt") as file:
        file.write("\n".join(lines))
    (tmp_path / "meta.json").write_text(
        json.dumps({"asin": "new0", "title": "New", "description": ["a", "b"], "categories": [["C", "D"]]}) + "\n"
    )
    window = Window("2016-11", "2016-12", min_interactions=5, history=10, min_items=6)
    found, left, first = build_amazon(tmp_path / "reviews.json.gz", tmp_path / "meta.json", tmp_path / "near", window)
    assert (first, found["items"], found["train"], found["valid"], found["test"]) == ("2016-11", 6, 24, 3, 3)
    assert left.counts == Counter(
        {"outside-the-window": 37, "item-without-metadata": 5, "repeated-review": 1, "missing-field": 1, "no-json": 1}
    )
    item = pq.read_table(tmp_path / "near" / "items.parquet").to_pylist()[0]
    assert item == {"item_id": "new0", "title": "New", "description": "a b", "category": "C > D"}
    wider = Window("2016-11", "2016-12", min_interactions=5, history=10, min_items=12)
    found, left, first = build_amazon(tmp_path / "reviews.json.gz", None, tmp_path / "far", wider)
    assert (first, found["items"]) == ("2016-08", 12) and left.counts["outside-the-window"] == 1
    train = pq.read_table(tmp_path / "far" / "train.parquet").to_pylist()
    assert max(len(row["history"]) for row in train) == 9
    assert [month("2016-11") - month("2015-12"), len(train)] == [11, 53]
    for start, said in (("2017-01", "start=2017-01 is after end=2016-01"), ("x", "'x' is no month")):
        with pytest.raises(ValueError, match=said):
            Window(start, "2016-01")
    with pytest.raises(DataError, match="cannot be read as JSON lines"):
        build_amazon(tmp_path / "nowhere", None, tmp_path / "x", window)


# --- OpenOneRec's tasks


def test_tasks(tmp_path: Path) -> None:
    """Each task's rows; the project's OpenOneRec loader reads targets and histories back."""
    given = shop()
    found, left = build_tasks(
        with_categories(given), tmp_path / "out", (*CHATS, *TEXTS), domain="video", think=True, max_history=20, seed=0
    )
    assert found["video_recommendation"] == 48 + 10 + 12 and found["item_understanding"] == found["alignment"] == 24
    assert found["user_profile"] == 24
    assert set(left.counts) <= {"recommendation_explanation: nothing-to-say"}
    files = sorted((tmp_path / "out").rglob("train*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    labels = Counter(json.loads(r["messages"])[-1]["content"] for r in rows if r["source"] == "label_prediction")
    assert set(labels) == {"<think>\n\n</think>\n\nyes", "<think>\n\n</think>\n\nno"} and min(labels.values()) > 10
    loaded = load_world(tmp_path / "out", "openonerec")
    assert not loaded.problems
    tasks = Counter(record.task for record in loaded.splits["test"])
    assert tasks["video_recommendation"] == tasks["interactive_recommendation"] == 12
    mine = [record for record in loaded.splits["test"] if record.task == "video_recommendation"]
    for record, original in zip(mine, given.splits["test"], strict=True):
        assert {int(loaded.catalog.sid_index_N[item]) for item in record.targets} == {
            int(given.catalog.sid_index_N[item]) for item in original.targets
        }
        assert len(record.history) == len(original.history) and record.user == original.user
    maker = RowMaker(build_tokenizer(onerec_format(given.catalog.format.sizes)))
    chats, problems = read_source(Source(tmp_path / "out"), maker)
    assert len(chats) == sum(count for task, count in found.items() if task not in TEXTS) and not problems
    texts, problems = read_source(Source(tmp_path / "out" / "text"), maker)
    assert len(texts) == 48 and not problems
    assert maker.tokenizer.decode(texts[0].input_ids).endswith("is Title 0 · even.<|eos|>")
    lacking = {"interactive_recommendation", "recommendation_explanation"}
    assert set(possible(given.catalog)) == {*CHATS, *TEXTS} - lacking
    rest: dict[str, Any] = {"domain": "ad", "think": False, "max_history": 5, "seed": 0}
    with pytest.raises(ValueError, match=r"tasks \['other'\] are none of"):
        build_tasks(given, tmp_path / "x", ("other",), **rest)
    with pytest.raises(ValueError, match="need titles or categories, and no item has one"):
        build_tasks(given, tmp_path / "x", ("interactive_recommendation",), **rest)


def with_categories(given: Any) -> Any:
    from dataclasses import replace

    categories = tuple(("even", "odd")[row % 2] for row in range(len(given.catalog)))
    return replace(given, catalog=replace(given.catalog, categories=categories))


def test_shards(tmp_path: Path) -> None:
    """About 1,000 rows a file, the same bytes each time."""
    rows = [{"source": "s", "text": str(number), "metadata": {"n": number}} for number in range(2100)]
    assert write_split(tmp_path / "a", "train", rows) == 3
    assert write_split(tmp_path / "b", "train", rows) == 3
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet"]
    assert [pq.read_table(tmp_path / "a" / name).num_rows for name in names] == [1000, 1000, 100]
    one, two = (pq.read_table(tmp_path / folder / names[0]).to_pylist() for folder in "ab")
    assert one == two and len({row["uuid"] for row in one}) == 1000
    assert one[7]["metadata"] == '{"n": 7}' and one[7]["messages"] is None


# --- playlists


def songs() -> SemanticIds:
    """Six songs in three concepts."""
    codes = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [1, 0], [2, 1]])
    return SemanticIds(tuple("abcdef"), codes, (4, 4), {})


def test_playlists(tmp_path: Path) -> None:
    lists = [{"title": f"List {number}", "songs": ["a", "d", "nobody"]} for number in range(10)]
    lines = [json.dumps(one) for one in [*lists, {"title": "", "songs": ["a"]}, {"title": "x", "songs": ["y"]}]]
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, "{"]))
    found, left = build_playlists(tmp_path / "p.jsonl", songs(), tmp_path / "out")
    assert found == {"songs": 6, "concepts": 3, "songs of the largest": 3, "train": 8, "valid": 1, "test": 1}
    assert left.counts == {"unknown-song": 11, "empty-target": 2, "wrong-type": 1}
    loaded = load_world(tmp_path / "out")
    record = loaded.splits["test"][0]
    assert str(record.prompt).startswith("Playlist: List ") and record.task == "playlist" and record.targets == (0, 3)
    with pytest.raises(DataError, match="no playlist is left"):
        (tmp_path / "none.jsonl").write_text("{\n")
        build_playlists(tmp_path / "none.jsonl", songs(), tmp_path / "x")


def test_concepts_are_expanded(tmp_path: Path) -> None:
    """A song of each cluster, none twice while there is another; another seed gives another list. Metrics by hand."""
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"title": "t", "songs": ["a"]}) for _ in range(10)))
    build_playlists(tmp_path / "p.jsonl", songs(), tmp_path / "out")
    catalog = load_world(tmp_path / "out").catalog
    of = [int(sid) for sid in catalog.sid_index_N]
    lists = {tuple(expand(catalog, [of[0], of[3], of[0], of[0]], seed)) for seed in range(30)}
    assert len(lists) > 5
    for one in lists:
        assert {of[song] for song in (one[0], one[2], one[3])} == {of[0]} and len({one[0], one[2], one[3]}) == 3
    assert len(expand(catalog, [of[5]] * 3, 0)) == 3
    thirds = {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert set_metrics(catalog, [of[0], of[0]], (0, 1, 3)) == pytest.approx(thirds)
    assert set_metrics(catalog, [of[5]], (0,)) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


# --- preferences


def test_preferences(tmp_path: Path) -> None:
    """Asked once, saved as they come, taken up after a break; right answers become chats."""
    asked = list(questions(shop(), 10, max_history=3, seed=0))
    assert [question.right for question in asked] == ["yes", "no"] * 5
    assert all("Title" in question.text for question in asked)
    calls: list[str] = []

    def breaks(system: str, text: str) -> str:
        if len(calls) == 4:
            raise ConnectionError("gone")
        calls.append(text)
        return "Yes."

    with pytest.raises(ConnectionError):
        ask_all(asked, tmp_path, breaks, lambda done, all_: None)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"question": "cut')
    later: list[str] = []

    def goes_on(_: str, text: str) -> str:
        later.append(text)
        return "no"

    answers = ask_all(asked, tmp_path, goes_on, lambda done, all_: None)
    assert calls == [question.text for question in asked[:4]] and later == [question.text for question in asked[4:]]
    assert keep_right(asked, answers, tmp_path) == {"questions": 10, "right": 2 + 3}
    rows, problems = read_source(Source(tmp_path / "train.parquet"), RowMaker(build_tokenizer(None)))
    assert len(rows) == 5 and not problems
    assert [is_right(said, "no") for said in ("No, never", "yes and no", "nothing", "")] == [True, False, False, False]
    with pytest.raises(DataError, match="none of 10 answers is right"):
        keep_right(asked, [{"said": "perhaps"}] * 10, tmp_path)


def test_a_chat_api_is_asked(tmp_path: Path) -> None:
    """A server of this test's own answers what the client sends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = f"{sent['model']} heard {sent['messages'][1]['content']}"
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        answer = chat_api("judge", f"http://127.0.0.1:{server.server_port}/v1")
        assert answer("system", "a question") == "judge heard a question"
    finally:
        server.shutdown()
