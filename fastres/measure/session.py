"""One benchmark run: its time budget, its result file, and what is merged into it."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import conditions, experiment, results, roofline, timing
from .experiment import Experiment, Report
from .results import Results, highest

PREVIOUS = "results.previous.json"


class Session:
    """Runs experiments and keeps the file in `folder` up to date after each one.

    A file that is there already, of the same conditions (`conditions.COMPARED`), is added to: rows of the same
    measurement are replaced. Any other is put aside as `PREVIOUS`, and `notes` says so.

    Args:
        dtypes: that the roofline is measured in.
        budget: seconds from now; math.inf for no limit.
    """

    def __init__(self, folder: Path, device: torch.device, dtypes: Sequence[torch.dtype], budget: float = math.inf):
        self.folder, self.device = folder, device
        self.notes: list[str] = []
        self._dtypes = dtypes
        self._end = time.monotonic() + budget
        self._results: Results | None = None
        self._skipped: dict[str, str] = {}
        self._clock: timing.Clock | None = None

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self._end - time.monotonic()

    def run(self, wanted: Experiment) -> Report | None:
        """Run it and save its rows; None when the budget has no room for it, which is noted as skipped."""
        self._start()
        if self.left() < wanted.settings.limit:
            self.skip(wanted.title, f"{max(0.0, self.left()):.0f} s left, it may take {wanted.settings.limit:.0f} s")
            return None
        report = experiment.run(wanted, self._clock, self.left)
        self._skipped.pop(wanted.title, None)
        for variant in wanted.variants:
            self._skipped.pop(f"{wanted.title}, {variant}", None)
        self._skipped |= report.skipped
        rows = {row.key: row for row in self._results.rows} | {row.key: row for row in report.rows}
        self._save(rows=list(rows.values()))
        return report

    def skip(self, what: str, why: str) -> None:
        """Note something that was asked for and does not run."""
        self._start()
        self._skipped[what] = why
        self._save()

    def unskip(self, what: str) -> None:
        """Take the note away."""
        self._start()
        self._skipped.pop(what, None)

    def finish(self) -> Results | None:
        """The results with the clocks at the end, saved; None when nothing ran."""
        if self._results is None:
            return None
        before, after = self._results.conditions.get("clocks"), conditions.clocks(self.device)
        note = conditions.clock_note(before, after)
        self._save(conditions=self._results.conditions | ({"clocks": note} if note else {}))
        return self._results

    def _start(self) -> None:
        """Measure the roofline and take up what is in the folder, once."""
        if self._results is not None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # The fastest convolutions for everyone: baselines as people tune them.
            torch.backends.cudnn.benchmark = True
        # What lives by now stays: collecting garbage, which happens after every variant, need not look at it again.
        gc.collect()
        gc.freeze()
        self._clock = timing.clock(self.device)
        reached = roofline.measure(self.device, list(self._dtypes), self._clock)
        # Afterwards, so that clocks are read of a device that is awake.
        found = Results(conditions.gather(self.device), reached, [])
        path = self.folder / results.FILE_NAME
        if path.exists():
            found = self._merged(path, found)
        self._results = found
        self._save()

    def _merged(self, path: Path, now: Results) -> Results:
        try:
            before = results.read(path)
        except results.ResultsError as error:
            why = str(error)
        else:
            names = conditions.COMPARED
            differing = [n for n in names if before.conditions.get(n) != now.conditions.get(n)]
            if not differing:
                self._skipped = dict(line.split(": ", 1) for line in before.skipped if ": " in line)
                return Results(now.conditions, highest([r for r in (before.roofline, now.roofline) if r]), before.rows)
            why = "it was measured under other conditions: " + ", ".join(
                f"{n} {before.conditions.get(n, 'unknown')}, now {now.conditions.get(n, 'unknown')}" for n in differing
            )
        os.replace(path, self.folder / PREVIOUS)
        self.notes.append(f"{path} is now {PREVIOUS}: {why}")
        return now

    def _save(self, **changed) -> None:
        skipped = [f"{what}: {why}" for what, why in self._skipped.items()]
        now = self._results
        self._results = Results(
            changed.get("conditions", now.conditions), now.roofline, changed.get("rows", now.rows), skipped
        )
        results.write(self.folder / results.FILE_NAME, self._results)
