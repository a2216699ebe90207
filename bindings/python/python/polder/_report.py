"""Reports of runs of the program ``polder``, and of one's own training loops."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import _polder


def report(
    runs: Iterable[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    tensorboard: bool = False,
) -> Path:
    """Writes a page that compares runs, and returns its path.

    ``runs`` are folders of the program ``polder`` or of `RunLog`. Without ``out`` the page is ``report.html`` in the
    folder of a single run, or in the current folder. ``tensorboard`` also writes event files into each run.
    """
    if isinstance(runs, (str, os.PathLike)):
        runs = [runs]
    return _polder.report([Path(run) for run in runs], None if out is None else Path(out), tensorboard)


def _number(value: Any) -> float | None:
    """A number of a log: one that is not finite is null in the file."""
    number = float(value)
    return number if math.isfinite(number) else None


def _toml(name: str, value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    if not isinstance(value, (str, bool, int)):
        raise TypeError(f"{name}: {value!r}, expected a text, a number or a truth value")
    return json.dumps(value, ensure_ascii=False)


class RunLog:
    """The log of one's own training loop, in a folder that `report` reads.

    ::

        log = RunLog("runs/sam-0", "SAM", lr=0.1, rho=0.05, seed=0)
        for epoch in range(1, 101):
            ...
            log.epoch(test_accuracy=accuracy, test_loss=loss, train_loss=mean, lr=lr)
        polder.report(["runs/sam-0", "runs/sgd-0"])

    Runs that differ only in ``seed`` are one group of the report. The folder must be new or empty.
    """

    def __init__(self, folder: str | os.PathLike[str], optimizer: str, **settings: str | float | bool) -> None:
        for name, value in settings.items():
            _toml(name, value)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder}: expected a new or empty folder")
        # The names of the program's methods have its settings only; in capitals the name is that of another program.
        settings = {"optimizer": optimizer.upper() if optimizer.islower() else optimizer, **settings}
        lines = [f"{name.replace('_', '-')} = {_toml(name, value)}" for name, value in settings.items()]
        (self.folder / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._path = self.folder / "log.jsonl"
        self._started = time.monotonic()
        self._epochs = 0

    def epoch(
        self,
        *,
        test_accuracy: float,
        test_loss: float | None = None,
        train_loss: float | None = None,
        train_accuracy: float | None = None,
        lr: float = 0.0,
        step: int = 0,
        seconds: float | None = None,
        images_per_second: float = 0.0,
        gradient_norm: float | None = None,
        skipped: int = 0,
        numbers: Mapping[str, float] | None = None,
    ) -> None:
        """Writes the line of one epoch. Accuracies are shares from 0 to 1, losses mean cross-entropies.

        ``seconds`` are those of training since the start; without them the clock counts since the log was opened.
        ``numbers`` are further ones of the method, as ``optimizer.telemetry()`` names them.
        """
        self._epochs += 1
        optional = {
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "gradient_norm": gradient_norm,
        }
        line: dict[str, Any] = {"kind": "epoch", "epoch": self._epochs, "step": step}
        line |= {name: None if value is None else _number(value) for name, value in optional.items()}
        line |= {
            "test_accuracy": float(test_accuracy),
            "lr": float(lr),
            "images_per_second": float(images_per_second),
            "seconds": time.monotonic() - self._started if seconds is None else float(seconds),
            "skipped": skipped,
        }
        for name, value in (numbers or {}).items():
            if name not in line and (found := _number(value)) is not None:
                line[name] = found
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
