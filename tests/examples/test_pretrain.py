"""A model learns items: expanded vocabularies, rows and mixtures, stages that change what they may, merged models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.build.shards import NO_THOUGHT
from examples.pretrain.__main__ import expand, merge
from examples.pretrain.__main__ import new as make_new
from examples.pretrain.__main__ import test as check
from examples.pretrain.checks import check_model
from examples.pretrain.sources import Row, RowMaker, Source, mixture, read_source
from examples.pretrain.train import StageSettings, run_stage
from examples.pretrain.vocabulary import expand_vocabulary
from rl.progress import Progress
from rl.tiny import build_model, build_tokenizer
from rl.trl_sft import IGNORED
from rollout.data.problems import BadRow, DataError
from rollout.sid import Sid, letters_format, onerec_format
from tests.rl.conftest import cache_folder, data, shop, world  # noqa: F401

FORMAT = letters_format((3, 4, 5))


def text_model(tied: bool) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = build_tokenizer(None)
    torch.manual_seed(0)
    model = build_model(tokenizer, hidden_size=32, layers=1, heads=2)
    if not tied:
        model.config.tie_word_embeddings = False
        model = Qwen3ForCausalLM(model.config)
    return model.eval(), tokenizer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_expansion_leaves_text_as_it_is(tied: bool) -> None:
    """Old logits are the same to the bit; new tokens are whole, in order, and rows are aligned."""
    model, tokenizer = text_model(tied)
    text = tokenizer("some text, 123", return_tensors="pt")["input_ids"]
    old, words = model(input_ids=text).logits, len(tokenizer)
    added = expand_vocabulary(model, tokenizer, FORMAT, align=64)
    assert (added.first, added.tokens, added.rows % 64) == (words, 12, 0)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == added.rows
    assert torch.equal(model(input_ids=text).logits[..., :words], old[..., :words])
    assert tokenizer(FORMAT.format((2, 0, 4)))["input_ids"] == [words + 2, words + 3, words + 3 + 4 + 4]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        mean, fresh = layer.weight[:words].mean(dim=0), layer.weight[words:]
        assert float((fresh - mean).std()) == pytest.approx(0.02 * float(layer.weight[:words].std()), rel=0.1)
    with pytest.raises(ValueError, match="has 12 of the tokens already, such as '<a_0>'"):
        expand_vocabulary(model, tokenizer, FORMAT)


def test_openonerec_ids() -> None:
    """As in OpenOneRec: behind the text tokens, marks first, then level by level."""
    model, tokenizer = text_model(True)
    added = expand_vocabulary(model, tokenizer, onerec_format((8, 8, 8)))
    assert added.rows % 256 == 0 and added.tokens == 26
    ids = tokenizer("<|sid_begin|><s_a_1><s_b_0><s_c_7><|sid_end|>")["input_ids"]
    assert [one - added.first for one in ids] == [0, 3, 10, 25, 1]


def test_rows_start_from_the_meaning_of_titles() -> None:
    """A code's row is the mean of the rows of the words of its items."""
    model, tokenizer = text_model(True)
    rows = model.get_input_embeddings().weight.detach().clone()
    texts: dict[Sid, list[str]] = {(0, 1, 2): ["ab"], (0, 3, 4): ["c"]}
    expand_vocabulary(model, tokenizer, FORMAT, noise=0.0, texts=texts)
    weight = model.get_input_embeddings().weight

    def row(token: str) -> torch.Tensor:
        return weight[tokenizer.convert_tokens_to_ids(token)]

    a, b, c = (rows[tokenizer(letter)["input_ids"][0]] for letter in "abc")
    space = rows[tokenizer(" ")["input_ids"][0]]
    assert space is not None
    torch.testing.assert_close(row("<b_1>"), (a + b) / 2)
    torch.testing.assert_close(row("<b_3>"), c)
    torch.testing.assert_close(row("<a_0>"), (a + b + c) / 3)
    torch.testing.assert_close(row("<a_1>"), rows[: len(tokenizer) - 12].mean(dim=0))


@pytest.fixture
def maker() -> Callable[..., RowMaker]:
    return lambda **options: RowMaker(build_tokenizer(FORMAT), **options)


CHAT: tuple[Any, ...] = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "<think>T</think>A2"},
)


