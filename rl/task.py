"""What a run works on: data, policy folder, tokenizer, trie, samples and rewards, each checked before time is spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from configs.schema import RunConfig
from rewards.runner import RewardSet
from rl.cache import files_fingerprint, make_once
from rl.general import TextPrompt, read_general, tokenise_general
from rl.thoughts import thinks, thought_of
from rollout.data.native import write_world
from rollout.data.problems import DataError, Problem
from rollout.data.prompts import prepare, sid_vocab, split_users
from rollout.data.world import World, load_world
from rollout.decode import Decoder
from rollout.demo_world import demo_world
from rollout.types import Record, Sample, Thought

Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """Everything that a run needs and that does not change while it runs.

    Attributes:
        model_path: Hugging Face folder of the policy it starts from.
        tokenizer: the policy's tokenizer.
        decoder: catalogue and trie over the tokenizer's ids.
        samples: tokenised rows by split; `train` holds the rows that RL trains on.
        rewards: the rewards, built and tried.
        skipped: bad rows that were left out.
        completion_tokens: tokens of the longest completion.
        general: general prompts with answers that evaluations look at (`eval.general`).
        thought: how free text before the items is written, if at all.
    """

    model_path: Path
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder
    samples: dict[str, list[Sample]]
    rewards: RewardSet
    skipped: int
    completion_tokens: int
    thought: Thought | None = None
    general: tuple[TextPrompt, ...] = ()


def data_folder(config: RunConfig, say: Say) -> Path:
    """`data.path`, or the cached folder of the demo world, which is made the first time."""
    if config.data.path != "demo":
        return Path(config.data.path)
    folder, made = make_once("worlds/demo-3", lambda scratch: write_world(demo_world(), scratch / "world"))
    say(f"{'made' if made else 'found'} the demo world in {folder}")
    return folder / "world"


def load_data(config: RunConfig, say: Say) -> tuple[World, Path]:
    """Read `data.path`.

    Raises:
        DataError: when a file cannot be read, a needed split is missing, or rows are bad (`data.on_bad_rows: stop`).
    """
    folder = data_folder(config, say)
    world = load_world(folder, "auto" if config.data.path == "demo" else config.data.format)
    refuse_bad_rows(world.problems, config, folder)
    for split in ("train", "valid", config.eval.split):
        if not world.splits.get(split):
            raise DataError(f"data.path={folder}: no rows in split {split!r}; it has {_counts(world)}")
    catalog = world.catalog
    say(
        f"{world.format} data: {len(catalog)} items, {len(catalog.sids_SL)} Sids "
        f"({catalog.collisions} items share one), rows {_counts(world)}"
    )
    return world, folder


def rl_and_warmup_rows(config: RunConfig, world: World) -> tuple[list[Record], list[Record]]:
    """Training rows of RL, and those of the warm-up: different users, unless `data.rl_users` is 0."""
    warmup, rl = split_users(world.splits["train"], config.data.rl_users, config.seed)
    return rl, warmup


def restrict(config: RunConfig, records: Sequence[Record]) -> tuple[list[Record], list[Problem]]:
    """Records with what `data.exclude_history` takes from them, and a problem for each whose targets are all gone."""
    if config.data.exclude_history:
        records = [replace(record, excluded=tuple({*record.excluded, *record.history})) for record in records]
    allowed: list[Record] = []
    problems = []
    for record in records:
        if any(record.allows(target) for target in record.targets):
            allowed.append(record)
        else:
            why = (
                "none of the targets is among the candidates"
                if record.candidates is not None
                else ("all targets are in the history (data.exclude_history)")
            )
            problems.append(Problem.of_record(record, "target-not-allowed", why))
    return allowed, problems


def tokenise(
    config: RunConfig, world: World, tokenizer: PreTrainedTokenizerBase, records: list[Record]
) -> tuple[list[Sample], int]:
    """Samples of records, and how many were left out because their prompt is too long.

    Raises:
        DataError: when prompts are too long and `data.on_bad_rows` is stop.
    """
    samples, problems = prepare(
        records,
        world.catalog,
        tokenizer,
        template=config.data.prompt_template,
        max_history=config.data.max_history,
        max_prompt_tokens=config.data.max_prompt_tokens,
        thinks=lambda record: thinks(config.thought, record.task),
        open_thought=config.thought.open,
    )
    refuse_bad_rows(problems, config, Path(config.data.path))
    return samples, len(problems)


def refuse_bad_rows(problems: tuple[Problem, ...] | list[Problem], config: RunConfig, folder: Path) -> None:
    """Raise DataError for bad rows unless the run was told to skip them."""
    if problems and config.data.on_bad_rows == "stop":
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        raise DataError(
            f"{len(problems)} bad rows, first:\n{shown}\n"
            f"`python -m rollout.check {folder}` lists them all; data.on_bad_rows=skip trains without them"
        )


def policy_folder(config: RunConfig, world: World, folder: Path, say: Say, warm_up: Callable[[Path], None]) -> Path:
    """`model.path`, or the cached warm policy of this data and these settings, which `warm_up` makes the first time."""
    if config.model.path is not None:
        return Path(config.model.path)
    settings = {
        "data": files_fingerprint(folder),
        "data_settings": asdict(config.data) | {"path": "", "on_bad_rows": ""},
        "warmup": asdict(config.warmup),
        "seed": config.seed,
        "recipe": 1,  # changes when the warm-up's code would give another policy
    }
    key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    name = "demo" if config.data.path == "demo" else folder.resolve().name
    policy, made = make_once(f"policies/{name}-{key}", warm_up)
    say(f"{'made' if made else 'found'} the warm policy in {policy}")
    return policy


def read_model(path: Path, setting: str, trust: bool = False) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a model's folder.

    Args:
        path: the folder.
        setting: what names it, for messages.
        trust: run code that comes with it.

    Raises:
        ValueError: when they cannot be read.
    """
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        return settings, AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}={path}: no model and tokenizer could be read from it: {error}") from error


