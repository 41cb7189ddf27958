"""Training: the loop, the TRL trainer, algorithms, warm-up, evaluation, report."""