def learned(row: Row, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Pieces of the row that are learned."""
    pieces: list[list[int]] = []
    piece: list[int] = []
    for token, label in zip([*row.input_ids, 0], [*row.labels, IGNORED], strict=True):
        if label == IGNORED:
            pieces += [piece] if piece else []
            piece = []
        else:
            assert token == label
            piece.append(token)
    return [tokenizer.decode(piece) for piece in pieces]


def test_the_assistants_turns_are_learned(maker: Callable[..., RowMaker]) -> None:
    plain, thinking, whole = maker(), maker(think=True), maker(all_turns=True)
    text = plain.tokenizer.apply_chat_template(list(CHAT), tokenize=False)
    row = plain.chat(CHAT)
    assert plain.tokenizer.decode(row.input_ids) == text
    assert learned(row, plain.tokenizer) == ["A1<|im_end|>\n", "<think>T</think>A2<|im_end|>\n"]
    assert learned(thinking.chat(CHAT), plain.tokenizer)[0] == f"{NO_THOUGHT}A1<|im_end|>\n"
    assert learned(thinking.chat(CHAT), plain.tokenizer)[1] == "<think>T</think>A2<|im_end|>\n"
    assert learned(whole.chat(CHAT), plain.tokenizer) == [text]
    with pytest.raises(BadRow, match="no turn of the chat is the assistant's"):
        plain.chat(CHAT[:2])


def test_sources(maker: Callable[..., RowMaker], tmp_path: Path, data: Path) -> None:  # noqa: F811
    """Chats, segments, running text, users' sequences, titles; what is wrong names file and row."""
    made, chats = maker(max_length=80), [json.dumps(list(CHAT)), json.dumps([CHAT[1]]), None, json.dumps(["x"])]
    long = json.dumps([{"role": "user", "content": "x" * 90}, CHAT[2]])
    pq.write_table(pa.table({"messages": [*chats, long], "segments": [None] * 5}), tmp_path / "chat.parquet")
    rows, problems = read_source(Source(tmp_path / "chat.parquet"), maker(max_length=150))
    wrong = [(1, "empty-target"), (2, "missing-field"), (3, "wrong-type")]
    assert len(rows) == 2 and [(p.row, p.why) for p in problems] == wrong
    _, problems = read_source(Source(tmp_path / "chat.parquet"), maker(max_length=100))
    assert (problems[-1].row, problems[-1].why) == (4, "prompt-too-long")
    segments = ['["one ", {"text": "two"}]', "[]", "{"]
    pq.write_table(
        pa.table(
            {"messages": [None] * 3, "segments": segments},
            schema=pa.schema([("messages", pa.string()), ("segments", pa.string())]),
        ),
        tmp_path / "segments.parquet",
    )
    rows, problems = read_source(Source(tmp_path / "segments.parquet"), made)
    assert made.tokenizer.decode(rows[0].input_ids) == "one two<|eos|>"
    assert [(p.row, p.why) for p in problems] == [(1, "missing-field"), (2, "wrong-type")]
    (tmp_path / "a.txt").write_text("the quick brown fox\n")
    rows, _ = read_source(Source(tmp_path / "a.txt"), made)
    assert made.tokenizer.decode(rows[0].labels) == "the quick brown fox<|eos|>"
    catalog = shop().catalog
    rows, _ = read_source(Source(data), made)
    train = shop().splits["train"]
    best = max((record for record in train if record.user == "train-1"), key=lambda record: len(record.history))
    expected = "".join(FORMAT.format(tuple(catalog.codes_NL[item].tolist())) for item in (*best.history, *best.targets))
    assert made.tokenizer.decode(rows[1].input_ids) == expected + "<|eos|>"
    rows, _ = read_source(Source(data, kind="titles"), made)
    first = FORMAT.format(tuple(catalog.codes_NL[0].tolist()))
    assert made.tokenizer.decode(rows[0].input_ids) == f"{first} is Title 0<|eos|>"
    assert made.tokenizer.decode(rows[1].input_ids) == f"Title 0 is {first}<|eos|>"
    for source, said in ((Source(tmp_path / "no"), "no such file"), (Source(data, split="other"), "no split 'other'")):
        with pytest.raises(DataError, match=said):
            read_source(source, made)


def test_mixtures() -> None:
    """Rows by weight, packed without losing a token; long rows are cut where nothing is packed."""
    rows = [Row([number] * 7, [number] * 7) for number in range(300)]
    other = [Row([1000 + number] * 5, [IGNORED] * 5) for number in range(300)]
    whole = mixture([(rows, 1.0)], max_length=10, packing=True, seed=0)
    assert sorted(token for row in whole["input_ids"] for token in row) == sorted(7 * list(range(300)))
    assert {len(row) for row in whole["input_ids"]} == {10} and whole["labels"] == whole["input_ids"]
    both = mixture([(rows, 3.0), (other, 1.0)], max_length=10, packing=False, seed=0)
    assert sum(row[0] >= 1000 for row in both["input_ids"]) / len(both) == pytest.approx(0.25, abs=0.05)
    cut = mixture([(rows, 1.0)], max_length=4, packing=False, seed=0)
    assert max(map(len, cut["input_ids"])) == 4 and sum(map(len, cut["input_ids"])) == 2100
    with pytest.raises(ValueError, match="weights of sources must be above 0"):
        mixture([(rows, 0.0), (other, 1.0)], max_length=10, packing=False, seed=0)


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:  # noqa: F811
    """A small text model with the shop's item tokens."""
    folder = tmp_path_factory.mktemp("models")
    make_new(folder / "base", hidden_size=32, layers=1, heads=1)
    expand(folder / "base", data, folder / "items", init="text", align=64)
    return folder / "items"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def stage(model: Path, out: Path, data: Path, **options: Any) -> Path:  # noqa: F811
    given: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "max_length": 64, "learning_rate": 1e-2}
    sources = [Source(data, kind="titles"), Source(data, kind="sequences", weight=2.0)]
    return run_stage(StageSettings(model, out, sources, **{**given, **options}), Progress())