def prepare_task(config: RunConfig, world: World, model_path: Path, say: Say) -> Task:
    """Tokenizer, trie, samples and rewards, checked against each other.

    Raises:
        ValueError: when the model or its tokenizer does not fit the catalogue, or the catalogue the settings.
    """
    trust = config.model.trust_remote_code
    if config.model.attention == "flex_attention" and not torch.cuda.is_available():
        raise ValueError("model.attention=flex_attention needs a GPU: it has no backward pass on CPU; take sdpa")
    if (model_path / "adapter_config.json").is_file() and not (model_path / "config.json").is_file():
        raise ValueError(
            f"model.path={model_path} is an adapter, not a whole model: --output.merged_model of the run that made it "
            "writes one, also when it is resumed"
        )
    model_config, tokenizer = read_model(model_path, "model.path", trust)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    try:
        vocab = sid_vocab(world.catalog.format, tokenizer)
    except ValueError as error:
        raise ValueError(f"model.path={model_path}: {error}") from error
    decoder = Decoder.build(world.catalog, vocab, model_config.get_text_config().vocab_size)
    items = config.rollout.items_per_completion
    try:
        thought = thought_of(config.thought, tokenizer, vocab, decoder)
    except ValueError as error:
        raise ValueError(f"model.path={model_path}: {error}") from error
    completion = decoder.completion_tokens(items) + (thought.longest if thought else 0)
    needed = config.data.max_prompt_tokens + completion + 1
    if positions is not None and positions < needed:
        raise ValueError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} and {items} item{'s' * (items > 1)} need {needed} "
            f"positions, and model.path={model_path} has max_position_embeddings={positions}"
        )
    asked, setting = config.rollout.group_size, "rollout.group_size"
    if config.algo == "pl":
        asked, setting = config.rl.ranking_length, "rl.ranking_length"
    different = items if config.rollout.sampler == "sample" and config.algo != "pl" else asked
    if items > 1:
        setting = "rollout.items_per_completion"
    if decoder.trie.num_leaves < different:
        raise ValueError(
            f"{setting}={different} distinct items are asked of a catalogue of {decoder.trie.num_leaves} Sids "
            f"(rollout.sampler={config.rollout.sampler})"
        )
    rl_records, _ = rl_and_warmup_rows(config, world)
    skipped = len(world.problems)
    samples = {}
    for split, records in {**world.splits, "train": rl_records}.items():
        allowed, problems = restrict(config, records)
        refuse_bad_rows(problems, config, Path(config.data.path))
        samples[split], dropped = tokenise(config, world, tokenizer, allowed)
        skipped += dropped + len(problems)
    views = decoder.views(samples["train"])
    if views is not None and (few := int(views.sizes_V[1:].min())) < different:
        sample = samples["train"][int(views.sizes_V[1:].argmin())]
        if sample.record.candidates is None or config.algo != "pl":
            raise DataError(
                f"{sample.record.source}: {few} Sids may be recommended, and {setting}={different} different ones are "
                "asked"
            )
    rewards = RewardSet(config.rewards, world.catalog)
    if skipped:
        say(f"skipped {skipped} bad rows (data.on_bad_rows=skip)")
    if len(samples["train"]) < config.rl.prompts_per_step:
        raise ValueError(
            f"rl.prompts_per_step={config.rl.prompts_per_step}, but RL has only {len(samples['train'])} training rows "
            f"(data.rl_users={config.data.rl_users})"
        )
    general = general_rows(config, tokenizer, decoder)
    return Task(model_path, tokenizer, decoder, samples, rewards, skipped, completion, thought, general)


def general_rows(config: RunConfig, tokenizer: PreTrainedTokenizerBase, decoder: Decoder) -> tuple[TextPrompt, ...]:
    """What `eval.general` holds.

    Raises:
        DataError: when nothing can be read there, rows are bad (`data.on_bad_rows`), or none has an answer.
    """
    if not config.eval.general:
        return ()
    path = Path(config.eval.general)
    found, problems = read_general(path, config.eval.general_words)
    refuse_bad_rows(problems, config, path)
    rows, problems = tokenise_general(found, tokenizer, config.data.max_prompt_tokens, decoder.sid_tokens)
    refuse_bad_rows(problems, config, path)
    if not any(row.answer_ids for row in rows):
        raise DataError(f"eval.general={path}: no row has an answer to judge the policy by")
    return tuple(rows)


def _counts(world: World) -> str:
    return ", ".join(f"{split} {len(records)}" for split, records in world.splits.items())
