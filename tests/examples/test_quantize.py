"""Semantic ids: embeddings read and made, quantised, judged, kept; whatever is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.quantize.auto import FORBID, default_sids, ensure_sids
from examples.quantize.features import Features, embed_sequences, embed_texts, read_features
from examples.quantize.kmeans import assign_balanced, residual_kmeans
from examples.quantize.quality import quality
from examples.quantize.sids import FILE, Quantised, QuantizeSettings, SemanticIds, quantise, with_extra_code
from rl.progress import Progress
from rollout.data.problems import DataError


def clustered(items: int = 400, seed: int = 0) -> np.ndarray:
    """Vectors around 8 far points, each with 8 nearer points around it."""
    rng = np.random.default_rng(seed)
    far, near = 20 * rng.normal(size=(8, 6)), 3 * rng.normal(size=(8, 8, 6))
    one, two = rng.integers(0, 8, items), rng.integers(0, 8, items)
    return (far[one] + near[one, two] + 0.05 * rng.normal(size=(items, 6))).astype(np.float32)


def some(items: int = 400) -> Features:
    return Features(tuple(f"i{row}" for row in range(items)), clustered(items))


def write(path: Path, rows: list[tuple[Any, Any]]) -> Path:
    ids, vectors = zip(*rows, strict=True)
    pq.write_table(pa.table({"item_id": list(ids), "embedding": pa.array(list(vectors), pa.list_(pa.float32()))}), path)
    return path


def test_features_are_averaged(tmp_path: Path) -> None:
    """Over rows and files; rows that cannot be read are told."""
    one = write(tmp_path / "one.parquet", [("a", [1.0, 0.0]), ("b", [0.0, 2.0]), ("a", [3.0, 4.0])])
    bad = [("b", [4.0, 0.0]), ("c", [1.0]), (None, [1.0, 1.0]), ("d", [1.0, float("nan")]), ("e", None)]
    two = write(tmp_path / "two.parquet", bad)
    found = read_features([one, two])
    assert found.item_ids == ("a", "b")
    np.testing.assert_allclose(found.vectors_ND, [[2, 2], [2, 1]])
    assert [str(problem) for problem in found.problems] == [
        "two.parquet:1: bad-embedding: item c: 1 dimensions where the first vector has 2",
        "two.parquet:2: missing-field: item_id is empty",
        "two.parquet:3: bad-embedding: item d: not all numbers are finite",
        "two.parquet:4: bad-embedding: item e: 0 dimensions where the first vector has 2",
    ]
    with pytest.raises(DataError, match="nowhere"):
        read_features([tmp_path / "nowhere.parquet"])
    with pytest.raises(DataError, match="no item with an embedding"):
        read_features([write(tmp_path / "none.parquet", [("", [1.0])])])


def test_residual_kmeans_finds_clusters() -> None:
    """Each code is the nearest centroid to what is left; two levels explain two levels of clusters."""
    vectors = clustered()
    codes, books = residual_kmeans(vectors, (8, 64), balanced=False, seed=1)
    left = vectors
    for level, book in enumerate(books):
        nearest = ((left[:, None] - book[None]) ** 2).sum(axis=2).argmin(axis=1)
        np.testing.assert_array_equal(codes[:, level], nearest)
        left = left - book[codes[:, level]]
    assert (left**2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum() < 0.01
    again, _ = residual_kmeans(vectors, (8, 64), balanced=False, seed=1)
    np.testing.assert_array_equal(codes, again)
    with pytest.raises(ValueError, match="level 1 has 500 codes for 400 items"):
        residual_kmeans(vectors, (8, 500), balanced=False, seed=1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 1000))
def test_balanced_clusters(items: int, codes: int, seed: int) -> None:
    """Everybody has one, none has more than its share, and who is not at the nearest found it full of nearer ones."""
    rng = np.random.default_rng(seed)
    vectors, book = rng.normal(size=(items, 3)).astype(np.float32), rng.normal(size=(codes, 3)).astype(np.float32)
    found = assign_balanced(vectors, book)
    share = -(-items // codes)
    counts = np.bincount(found, minlength=codes)
    assert found.min() >= 0 and counts.max() <= share
    distance = ((vectors[:, None] - book[None]) ** 2).sum(axis=2)
    nearest = distance.argmin(axis=1)
    for row in np.flatnonzero(found != nearest):
        assert counts[nearest[row]] == share
        first = distance[found == nearest[row], nearest[row]]
        assert (first <= distance[row, nearest[row]] + 1e-5).all()


def test_balanced_levels() -> None:
    codes, _ = residual_kmeans(clustered(), (8, 16), balanced=True, seed=0)
    assert [np.bincount(code).max() for code in codes.T] == [50, 25]


def test_rqvae_learns() -> None:
    """Each level takes something off the error, codes are used, and a seed gives the same again."""
    given = QuantizeSettings("rq-vae", levels=3, codes=16, epochs=30, batch_size=100)
    found = quantise(some(), given)
    figures = quality(found, clustered())
    assert figures["error"][0] > figures["error"][1] > figures["error"][2] and figures["error"][2] < 0.15
    assert min(figures["used"]) > 8
    assert found.sids.codes_NL.min() >= 0 and found.sids.codes_NL.max() < 16
    np.testing.assert_array_equal(quantise(some(), given).sids.codes_NL, found.sids.codes_NL)
    with pytest.raises(ValueError, match="a level has 500 codes for 400 items"):
        quantise(some(), QuantizeSettings("rq-vae", codes=500))


def test_collisions() -> None:
    codes = np.array([[1, 2], [3, 0], [1, 2], [1, 2], [3, 0]])
    longer, sizes = with_extra_code(codes, (4, 4))
    assert longer.tolist() == [[1, 2, 0], [3, 0, 0], [1, 2, 1], [1, 2, 2], [3, 0, 1]] and sizes == (4, 4, 3)
    kept, apart = (
        quantise(some(), QuantizeSettings(levels=2, codes=8, collisions=how)).sids for how in ("keep", "extra")
    )
    assert kept.clusters[0] > 1 and apart.clusters.tolist() == [1] * 400
    assert apart.sizes == (8, 8, int(kept.clusters[0]))


def test_quality_by_hand() -> None:
    """Four items on a line, in two clusters of two."""
    vectors = np.array([[0.0], [1.0], [10.0], [12.0]], dtype=np.float32)
    codes = np.array([[0, 0], [0, 0], [1, 0], [1, 1]])
    sids = SemanticIds(("a", "b", "c", "d"), codes, (2, 4), {})
    one, two = np.array([[0.5], [0.5], [11], [11]]), np.array([[0.5], [0.5], [10], [12]])
    figures = quality(Quantised(sids, [one, two]), vectors)
    variance = float(((vectors - vectors.mean()) ** 2).sum())
    assert figures["error"] == pytest.approx([2.5 / variance, 0.5 / variance])
    assert figures["used"] == [2, 2]
    assert figures["perplexity"] == pytest.approx([2, np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))])
    assert (figures["distinct"], figures["collisions"], figures["largest_cluster"]) == (3, 1, 2)
    assert figures["clusters"] == {"1": 2, "2": 1}
    assert figures["neighbours"] == [1.0, 0.5]


def test_sids_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made, saved with a report, and found the next time; a variable forbids making them."""
    asked, given, progress = [], QuantizeSettings(levels=2, codes=8), Progress()

    def embeddings() -> Features:
        asked.append(1)
        return some(60)

    folder = tmp_path / "sids"
    monkeypatch.setenv(FORBID, "1")
    with pytest.raises(DataError, match=f"{FORBID}=1 forbids making it"):
        ensure_sids(folder, embeddings, (), given, progress)
    monkeypatch.delenv(FORBID)
    made = ensure_sids(folder, embeddings, ("i3", "stranger"), given, progress)
    monkeypatch.setenv(FORBID, "1")
    found = ensure_sids(folder, embeddings, made.item_ids, given, progress)
    assert asked == [1] and found.item_ids == made.item_ids and found.sizes == made.sizes == (8, 8)
    np.testing.assert_array_equal(found.codes_NL, made.codes_NL)
    assert {path.name for path in folder.iterdir()} == {FILE, "sids.json", "quality.json", "report.png"}
    said = progress.snapshot().messages
    assert said[0] == "warning: 1 items have no embedding and take the mean of all, such as ['stranger']"
    assert said[1].startswith("made Sids for 61 items") and said[2].startswith("found 61 Sids")
    ensure_sids(folder, embeddings, (), QuantizeSettings(levels=3, codes=8), progress)
    assert "were made with other settings" in progress.snapshot().messages[3]
    with pytest.raises(DataError, match=r"1 items have no Sid, such as \['other'\]; make them anew"):
        ensure_sids(folder, embeddings, ("i3", "other"), given, progress)
    monkeypatch.delenv(FORBID)
    ensure_sids(folder, embeddings, ("i3", "other"), given, progress, force=True)
    assert "other" in SemanticIds.load(folder).item_ids


