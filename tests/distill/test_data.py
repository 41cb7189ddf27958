"""General prompts from every kind of file; what is wrong is told by file and row, nothing is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.data import General, read_general, tokenise_general
from distill.vocabulary import SharedVocabulary
from rl.tiny import build_tokenizer
from rollout.data.problems import DataError
from rollout.sid import letters_format
from tests.data_dir import shared_data

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "Sort.", "input": "b a"}, {"prompt": "Hello"}]))
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"messages": CHAT[:1]}))
    (tmp_path / "c.txt").write_text("one two three four five\n\nsix seven\n")
    pq.write_table(pa.table({"messages": [json.dumps(CHAT)], "source": ["x"]}), tmp_path / "d.parquet")
    (tmp_path / "notes.md").write_text("not a prompt")
    prompts, problems = read_general(tmp_path, passage_words=3)
    assert problems == []
    question = ({"role": "user", "content": "Two and two?"},)
    assert prompts == [
        General("a.json:0", "Sort.\nb a\n"),
        General("a.json:1", "Hello"),
        General("b.jsonl:1", question),
        General("b.jsonl:3", question),
        General("c.txt:1", "one two three"),
        General("c.txt:1", "four five"),
        General("c.txt:3", "six seven"),
        General("d.parquet:0", question),
    ]
    assert read_general(tmp_path / "c.txt", 99)[0][0] == General("c.txt:1", "one two three four five")


def test_bad_rows(tmp_path: Path) -> None:
    rows = [{"prompt": " "}, {"output": "x"}, 7, {"messages": "[{"}, {"messages": CHAT[1:]}, {"prompt": "fine"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken")
    prompts, problems = read_general(tmp_path / "p.jsonl", 10)
    assert [prompt.prompt for prompt in prompts] == ["fine"]
    assert [(problem.row, problem.why) for problem in problems] == [
        (1, "wrong-type"),
        (2, "missing-field"),
        (3, "wrong-type"),
        (4, "wrong-type"),
        (5, "missing-field"),
        (7, "wrong-type"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.json", "{", "p.json: no JSON"),
        ("p.json", "{}", "must hold a list of rows"),
        ("p.parquet", "nothing", "p.parquet: no Parquet file"),
        ("p.csv", "a,b", "prompts are read from .parquet"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        read_general(tmp_path / name, 10)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError, match="no such file, or a folder without"):
            read_general(path, 10)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(DataError, match=r"p\.txt: cannot be read as text"):
        read_general(tmp_path, 10)


def test_tokenise() -> None:
    """Too long, empty, with item tokens: told. The rest in order, ready to be continued."""
    tokenizer = build_tokenizer(letters_format((4, 4, 4)))
    first_item = min(i for token, i in tokenizer.get_vocab().items() if token.startswith("<a_"))
    shared = SharedVocabulary(np.arange(first_item), len(tokenizer))
    given = [
        General("f:0", "hi"),
        General("f:1", "much too long a prompt " * 5),
        General("f:2", "take <a_1>"),
        General("f:3", ({"role": "user", "content": "yes?"},)),
    ]
    ready, problems = tokenise_general(given, tokenizer, shared, max_tokens=60)
    assert [prompt.name for prompt in ready] == ["f:0", "f:3"]
    assert tokenizer.decode(ready[0].prompt_ids) == "hi"
    assert "yes?" in tokenizer.decode(ready[1].prompt_ids)
    assert [(p.row, p.why) for p in problems] == [("1", "prompt-too-long"), ("2", "item-token")]
    assert "<a_1>" in problems[1].detail


def test_real_prompts() -> None:
    prompts, problems = read_general(shared_data("general-text"), passage_words=40)
    assert problems == []
    kinds = [prompt.name.partition(":")[0] for prompt in prompts]
    assert kinds.count("instructions.json") == 999
    assert kinds.count("wiki.txt") > 3000
