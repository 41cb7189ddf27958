"""The libraries below write walls of warnings; they go to the run's log file instead of the screen."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path


def quiet_libraries(log: Path | None) -> None:
    """Send logging and warnings of this process to `log` (None: nowhere), and turn the libraries' progress bars off."""
    handler: logging.Handler = logging.NullHandler()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
