"""Rewards on whole groups: protocol, built-ins, plugins, runner. Loads neither torch nor vllm nor ray."""
