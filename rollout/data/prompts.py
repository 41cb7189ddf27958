"""Records to Samples: prompts are written, tokenised in one batch and checked for length."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Protocol

from rollout.catalog import Catalog
from rollout.data.problems import Problem, short
from rollout.sid import SidFormat, SidVocab
from rollout.types import Message, Prompt, Record, Sample

_FIELDS = ("history", "titles")


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None
    chat_template: str | dict[str, str] | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """Token ids of each text, under the key `input_ids`."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The id of every token."""
        ...

    def apply_chat_template(self, conversation: list[Message], *, add_generation_prompt: bool, tokenize: bool) -> Any:
        """The text of a conversation."""
        ...


def render(record: Record, catalog: Catalog, template: str, max_history: int) -> Prompt:
    """The prompt of a record: its own, or the template filled with its newest `max_history` items.

    `{history}` becomes their Sids without begin and end marks, oldest first, and `{titles}` their titles with "; "
    between; a brace is written `{{`.

    Raises:
        ValueError: naming a field that the template has and nobody knows.
    """
    if record.prompt is not None:
        return record.prompt
    fields = _template_fields(template)
    if max_history < 0:
        raise ValueError(f"data.max_history={max_history} must be at least 0")
    newest = record.history[max(0, len(record.history) - max_history) :]
    values = {}
    if "history" in fields:
        values["history"] = "".join(catalog.format.body(catalog.sid(item)) for item in newest)
    if "titles" in fields:
        values["titles"] = "; ".join(catalog.titles[item] for item in newest)
    return template.format(**values)


def _template_fields(template: str) -> set[str]:
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"data.prompt_template={template!r} is no template: {error}") from error
    unknown = sorted(fields - set(_FIELDS))
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in _FIELDS)
        raise ValueError(f"data.prompt_template has the unknown field {{{unknown[0]}}}; known are {known}")
    return fields


def prepare(
    records: Sequence[Record],
    catalog: Catalog,
    tokenizer: Tokenizer,
    *,
    template: str,
    max_history: int,
    max_prompt_tokens: int,
    thinks: Callable[[Record], bool] = lambda _: False,
    open_thought: str = "",
) -> tuple[list[Sample], list[Problem]]:
    """Tokenise the prompts of all records.

    Chat messages go through the tokenizer's chat template with its generation prompt. Every prompt then gets the begin
    mark of the format (unless it ends with it), so that the next token is the first code of an item. Prompts of records
    that think get `open_thought` instead.

    Returns:
        The samples, in order, and a problem for each record left out: `prompt-too-long`, `empty-prompt` or
        `chat-template` (the template refused the messages).

    Raises:
        ValueError: when the tokenizer lacks SID tokens or a chat template that rows need, or the template is wrong.
    """
    _template_fields(template)
    begin = list(sid_vocab(catalog.format, tokenizer).begin_ids)
    prompts = [render(record, catalog, template, max_history) for record in records]
    ids, refused = _tokenize(prompts, records, tokenizer)
    samples, problems = [], []
    opening = list(tokenizer([open_thought], add_special_tokens=False)["input_ids"][0]) if open_thought else []
    for row, record in enumerate(records):
        tokens, last = ids[row], opening if thinks(record) else begin
        if tokens[len(tokens) - len(last) :] != last:
            tokens = tokens + last
        if row in refused:
            problems.append(Problem.of_record(record, "chat-template", refused[row]))
        elif not tokens:
            problems.append(Problem.of_record(record, "empty-prompt", "the prompt has no token"))
        elif len(tokens) > max_prompt_tokens:
            detail = f"the prompt has {len(tokens)} tokens, data.max_prompt_tokens is {max_prompt_tokens}"
            problems.append(Problem.of_record(record, "prompt-too-long", detail))
        else:
            samples.append(Sample(record, tuple(tokens), thinks(record)))
    return samples, problems


def _tokenize(
    prompts: list[Prompt], records: Sequence[Record], tokenizer: Tokenizer
) -> tuple[list[list[int]], dict[int, str]]:
    """Token ids of every prompt, and why some rows have none."""
    texts: dict[int, str] = {row: prompt for row, prompt in enumerate(prompts) if isinstance(prompt, str)}
    chats: dict[int, str] = {}
    refused: dict[int, str] = {}
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        if not tokenizer.chat_template:
            raise ValueError(f"{records[row].source}: the prompt is a chat and the tokenizer has no chat template")
        try:
            chats[row] = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # whatever a template of the user's raises is the fault of this one row
            refused[row] = f"{type(error).__name__}: {short(str(error))}"
    ids: list[list[int]] = [[] for _ in prompts]
    # A chat template writes its special tokens itself; a text gets the tokenizer's, except an end mark.
    for group, special in ((texts, True), (chats, False)):
        if group:
            encoded = tokenizer(list(group.values()), add_special_tokens=special)["input_ids"]
            for row, tokens in zip(group, encoded, strict=True):
                ids[row] = _without_eos(list(tokens), tokenizer.eos_token_id) if special else list(tokens)
    return ids, refused


def _without_eos(tokens: list[int], eos: int | None) -> list[int]:
    while tokens and tokens[-1] == eos:
        tokens.pop()
    return tokens


def sid_vocab(fmt: SidFormat, tokenizer: Tokenizer) -> SidVocab:
    """Bind a format to a tokenizer, and prove that it writes every SID token as that one id, alone and in a row.

    Raises:
        ValueError: naming tokens that the tokenizer lacks or writes differently.
    """
    vocab = SidVocab.bind(fmt, tokenizer.get_vocab().get)
    tokens = fmt.tokens()
    marks = [list(vocab.begin_ids), list(vocab.end_ids)]
    wanted = [mark for mark in marks if mark] + [[int(i)] for level in vocab.level_ids for i in level]
    for last in (False, True):
        sid = tuple(size - 1 if last else 0 for size in fmt.sizes)
        body = [int(level[code]) for level, code in zip(vocab.level_ids, sid, strict=True)]
        tokens.append(fmt.format(sid) * 2)
        wanted.append((marks[0] + body + marks[1]) * 2)
    written = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    for token, want, ids in zip(tokens, wanted, written, strict=True):
        if list(ids) != want:
            raise ValueError(
                f"the tokenizer writes {short(token)} as ids {short(list(ids))}, each SID token must be one id: "
                f"{short(want)}; add the SID tokens to it as special tokens"
            )
    return vocab


def split_users(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Rest and kept-aside records: about `share` of the users, with all their rows, are kept aside.

    Whether a user is kept aside depends on the seed and the user's name alone; a record without a user counts as a user
    of its own. A share of 0 gives all records on both sides.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"data.rl_users={share} must be between 0 and 1")
    if share == 0:
        return list(records), list(records)
    kept = [_uniform(seed, record) < share for record in records]
    rest = [record for record, aside in zip(records, kept, strict=True) if not aside]
    return rest, [record for record, aside in zip(records, kept, strict=True) if aside]


def _uniform(seed: int, record: Record) -> float:
    """A number in [0, 1) that the seed and the user decide."""
    name = f"user:{record.user}" if record.user else f"source:{record.source}"
    digest = blake2b(f"{seed}:{name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
