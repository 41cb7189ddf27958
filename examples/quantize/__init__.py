"""Item embeddings to semantic ids: `python -m examples.quantize`."""
