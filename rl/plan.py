"""`--dry-run`: check data, model, tokens, rewards and cluster, and tell what the run would do. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

from configs.load import dump
from configs.schema import RunConfig
from rl.algorithms import build_algorithm
from rl.progress import console
from rl.quiet import quiet_libraries
from rl.ray_cluster import cluster
from rl.task import load_data, policy_folder, prepare_task, rl_and_warmup_rows
from rl.tiny import build_model, build_tokenizer, save_policy
from rollout.data.world import World
from rollout.engine import engine_spec


def show_plan(config: RunConfig) -> None:
    """Print the resolved settings and the plan of the run.

    Raises:
        ValueError: for anything that would stop the run before its first step.
    """
    import tempfile

    def say(text: str) -> None:
        console.print(text, markup=False)

    with tempfile.TemporaryDirectory(prefix="sidrl-plan-") as scratch:
        quiet_libraries(None)
        console.print(dump(config), markup=False)
        world, folder = load_data(config, say)
        if config.model.path is None:
            path = Path(scratch) / "policy"
            _untrained(config, world, path)
            _, rows = rl_and_warmup_rows(config, world)
            say(f"would warm up a policy on {len(rows)} rows unless the cache holds it")
        else:
            path = policy_folder(config, world, folder, say, lambda _: None)
        task = prepare_task(config, world, path, say)
    spec, algorithm = engine_spec(config, path), build_algorithm(config)
    with cluster(config.ray) as where:
        say(where)
    group, prompts = config.rollout.group_size, config.rl.prompts_per_step
    rewards = ", ".join(f"{reward.weight:g} x {reward.name or reward.reward}" for reward in config.rewards)
    say(f"rollouts: {config.rollout.num_engines} {spec.kind} engine(s) ({spec.why}), sampler {config.rollout.sampler}")
    say(f"rewards: {rewards} (tried on a group with a hit, a miss and an illegal rollout)")
    batches = config.rl.steps // config.rl.epochs_per_batch
    twice = f", each batch used {config.rl.epochs_per_batch} times" if config.rl.epochs_per_batch > 1 else ""
    say(
        f"training: {algorithm.name}, {config.rl.steps} steps; {batches} batches of {prompts} prompts x {group} "
        f"rollouts = {batches * prompts * group} rollouts over {len(task.samples['train'])} rows "
        f"({batches * prompts / len(task.samples['train']):.1f} passes){twice}"
    )
    say(
        f"policy: {f'LoRA r={config.lora.r}' if config.lora.enabled else 'all weights'}, "
        f"learning rate {config.rl.learning_rate:g}"
    )
    say(f"evaluation: {config.eval.split}, beams of {config.eval.beam_width}; output {config.output_dir}")
    say("dry run: nothing was trained")


def _untrained(config: RunConfig, world: World, path: Path) -> None:
    """A stand-in with the tokenizer and sizes of the policy that the warm-up would make."""
    tokenizer = build_tokenizer(world.catalog.format)
    warmup = config.warmup
    save_policy(
        build_model(tokenizer, hidden_size=warmup.hidden_size, layers=warmup.layers, heads=warmup.heads),
        tokenizer,
        path,
    )
