"""Detection of formats, and what `rollout.data` may import."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data import DataError, detect, load_world


def minionerec(folder: Path) -> None:
    (folder / "Toys.index.json").write_text('{"1": ["<a_1>"]}')


def native(folder: Path) -> None:
    (folder / "format.json").write_text(json.dumps({"patterns": ["<a_{}>"], "sizes": [4]}))
    pq.write_table(pa.table({"item_id": ["x"], "sid": [[0]]}), folder / "items.parquet")


def openonerec(folder: Path) -> None:
    pq.write_table(pa.table({"pid": [1], "sid": [[0]]}), folder / "map.parquet")


@pytest.mark.parametrize(("make", "name"), [(minionerec, "minionerec"), (native, "sidrl"), (openonerec, "openonerec")])
def test_detects_by_files(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    make(tmp_path)
    assert detect(tmp_path) == name
    with pytest.raises(DataError, match="no row files"):
        load_world(tmp_path)


def test_two_formats_in_one_folder_must_be_told_apart(tmp_path: Path) -> None:
    minionerec(tmp_path)
    native(tmp_path)
    with pytest.raises(DataError, match="fits sidrl and minionerec; say which with data.format"):
        detect(tmp_path)
    (tmp_path / "train.csv").write_text("user_id,history_item_id,item_id\nu,[],1\n")
    assert load_world(tmp_path, "minionerec").format == "minionerec"


def test_no_format_says_what_it_saw_and_what_it_expects(tmp_path: Path) -> None:
    for number in range(14):
        (tmp_path / f"file{number:02}.txt").write_text("")
    with pytest.raises(DataError) as error:
        detect(tmp_path)
    text = str(error.value)
    assert "has no known format. It holds: file00.txt, file01.txt" in text and "and 2 more" in text
    for expected in ("format.json", "index.json", "train.csv", "pid, sid"):
        assert expected in text
    (tmp_path / "sub").mkdir()
    with pytest.raises(DataError, match="It holds: nothing"):
        detect(tmp_path / "sub")


def test_missing_folder_suggests_a_close_name(tmp_path: Path) -> None:
    (tmp_path / "amazon-industrial").mkdir()
    with pytest.raises(DataError, match=r"amazon-industry: does not exist; did you mean .*/amazon-industrial\?"):
        load_world(tmp_path / "amazon-industry")
    with pytest.raises(DataError, match="does not exist; did you mean .*/amazon-industrial"):
        load_world(tmp_path / "amazon-industrail" / "deeper")
    with pytest.raises(DataError, match=r"does not exist; .* has no zzz"):
        load_world(tmp_path / "zzz")


def test_suggestions_are_written_as_the_path_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beauty").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=r"^\.\./beaty: does not exist; did you mean \.\./beauty\?$"):
        load_world("../beaty")
    with pytest.raises(DataError, match=r"^nothing: does not exist; \. has no nothing$"):
        load_world("nothing")


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data.format='csv' must be one of auto, sidrl, minionerec, openonerec"):
        load_world(tmp_path, "csv")
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(DataError, match="is a file; give the folder"):
        load_world(tmp_path / "train.csv")
    with pytest.raises(DataError, match="is a file; the format sidrl is a folder"):
        load_world(tmp_path / "train.csv", "sidrl")


def test_garbage_parquet_is_named_while_detecting(tmp_path: Path) -> None:
    (tmp_path / "map.parquet").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"map.parquet: cannot be read as Parquet"):
        load_world(tmp_path)


def test_import_is_light() -> None:
    heavy = "torch vllm ray trl transformers pandas"
    code = f"import rollout.data, sys; print([name for name in '{heavy}'.split() if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert out.stdout.strip() == "[]"
