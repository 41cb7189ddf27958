"""Seconds that semantic ids take, by residual k-means and by RQ-VAE.

    python -m tests.bench.quantize --items 50000 --dimensions 32 --levels 4 --codes 256

The last line is JSON: seconds of both (RQ-VAE with 20 epochs of 1,024 items), the lost share of the variance, and how
many Sids are distinct.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from examples.quantize.features import Features
from examples.quantize.quality import quality
from examples.quantize.sids import QuantizeSettings, quantise


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=32)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--codes", type=int, default=256)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    topics_KD = rng.normal(size=(max(2, options.items // 150), options.dimensions))
    vectors_ND = topics_KD[rng.integers(0, len(topics_KD), options.items)]
    vectors_ND = (vectors_ND + 0.4 * rng.normal(size=vectors_ND.shape)).astype(np.float32)
    features = Features(tuple(map(str, range(options.items))), vectors_ND)
    result: dict[str, float] = {}
    for method in ("rq-kmeans", "rq-vae"):
        start = time.perf_counter()
        found = quantise(features, QuantizeSettings(method, options.levels, options.codes))  # type: ignore[arg-type]
        name = method.replace("-", "_")
        result[f"{name}_s"] = round(time.perf_counter() - start, 2)
        figures = quality(found, vectors_ND)
        result |= {f"{name}_error": round(figures["error"][-1], 4), f"{name}_distinct": figures["distinct"]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
