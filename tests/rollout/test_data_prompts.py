"""Prompts: templates, tokenisation against a real fast tokenizer, SID tokens, users kept aside."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from rollout.catalog import Catalog
from rollout.data import Problem, prepare, render, sid_vocab, split_users
from rollout.sid import SidFormat, letters_format, onerec_format
from rollout.types import Record, Sample

transformers = pytest.importorskip("transformers")
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(fmt: SidFormat, post: str = "$A", drop: int = 0, special: bool = True) -> Any:
    """A byte-level tokenizer without merges; `post` is its template of special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<bos>", "<eos>"]
    tokenizer.add_special_tokens(marks)
    tokens = fmt.tokens()[drop:]
    tokenizer.add_special_tokens(tokens) if special else None
    ids = [(mark, tokenizer.token_to_id(mark)) for mark in marks]
    tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


FMT = letters_format((4, 4))
MARKED = onerec_format((4, 4))


def catalog(fmt: SidFormat = FMT) -> Catalog:
    return Catalog.build(fmt, ["x", "y", "z"], np.array([[0, 1], [2, 3], [1, 1]]), titles=["Saw", "Nail; big", "Glue"])


def record(history: tuple[int, ...], prompt: Any = None, source: str = "train.csv:2", user: str = "u") -> Record:
    return Record(source, user, history, (0,), (1.0,), prompt)


def test_render_takes_the_newest_items_oldest_first() -> None:
    history = record((0, 1, 2))
    assert render(history, catalog(), "{history}\n", 10) == "<a_0><b_1><a_2><b_3><a_1><b_1>\n"
    assert render(history, catalog(), "{history}\n", 2) == "<a_2><b_3><a_1><b_1>\n"
    assert render(history, catalog(MARKED), "Items: {history}", 1) == "Items: <s_a_1><s_b_1>"
    assert render(history, catalog(), "{titles} -> {{{history}}}", 2) == "Nail; big; Glue -> {<a_2><b_3><a_1><b_1>}"
    assert render(history, catalog(), "{history}|{titles}", 0) == "|"
    assert render(record(()), catalog(), "{history}\n", 10) == "\n"


def test_render_keeps_a_prompt_of_its_own() -> None:
    chat = ({"role": "user", "content": "hi {nobody}"},)
    assert render(record((0,), "own {nobody}"), catalog(), "{history}", 5) == "own {nobody}"
    assert render(record((0,), chat), catalog(), "{history}", 5) == chat


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{story}", r"unknown field \{story\}; known are \{history\}, \{titles\}"),
        ("{}", r"unknown field \{\}"),
        ("{history.real}", r"unknown field \{history.real\}"),
        ("{history", "is no template"),
        ("}", "is no template"),
    ],
)
def test_wrong_templates_are_refused_even_without_rows(template: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        render(record((0,)), catalog(), template, 5)
    with pytest.raises(ValueError, match=said):
        prepare([], catalog(), make_tokenizer(FMT), template=template, max_history=5, max_prompt_tokens=9)


def test_negative_history_is_refused() -> None:
    with pytest.raises(ValueError, match="data.max_history=-1"):
        render(record((0,)), catalog(), "{history}", -1)


def samples_of(
    records: list[Record], tokenizer: Any, fmt: SidFormat = FMT, limit: int = 512, template: str = "{history}\n"
) -> tuple[list[Sample], list[Problem]]:
    return prepare(records, catalog(fmt), tokenizer, template=template, max_history=10, max_prompt_tokens=limit)


@pytest.mark.parametrize("post", ["$A", "$A <eos>", "$A <eos> <eos>"])
def test_text_prompt_never_ends_in_eos(post: str) -> None:
    tokenizer = make_tokenizer(FMT, post)
    samples, problems = samples_of([record((0, 1)), record((2,))], tokenizer)
    assert problems == []
    plain = [tokenizer.convert_ids_to_tokens(list(sample.prompt_ids)) for sample in samples]
    assert plain == [["<a_0>", "<b_1>", "<a_2>", "<b_3>", "Ċ"], ["<a_1>", "<b_1>", "Ċ"]]


def test_bos_stays_and_begin_mark_comes_last_once() -> None:
    tokenizer = make_tokenizer(MARKED, "<bos> $A <eos>")
    for template in ("{history}", "{history}<|sid_begin|>"):
        (sample,), _ = samples_of([record((0,))], tokenizer, MARKED, template=template)
        tokens = tokenizer.convert_ids_to_tokens(list(sample.prompt_ids))
        assert tokens == ["<bos>", "<s_a_0>", "<s_b_1>", "<|sid_begin|>"]


def test_chat_prompt_is_what_the_tokenizer_makes_of_it() -> None:
    tokenizer = make_tokenizer(MARKED, "<bos> $A <eos>")
    tokenizer.chat_template = TEMPLATE
    chat = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "<s_a_0><s_b_1>?"})
    (first, second), problems = samples_of([record((0,), chat), record((0,), "text")], tokenizer, MARKED)
    ids = tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, tokenize=True, return_dict=False)
    begin = tokenizer.convert_tokens_to_ids("<|sid_begin|>")
    assert problems == []
    assert list(first.prompt_ids) == [*ids, begin]
    assert tokenizer.decode(first.prompt_ids) == "[system]be brief\n[user]<s_a_0><s_b_1>?\n[assistant]<|sid_begin|>"
    assert tokenizer.decode(second.prompt_ids) == "<bos>text<|sid_begin|>"


