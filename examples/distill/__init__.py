"""What RL costs in general ability and what distillation wins back: `python -m examples.distill`."""