def test_a_catalogue_without_features(tmp_path: Path) -> None:
    """Numbered, with a warning; never when there is no catalogue either."""
    progress, given = Progress(), QuantizeSettings(levels=3, codes=4)
    names = tuple(f"song-{row}" for row in range(50))
    found = ensure_sids(tmp_path, lambda: None, names, given, progress)
    assert found.clusters.tolist() == [1] * 50 and found.made["defaults"] is True
    assert found.codes_NL[:5].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [0, 1, 0]]
    assert "warning: no embeddings: 50 items are numbered" in progress.snapshot().messages[0]
    with pytest.raises(DataError, match="neither Sids, nor embeddings, nor a list of items"):
        ensure_sids(tmp_path / "other", lambda: None, (), given, progress)
    with pytest.raises(ValueError, match="65 items, and 3 levels of 4 codes are fewer"):
        default_sids([str(row) for row in range(65)], given)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({"a": [1, 2, 3]}, r"item 'a' has \[1, 2, 3\], and a Sid here has 2 codes"),
        ({"a": [1, 8]}, r"item 'a' has \[1, 8\], and the levels have \(8, 8\) codes"),
        ({"a": "x"}, "item 'a' has 'x'"),
    ],
)
def test_damaged_sids(tmp_path: Path, codes: object, said: str) -> None:
    (tmp_path / "sids.json").write_text(json.dumps({"sizes": [8, 8]}))
    (tmp_path / FILE).write_text(json.dumps(codes))
    with pytest.raises(DataError, match=said):
        SemanticIds.load(tmp_path)
    (tmp_path / FILE).write_text('{"a": [1')
    with pytest.raises(DataError, match="no Sids that can be read"):
        SemanticIds.load(tmp_path)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="levels=0 must be at least 1"):
        QuantizeSettings(levels=0)
    with pytest.raises(ValueError, match="balanced=true is for method=rq-kmeans"):
        QuantizeSettings("rq-vae", balanced=True)


