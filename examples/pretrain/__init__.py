"""Before post-training: a language model learns to read and write semantic ids: `python -m examples.pretrain`."""
