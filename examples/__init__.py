"""Pipelines and stages a newcomer can run."""
