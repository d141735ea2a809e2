"""What every trial has: cases that are numbered and seeded, a journal of those done, a time limit, one line of figures.

    trial = Trial("kills", Path("runs/trust"), minutes=60)
    for number in trial.pending(1000):      # goes on after the cases that the journal has
        trial.record(number, seconds=0.3)
    return trial.end(1000, kills=…)

A trial ends with 0, with 1 on the first loss (`Loss`), or with 2 where it cannot be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monobath.errors import UserError


class Loss(Exception):
    """What a trial looks for: a promise that was not kept. The message names the case, so that it can be run again."""


class Trial:
    """One trial in a folder of its own.

    Args:
        name: of the script.
        work: folder for the work of all trials.
        minutes: start no case after so many; the same command goes on.
    """

    def __init__(self, name: str, work: Path, minutes: float) -> None:
        self.name, self.folder = name, (work / name).absolute()
        self.until = time.monotonic() + 60 * minutes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = self.folder / "journal.jsonl"
        self.rows = rows_of(self.journal)

    @property
    def done(self) -> set[Any]:
        """The cases that the journal has."""
        return {row["case"] for row in self.rows}

    def pending(self, cases: int | Sequence[Any]) -> Iterator[Any]:
        """The cases that are not done, while there is time."""
        done = self.done
        for case in range(cases) if isinstance(cases, int) else cases:
            if case not in done:
                if time.monotonic() > self.until:
                    return
                yield case

    def record(self, case: Any, **facts: Any) -> None:
        """A case is done."""
        row = {"case": case, **facts}
        self.rows.append(row)
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def end(self, cases: int, **figures: Any) -> int:
        """Print the line of figures; returns the exit code."""
        told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items())
        sys.stdout.write(f"{self.name}: {len(self.done)} of {cases} cases, {told}, 0 losses\n")
        return 0


def rows_of(journal: Path) -> list[dict[str, Any]]:
    """Lines of JSON; one that was cut short at the end is left out."""
    rows = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rng_of(seed: int, *case: int) -> np.random.Generator:
    """A case's own random numbers."""
    return np.random.default_rng((seed, *case))


def parser_of(text: str, cases: int = 0) -> argparse.ArgumentParser:
    """The options that all trials have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/trust"), help="folder for journals and files")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no case after so many")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    if cases:
        parser.add_argument("--cases", type=int, default=cases, help="how many")
    return parser


def exit_code(main: Callable[[], int]) -> int:
    """Run a trial: a loss is one line and 1, a mistake one line and 2."""
    try:
        return main()
    except Loss as loss:
        sys.stdout.write(f"LOSS: {loss}\n")
        return 1
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
