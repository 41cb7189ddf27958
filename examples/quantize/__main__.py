"""Item embeddings to semantic ids, with a report.

    python -m examples.quantize --features items.parquet --out sids
    python -m examples.quantize --texts items.json --text_model FOLDER --out sids
    python -m examples.quantize --sequences sequential_data_processed.txt --out sids
    python -m examples.quantize --features items.parquet --config examples/quantize/openonerec.yaml --out sids

Sids that are there already are read, not made again (`--force` makes them anew), so that any pipeline may call this
first. `SIDRL_NO_SID_GENERATION=1` forbids making them.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from examples.quantize.auto import ensure_sids
from examples.quantize.features import Features, embed_sequences, embed_texts, read_features, read_items
from examples.quantize.sids import FILE, QuantizeSettings
from rl.progress import Progress, console, fail_clearly


def run(
    out: Path,
    features: Path | list[Path] | None = None,
    texts: Path | None = None,
    text_model: Path | None = None,
    sequences: Path | None = None,
    items: Path | None = None,
    dimensions: int = 64,
    leave_out: int = 2,
    force: bool = False,
    quantizer: QuantizeSettings = QuantizeSettings(),  # noqa: B008
) -> None:
    """Item embeddings to semantic ids, with a report.

    Args:
        out: folder for `semantic_id_dict.json`, `sids.json`, `quality.json` and `report.png`.
        features: Parquet file with `item_id` and `embedding`, or a list of such; several rows of an item are averaged.
        texts: Parquet or JSON with item texts, embedded by `text_model`.
        text_model: folder of a sentence-transformers model.
        sequences: a line for each user (the user, then items in time order): collaborative embeddings.
        items: the catalogue, where some items may have no embedding: Parquet with `item_id`, or text with an id a line.
        dimensions: of collaborative embeddings.
        leave_out: newest items of each user that collaborative embeddings are not learned from.
        force: make Sids anew where there are some.
        quantizer: how they are made.
    """
    given = [name for name, value in (("features", features), ("texts", texts), ("sequences", sequences)) if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given: embeddings come from one of them")
    if (texts is None) != (text_model is None):
        raise ValueError("texts and text_model go together: a model embeds texts")
    progress = Progress()
    names = read_items(items) if items else []

    def embeddings() -> Features | None:
        progress.say(f"embeddings from {given[0] if given else 'nowhere'}")
        if features:
            return read_features([features] if isinstance(features, Path) else features)
        if texts and text_model:
            return embed_texts(texts, text_model)
        if sequences:
            return embed_sequences(sequences, dimensions=dimensions, leave_out=leave_out)
        return None

    with progress.shown():
        sids = ensure_sids(out, embeddings, names, quantizer, progress, force=force)
    clusters = sids.clusters
    console.print(
        f"{len(sids.item_ids):,} items, {len(clusters):,} Sids of {len(sids.sizes)} levels {sids.sizes}, "
        f"largest cluster {clusters[0]}"
    )
    for name in (FILE, "sids.json", "quality.json", "report.png"):
        if (out / name).exists():
            console.print(f"  {out / name}", markup=False)


if __name__ == "__main__":
    with fail_clearly():
        auto_cli(run, as_positional=False)
