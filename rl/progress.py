"""What a run is doing, for people: phase, step, reward, time left. One object in the process that works, one view."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Snapshot:
    """State at one moment: the current phase and every message so far from a given one on."""

    phase: str
    step: int
    steps: int
    fields: Mapping[str, float]
    messages: tuple[str, ...]


class Progress:
    """Thread-safe record of phase, step and messages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = ("", 0, 0, {})  # type: tuple[str, int, int, Mapping[str, float]]
        self._messages: list[str] = []

    def say(self, message: str) -> None:
        """A line for people."""
        with self._lock:
            self._messages.append(message)

    def update(self, phase: str, step: int, steps: int, fields: Mapping[str, Any] | None = None) -> None:
        """Now at `step` of `steps` of a phase; numbers among `fields` may be shown."""
        numbers = {key: float(value) for key, value in (fields or {}).items() if isinstance(value, (int, float))}
        with self._lock:
            self._state = (phase, step, steps, numbers or self._state[3] if phase == self._state[0] else numbers)

    def snapshot(self, seen: int = 0) -> Snapshot:
        """The state now, and the messages after the first `seen`."""
        with self._lock:
            return Snapshot(*self._state, tuple(self._messages[seen:]))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show this object on the console while the block runs."""
        stop = threading.Event()
        view = View()

        def loop() -> None:
            while not stop.wait(0.2):
                view.show(self.snapshot(view.seen))

        thread = threading.Thread(target=loop, daemon=True)
        with view:
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()
                view.show(self.snapshot(view.seen))


SHOWN = ("reward", "legal_rate", "loss", "eval_loss")


@dataclass
class View:
    """Shows snapshots: a bar on a terminal, a line now and then elsewhere."""

    seen: int = 0
    _bars: Bars = field(default_factory=lambda: _bars())
    _phase: str = ""
    _task: Any = None
    _next_line: float = 0.0

    def __enter__(self) -> View:
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bars.stop()

    def show(self, snapshot: Snapshot) -> None:
        """Print new messages and move the bar."""
        for message in snapshot.messages:
            console.print(message, markup=False)
        self.seen += len(snapshot.messages)
        if not snapshot.phase:
            return
        shown = [f"{key} {snapshot.fields[key]:.4g}" for key in SHOWN if key in snapshot.fields]
        details = "  ".join(shown[:2])  # a line of 80 columns holds no more
        fresh = snapshot.phase != self._phase
        if console.is_terminal:
            if fresh:
                if self._task is not None:
                    self._bars.remove_task(self._task)
                self._task = self._bars.add_task(snapshot.phase, total=snapshot.steps or None, details=details)
            self._bars.update(self._task, completed=snapshot.step, total=snapshot.steps or None, details=details)
        elif time.monotonic() >= self._next_line or (fresh and not snapshot.step):
            console.print(f"{snapshot.phase}: {snapshot.step}/{snapshot.steps}  {details}".rstrip(), markup=False)
            self._next_line = time.monotonic() + 10
        self._phase = snapshot.phase


def _bars() -> Bars:
    return Bars(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[details]}"),
        console=console,
    )


@contextmanager
def fail_clearly() -> Iterator[None]:
    """Turn errors that a user can mend into one clear line and exit status 2; others keep their traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
