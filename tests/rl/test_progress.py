"""What people see while a run works, and how errors are told."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

import rl.progress
from rl.progress import Progress, Snapshot, View, fail_clearly


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is written to a console that is no terminal."""
    written = io.StringIO()
    monkeypatch.setattr(rl.progress, "console", Console(file=written, soft_wrap=True, highlight=False, width=80))
    yield written


def test_snapshots() -> None:
    progress = Progress()
    assert progress.snapshot() == Snapshot("", 0, 0, {}, ())
    progress.say("one")
    progress.update("train", 1, 3, {"reward": 0.5, "note": "text", "count": 2})
    progress.say("two")
    assert progress.snapshot() == Snapshot("train", 1, 3, {"reward": 0.5, "count": 2.0}, ("one", "two"))
    assert progress.snapshot(1).messages == ("two",)
    assert progress.snapshot(2).messages == ()


def test_fields_stay_until_the_phase_changes() -> None:
    progress = Progress()
    progress.update("train", 1, 3, {"reward": 0.5})
    progress.update("train", 2, 3)
    assert progress.snapshot().fields == {"reward": 0.5}
    progress.update("evaluate", 0, 9)
    assert progress.snapshot().fields == {}


def test_messages_of_many_threads_all_arrive() -> None:
    progress = Progress()

    def speak(name: int) -> None:
        for number in range(50):
            progress.say(f"{name}/{number}")

    threads = [threading.Thread(target=speak, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(progress.snapshot().messages) == sorted(f"{name}/{n}" for name in range(8) for n in range(50))


def test_lines_without_a_terminal(page: io.StringIO) -> None:
    """Messages at once, a phase when it begins, and not every step of it."""
    progress = Progress()
    with View() as view:
        progress.say("reading [data]")
        view.show(progress.snapshot(view.seen))
        progress.update("train", 0, 5)
        view.show(progress.snapshot(view.seen))
        for step in (1, 2, 3):
            progress.update("train", step, 5, {"reward": 0.25, "other": 1.0})
            view.show(progress.snapshot(view.seen))
        progress.update("evaluate after", 0, 7)
        view.show(progress.snapshot(view.seen))
    assert page.getvalue().split("\n") == ["reading [data]", "train: 0/5", "evaluate after: 0/7", ""]
    assert view.seen == 1


def test_a_line_now_and_then(page: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("rl.progress.time.monotonic", lambda: now[0])
    progress, view = Progress(), View()
    for step in range(1, 31):
        now[0] += 1
        progress.update("train", step, 30, {"reward": step / 10})
        view.show(progress.snapshot(view.seen))
    assert page.getvalue().splitlines() == [
        "train: 1/30  reward 0.1",
        "train: 11/30  reward 1.1",
        "train: 21/30  reward 2.1",
    ]


def test_messages_are_no_markup(page: io.StringIO) -> None:
    """Square brackets of paths and errors are text."""
    View().show(Snapshot("", 0, 0, {}, ("[bold]path[/bold] [1, 2]",)))
    assert page.getvalue() == "[bold]path[/bold] [1, 2]\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, soft_wrap=True)
    monkeypatch.setattr(rl.progress, "console", console)
    with View() as view:
        view.show(Snapshot("warm-up", 1, 4, {"loss": 1.5}, ("hello",)))
        view.show(Snapshot("train", 2, 4, {"reward": 0.25}, ()))
    text = written.getvalue()
    assert "hello" in text
    assert "2/4" in text
    assert "reward 0.25" in text


def test_shown_tells_what_was_said_last(page: io.StringIO) -> None:
    progress = Progress()
    with progress.shown():
        progress.say("first")
    with pytest.raises(ValueError, match="stop"), progress.shown():
        progress.say("last words")
        raise ValueError("stop")
    assert page.getvalue().splitlines().count("last words") == 1


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("rl.steps=0"), FileNotFoundError("no file")])
def test_errors_of_users(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, fail_clearly():
        raise error
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, fail_clearly():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ZeroDivisionError])
def test_errors_of_ours_keep_their_traceback(error: type[Exception]) -> None:
    with pytest.raises(error), fail_clearly():
        raise error("a bug")
