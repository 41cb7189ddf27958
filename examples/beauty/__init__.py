"""Amazon Beauty by leave-one-out, from raw sequences to a post-trained policy: `python -m examples.beauty`."""