def test_collaborative_embeddings(tmp_path: Path) -> None:
    """Items of the same people come near; what is left out is not learned from; it comes out the same again."""
    rng = np.random.default_rng(0)
    lines = []
    for user in range(300):
        group = user % 2
        lines.append(" ".join([f"u{user}", *(f"{group}-{item}" for item in rng.integers(0, 8, 8)), "last", "last2"]))
    file = tmp_path / "sequences.txt"
    file.write_text("\n".join(lines) + "\n")
    found = embed_sequences(file, dimensions=8, leave_out=2)
    learned = np.array(["last" not in name for name in found.item_ids])
    group_N = np.array([name[0] for name in found.item_ids])[learned]
    unit = found.vectors_ND[learned] / np.linalg.norm(found.vectors_ND[learned], axis=1, keepdims=True)
    alike = unit @ unit.T
    same = group_N[:, None] == group_N[None]
    assert alike[same].mean() > alike[~same].mean() + 0.3
    assert sum(~learned) == 2
    middle = found.vectors_ND[learned].mean(axis=0)
    np.testing.assert_allclose(found.vectors_ND[~learned], [middle, middle], atol=1e-6)
    again = embed_sequences(file, dimensions=8, leave_out=2)
    np.testing.assert_array_equal(again.vectors_ND, found.vectors_ND)
    with pytest.raises(DataError, match="no user with two items beside 20"):
        embed_sequences(file, dimensions=8, leave_out=20)
    with pytest.raises(ValueError, match="dimensions=18 must be below the number of items, 18"):
        embed_sequences(file, dimensions=18, leave_out=2)


@pytest.mark.slow
def test_text_embeddings(tmp_path: Path) -> None:
    """A small encoder made here; texts in MiniOneRec's JSON and in Parquet."""
    model = tiny_encoder(tmp_path / "encoder")
    items = {"7": {"title": "red chair", "categories": "x"}, "8": {"title": "", "description": ""}, "9": "no object"}
    (tmp_path / "items.json").write_text(json.dumps(items))
    found = embed_texts(tmp_path / "items.json", model)
    assert found.item_ids == ("7",) and found.vectors_ND.shape == (1, 16)
    assert [(problem.row, problem.why) for problem in found.problems] == [
        ("8", "missing-field"),
        ("9", "missing-field"),
    ]
    table = pa.table({"item_id": ["a", "b"], "title": ["red chair", "blue sofa"], "description": [None, "soft"]})
    pq.write_table(table, tmp_path / "items.parquet")
    other = embed_texts(tmp_path / "items.parquet", model)
    np.testing.assert_allclose(other.vectors_ND[0], found.vectors_ND[0], atol=1e-6)
    with pytest.raises(DataError, match="no such folder"):
        embed_texts(tmp_path / "items.json", tmp_path / "nowhere")


def tiny_encoder(folder: Path) -> Path:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "red", "blue", "chair", "sofa", "soft", "."]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "bert"
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder / "bert")
    parts = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[parts, Pooling(16)]).save(str(folder / "encoder"))
    return folder / "encoder"
