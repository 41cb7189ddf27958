"""Raw data to training sets: `python -m examples.build`."""
