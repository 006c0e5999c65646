"""A run against an earlier one: what got slower or faster beyond the noise, what appeared, vanished or broke."""

from __future__ import annotations

from dataclasses import dataclass

from .analysis import is_ours
from .results import Results, Row

# Two runs of the same code on the same machine differ by this much even where the samples of each lie closer together.
NOISE = 0.03


@dataclass(frozen=True)
class Change:
    """One row now and in an earlier run, both timed.

    longer: by what part the time grew (0.1: 10 % longer; negative: shorter). noise: what it has to exceed to mean
    anything, `NOISE` or the larger spread (p20 to p80, relative to the median) of the two.
    """

    now: Row
    earlier: Row
    longer: float
    noise: float

    @property
    def verdict(self) -> str:
        """One of "slower", "faster", "same"."""
        if self.longer > self.noise:
            return "slower"
        return "faster" if self.earlier.seconds / self.now.seconds - 1 > self.noise else "same"


@dataclass(frozen=True)
class Comparison:
    """A run against an earlier one.

    changes: rows timed in both. broken: ours that had a time earlier and are refused now. appeared, vanished: the other
    rows that were timed in one of the two only. conditions: what differs, as (name, earlier, now).
    """

    changes: list[Change]
    broken: list[Row]
    appeared: list[Row]
    vanished: list[Row]
    conditions: list[tuple[str, str, str]]

    def of(self, verdict: str, ours: bool = True) -> list[Change]:
        """The changes with a verdict, the largest first; ours, or the baselines'."""
        chosen = [change for change in self.changes if change.verdict == verdict]
        chosen = [change for change in chosen if is_ours(change.now.variant) == ours]
        return sorted(chosen, key=lambda change: change.longer, reverse=verdict != "faster")

    @property
    def regressions(self) -> int:
        """How many of our rows are slower beyond the noise, or have lost their time.

        A baseline that got slower is no fault of fastres; `of("slower", ours=False)` has them, as a sign that the two
        runs are not comparable.
        """
        return len(self.broken) + len(self.of("slower"))


def compare(now: Results, earlier: Results) -> Comparison:
    """What changed since an earlier run. Only rows of the same key are compared (`Row.key`)."""
    new, old = ({row.key: row for row in results.rows} for results in (now, earlier))
    new_timed, old_timed = ({key: row for key, row in rows.items() if row.seconds is not None} for rows in (new, old))
    broken = {key: new[key] for key in old_timed if key in new and key not in new_timed and is_ours(new[key].variant)}
    return Comparison(
        changes=[_change(row, old_timed[key]) for key, row in new_timed.items() if key in old_timed],
        broken=list(broken.values()),
        appeared=[row for key, row in new_timed.items() if key not in old_timed],
        vanished=[row for key, row in old_timed.items() if key not in new_timed and key not in broken],
        conditions=_differences(now, earlier),
    )


def _change(now: Row, earlier: Row) -> Change:
    return Change(now, earlier, now.seconds / earlier.seconds - 1, max(NOISE, _spread(now), _spread(earlier)))


def _spread(row: Row) -> float:
    return 0.0 if row.p20 is None or row.p80 is None else (row.p80 - row.p20) / row.seconds


def _differences(now: Results, earlier: Results) -> list[tuple[str, str, str]]:
    pairs = [
        (results.conditions | {"dtypes": ", ".join(sorted({row.dtype for row in results.rows}))})
        for results in (earlier, now)
    ]
    names = dict.fromkeys([*pairs[0], *pairs[1]])
    return [
        (name, *(pair.get(name, "-") for pair in pairs)) for name in names if pairs[0].get(name) != pairs[1].get(name)
    ]
