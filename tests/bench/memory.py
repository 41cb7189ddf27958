"""Memory that a block of code takes: of the process, or of the GPU where there is one."""

from __future__ import annotations

import ctypes
import gc
import threading

import psutil
import torch


def return_memory() -> None:
    """Give freed memory back to the system, now and from now on, so that the process's size tells."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: freed tensors go back at once
    gc.collect()
    libc.malloc_trim(0)


class Peak:
    """Largest memory in a block, beyond what it had at the start."""

    def __enter__(self) -> Peak:
        self.process, self.stop = psutil.Process(), threading.Event()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = self.most = self.process.memory_info().rss
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if torch.cuda.is_available():
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.thread.join()
        self.megabytes = max(self.most - self.start, 0) / 2**20

    def _watch(self) -> None:
        while not self.stop.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss)
