"""Amazon Industrial & Scientific: the main job on real data."""