@pytest.mark.slow
def test_only_new_rows_train(expanded: Path, tmp_path: Path, data: Path) -> None:  # noqa: F811
    """Every other parameter is the same to the bit; the new rows are not. LoRA and full training change more."""
    before, first = weights(expanded), json.loads((expanded / "expansion.json").read_text())["first"]
    tokens = json.loads((expanded / "expansion.json").read_text())["tokens"]
    after = weights(stage(expanded, tmp_path / "align", data, train="new_rows"))
    assert after.keys() == before.keys()
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, weight in after.items():
        if name not in rows:
            assert torch.equal(weight, before[name]), name
    embedding = after["model.embed_tokens.weight"]
    changed = (embedding != before["model.embed_tokens.weight"]).any(dim=1).nonzero()[:, 0].tolist()
    assert changed and set(changed) <= set(range(first, first + tokens))
    lora = weights(stage(expanded, tmp_path / "lora", data, train="lora"))
    assert not torch.equal(lora["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(lora["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"])
    assert torch.equal(lora["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


@pytest.mark.slow
def test_a_stage_goes_on_where_it_was(expanded: Path, tmp_path: Path, data: Path) -> None:  # noqa: F811
    """Broken off at a checkpoint and resumed: the model of an uninterrupted run; TensorBoard has its files."""
    options: dict[str, Any] = {"train": "all", "save_every": 2, "epochs": 50}
    whole = stage(expanded, tmp_path / "whole", data, **options)
    part = tmp_path / "part"
    stage(expanded, part, data, **options)
    (part / "model").rename(tmp_path / "gone")
    for late in part.glob("checkpoints/checkpoint-4"):
        late.rename(tmp_path / "late")
    with pytest.raises(ValueError, match="holds checkpoints: go on from them with resume"):
        stage(expanded, part, data, **options)
    resumed = stage(expanded, part, data, **options, resume=True)
    first, second = weights(whole), weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list((tmp_path / "whole").rglob("events.out.tfevents.*"))
    with pytest.raises(ValueError, match="model is there already"):
        stage(expanded, part, data, **options, resume=True)


@pytest.mark.slow
def test_merged_adapters(expanded: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """A checkpoint's adapter folded into its base is the stage's model; the check finds models that are not fit."""
    trained = stage(expanded, tmp_path / "lora", data, train="lora", save_every=4)
    merge(expanded, tmp_path / "lora" / "checkpoints" / "checkpoint-4", tmp_path / "merged")
    check(tmp_path / "merged", data, same_as=trained)
    assert "wrong" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        check(tmp_path / "merged", data, same_as=expanded)
    assert "logits differ by" in capsys.readouterr().out
    wrong = dict(check_model(expanded.parent / "base", data))
    assert "<a_0>" in wrong["one token for each code"]
    assert dict(check_model(tmp_path / "nowhere", data))["loads with transformers"]


def test_bad_stages(expanded: Path, tmp_path: Path, data: Path) -> None:  # noqa: F811
    for more, said in (
        ({"sources": []}, "must name at least one"),
        ({"valid_share": 0.0}, "valid_share=0.0 must be in"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ):
        given: dict[str, Any] = {"sources": [Source(data)], **more}
        with pytest.raises(ValueError, match=said):
            StageSettings(expanded, tmp_path / "x", **given)
    with pytest.raises(ValueError, match="model=.*nowhere: no model and tokenizer could be read from it"):
        stage(tmp_path / "nowhere", tmp_path / "y", data)
    base = expanded.parent / "base"
    with pytest.raises(ValueError, match="say where the new rows start with first_token"):
        stage(base, tmp_path / "y", data, train="new_rows")
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}, {"answer": "c"}]))
    settings = StageSettings(expanded, tmp_path / "z", [Source(tmp_path / "bad.json")])
    with pytest.raises(DataError, match="1 bad rows; mend them, or leave them out: on_bad_rows=skip"):
        run_stage(settings, Progress())
    assert AutoTokenizer.from_pretrained(expanded).convert_tokens_to_ids("<a_0>") is not None
