"""The checking command: exit status, counts, lines and limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.check import main
from tests.data_dir import shared_data

INDEX = {"1": ["<a_1>", "<b_1>"], "2": ["<a_1>", "<b_1>"], "3": ["<a_2>", "<b_0>"]}


def folder(tmp_path: Path, rows: list[str]) -> Path:
    (tmp_path / "Toys.index.json").write_text(json.dumps(INDEX))
    (tmp_path / "train.csv").write_text("\n".join(["user_id,history_item_id,item_id", *rows]) + "\n")
    return tmp_path


def test_clean_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, ["u,[1],3", "u,[3],2", "v,[],1"])
    assert main([str(path), "--json", str(tmp_path / "out.json")]) == 0
    assert "No bad rows." in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == {
        "format": "minionerec",
        "counts": {
            "items": 3,
            "levels": 2,
            "distinct sids": 2,
            "collisions (items beyond the first of their sid)": 1,
            "largest cluster (items of one sid)": 2,
            "items without a title": 3,
            "train rows": 3,
            "train users": 2,
        },
        "problems": [],
    }


def test_bad_rows_are_listed_up_to_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, ["u,[1],3", *["u,[1],99"] * 30, "u,[1],", "u,what,3"])
    assert main([str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "train.csv:3: unknown-item: target item '99' is not in the catalogue" in lines
    assert "train.csv:22: unknown-item: target item '99' is not in the catalogue" in lines
    assert "… and 10 more of kind unknown-item (--limit 0 shows all)" in lines
    assert "train.csv:33: empty-target: item_id is empty" in lines
    assert "train.csv:34: wrong-type: history_item_id is no Python list: 'what'" in lines
    assert sum("unknown-item:" in line for line in lines) == 20
    assert main([str(path), "--limit", "0", "--json", str(tmp_path / "all.json")]) == 1
    assert sum("unknown-item:" in line for line in capsys.readouterr().out.splitlines()) == 30
    problems = json.loads((tmp_path / "all.json").read_text())["problems"]
    assert len(problems) == 32
    assert problems[0] == {
        "file": "train.csv",
        "row": 3,
        "why": "unknown-item",
        "detail": "target item '99' is not in the catalogue",
    }


def test_wild_content_does_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, ["u,[1],\x1b[31m[bold]x" + "y" * 100_000])
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "[bold]" in out
    assert max(len(line) for line in out.splitlines()) < 500


@pytest.mark.parametrize("path", ["missing", "empty"])
def test_unreadable_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and path in said.err


def test_unwritable_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder(tmp_path, ["u,[1],3"])), "--json", str(tmp_path / "no" / "out.json")]) == 2
    assert "out.json" in capsys.readouterr().err


def test_negative_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--limit", "-1"])
    assert "-1 is below 0" in capsys.readouterr().err


def test_prompts_are_measured_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rollout.sid import letters_format
    from tests.rollout.test_data_prompts import make_tokenizer

    path = folder(tmp_path, ['u,"[1, 2, 3]",3', "u,[1],3"])
    make_tokenizer(letters_format((256, 256))).save_pretrained(tmp_path / "good")
    make_tokenizer(letters_format((4, 4))).save_pretrained(tmp_path / "small")
    assert main([str(path), "--tokenizer", str(tmp_path / "good")]) == 0
    assert "longest prompt that fits" in capsys.readouterr().out
    assert main([str(path), "--tokenizer", str(tmp_path / "good"), "--max_prompt_tokens", "6"]) == 1
    line = "train.csv:2: prompt-too-long: the prompt has 7 tokens, data.max_prompt_tokens is 6"
    assert line in capsys.readouterr().out
    assert main([str(path), "--tokenizer", str(tmp_path / "small")]) == 2
    assert "lacks 504 of 512 SID tokens" in capsys.readouterr().err
    assert main([str(path), "--tokenizer", str(tmp_path / "nowhere")]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


def test_real_data_from_the_command_line() -> None:
    path = shared_data("amazon-industrial")
    command = [sys.executable, "-m", "rollout.check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    for count in ("3,686", "3,670", "10,393", "4,532", "4,533"):
        assert count in done.stdout
