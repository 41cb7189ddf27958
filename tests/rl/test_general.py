"""General prompts from every kind of file; what is wrong is told by file and row, nothing is dropped in silence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rl.ability import general_ability
from rl.general import General, TextPrompt, read_general, tokenise_general
from rl.tiny import build_model, build_tokenizer
from rollout.data.problems import DataError
from rollout.sid import letters_format
from tests.data_dir import shared_data

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([{"instruction": "Sort.", "input": "b a"}, {"prompt": "Hello", "output": "Bye"}])
    )
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps({"messages": CHAT[:1]}))
    (tmp_path / "c.txt").write_text("one two three four five\n\nsix seven\n")
    pq.write_table(pa.table({"messages": [json.dumps(CHAT)], "source": ["x"]}), tmp_path / "d.parquet")
    (tmp_path / "notes.md").write_text("not a prompt")
    prompts, problems = read_general(tmp_path, passage_words=3)
    assert problems == []
    question = ({"role": "user", "content": "Two and two?"},)
    assert prompts == [
        General("a.json:0", "Sort.\nb a\n"),
        General("a.json:1", "Hello", "Bye"),
        General("b.jsonl:1", question, "Four."),
        General("b.jsonl:3", question),
        General("c.txt:1", "one two", " three", passage=True),
        General("c.txt:1", "four", " five", passage=True),
        General("c.txt:3", "six", " seven", passage=True),
        General("d.parquet:0", question, "Four."),
    ]
    assert read_general(tmp_path / "c.txt", 99)[0][0] == General("c.txt:1", "one two three", " four five", passage=True)


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
    """Too long, empty, with item tokens: told. The rest in order, answers with the end of text."""
    tokenizer = build_tokenizer(letters_format((4, 4, 4)))
    first_item = min(i for token, i in tokenizer.get_vocab().items() if token.startswith("<a_"))
    given = [
        General("f:0", "hi", "ho"),
        General("f:1", "much too long a prompt " * 5),
        General("f:2", "take", "<a_1>"),
        General("f:3", ({"role": "user", "content": "yes?"},)),
        General("f:4", "one", " two", passage=True),
    ]
    ready, problems = tokenise_general(given, tokenizer, 60, [(first_item, first_item + 12)])
    assert [prompt.name for prompt in ready] == ["f:0", "f:3", "f:4"]
    assert tokenizer.decode(ready[0].prompt_ids) == "hi"
    assert tokenizer.decode(ready[0].answer_ids[:-1]) == "ho" and ready[0].answer_ids[-1] == tokenizer.eos_token_id
    assert "yes?" in tokenizer.decode(ready[1].prompt_ids) and ready[1].answer_ids == ()
    assert tokenizer.decode(ready[2].answer_ids) == " two"
    assert [row.exact for row in ready] == [True, False, False]
    assert [(p.row, p.why) for p in problems] == [("1", "prompt-too-long"), ("2", "item-token")]
    assert "<a_1>" in problems[1].detail


@torch.no_grad()
def test_ability_against_plain_decoding() -> None:
    """Perplexity from full logits, exactness by greedy decoding to the end, row by row; batches change nothing."""
    tokenizer = build_tokenizer(letters_format((4, 4)))
    torch.manual_seed(0)
    model = build_model(tokenizer, hidden_size=32, layers=2, heads=1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    rng = np.random.default_rng(0)
    rows, nll, count = [], 0.0, 0
    for number in range(9):
        prompt = tuple(rng.integers(5, 90, int(rng.integers(1, 8))).tolist())
        greedy = list(prompt)
        for _ in range(3):
            greedy.append(int(model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
        answer = tuple(greedy[len(prompt) :]) if number % 3 else (*greedy[len(prompt) :][:2], 7, 8)
        rows.append(TextPrompt(f"r:{number}", prompt, answer, exact=number != 4))
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        nll -= float(logits.log_softmax(dim=1).gather(1, torch.tensor(answer)[:, None]).sum())
        count += len(answer)
    rows.append(TextPrompt("none", (5, 6)))
    for batch in (1, 4, 100):
        found = general_ability(model, rows, 0, batch)
        assert found["general/perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
        assert found["general/exact"] == pytest.approx(5 / 8)
    assert general_ability(model, rows[-1:], 0, 4) == {}


def test_real_prompts() -> None:
    prompts, problems = read_general(shared_data("general-text"), passage_words=40)
    assert problems == []
    kinds = [prompt.name.partition(":")[0] for prompt in prompts]
    assert kinds.count("instructions.json") == 999
    assert kinds.count("wiki.txt") > 3000