def test_chat_without_template_or_refused_by_it() -> None:
    tokenizer = make_tokenizer(FMT)
    chat = ({"role": "user", "content": "hi"},)
    with pytest.raises(ValueError, match="train.csv:2: the prompt is a chat and the tokenizer has no chat template"):
        samples_of([record((), chat)], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    samples, (problem,) = samples_of([record((), chat), record(())], tokenizer)
    assert (problem.file, problem.row, problem.why) == ("train.csv", 2, "chat-template")
    assert "roles must alternate" in problem.detail and len(samples) == 1


def test_long_and_empty_prompts_are_problems() -> None:
    records = [record((0, 1)), record((0,), source="part/train.parquet:7"), record((), "", source="a.json:key")]
    samples, problems = samples_of(records, make_tokenizer(FMT, "$A <eos>"), limit=4)
    assert [sample.record.source for sample in samples] == ["part/train.parquet:7"]
    assert [str(problem) for problem in problems] == [
        "train.csv:2: prompt-too-long: the prompt has 5 tokens, data.max_prompt_tokens is 4",
        "a.json:key: empty-prompt: the prompt has no token",
    ]


def test_sid_vocab_binds_to_the_tokenizer() -> None:
    tokenizer = make_tokenizer(MARKED)
    vocab = sid_vocab(MARKED, tokenizer)
    assert tokenizer.convert_ids_to_tokens([*vocab.begin_ids, *vocab.end_ids]) == ["<|sid_begin|>", "<|sid_end|>"]
    assert tokenizer.convert_ids_to_tokens(vocab.level_ids[1].tolist()) == [f"<s_b_{code}>" for code in range(4)]


def test_sid_vocab_refuses_lacking_and_split_tokens() -> None:
    with pytest.raises(ValueError, match="lacks 3 of 8 SID tokens"):
        sid_vocab(FMT, make_tokenizer(FMT, drop=3))

    class Pretends:
        """Knows every token by name and still writes them letter by letter."""

        inner = make_tokenizer(FMT, special=False)

        def get_vocab(self) -> dict[str, int]:
            return {token: 1000 + index for index, token in enumerate(FMT.tokens())}

        def __call__(self, text: list[str], **settings: bool) -> Any:
            return self.inner(text, **settings)

    with pytest.raises(ValueError, match=r"writes '<a_0>' as ids .* each SID token must be one id: \[1000\]"):
        sid_vocab(FMT, Pretends())  # type: ignore[arg-type]


def test_sid_vocab_refuses_tokens_that_break_when_joined() -> None:
    words = {token: index for index, token in enumerate([*FMT.tokens(), "<unk>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(ValueError, match="writes '<a_0><b_0><a_0><b_0>' as ids"):
        sid_vocab(FMT, tokenizer)


users = st.lists(st.sampled_from(["", "a", "b", "c", "d", "é"]), max_size=20)


@given(users, st.floats(0.01, 1), st.integers(0, 5))
def test_split_keeps_users_whole_and_loses_nobody(names: list[str], share: float, seed: int) -> None:
    records = [record((0,), source=f"t:{row}", user=name) for row, name in enumerate(names)]
    rest, aside = split_users(records, share, seed)
    assert sorted(rest + aside, key=records.index) == records
    assert not {r.user for r in rest if r.user} & {r.user for r in aside if r.user}
    assert split_users(records[::-1], share, seed) == (rest[::-1], aside[::-1])


def test_split_shares() -> None:
    records = [record((0,), source=f"t:{row}", user=f"user{row // 2}") for row in range(8000)]
    pick: Callable[[int], set[str]] = lambda seed: {r.user for r in split_users(records, 0.4, seed)[1]}  # noqa: E731
    assert abs(len(pick(0)) / 4000 - 0.4) < 0.03
    assert pick(0) == pick(0) != pick(1)
    assert {r.user for r in split_users(records, 0.2, 0)[1]} <= pick(0)
    assert split_users(records, 0, 0) == (records, records)
    assert split_users(records, 1, 0) == ([], records)
    nameless = [record((0,), source=f"t:{row}", user="") for row in range(1000)]
    assert 300 < len(split_users(nameless, 0.4, 0)[1]) < 500
    with pytest.raises(ValueError, match="data.rl_users=1.5"):
        split_users(records, 1.5, 0)
