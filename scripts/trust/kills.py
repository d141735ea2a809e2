"""Killed at any moment: the same command, run again, ends with the bytes of a run that was never killed.

    python scripts/trust/kills.py [--kills 1000]

Training with a checkpoint at every step, `cache-latents`, `save_pretrained` over an older model, the report of `eval`:
each is killed up to four times, at a random time, at a random file operation or at a random byte of a file that it
writes, then left alone. After every kill, what stands there must be readable, or be refused in one line; at the end all
files must be those of the uninterrupted run, and no temporary one may be left.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from faults import at_byte, at_operation, forked, kill, operations
from trial import Loss, Trial, exit_code, parser_of, rng_of
from works import WORKS, Work, compare, contents, fresh, make_photos, works


class Killer:
    """One work, and how long it takes when nobody kills it."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder
        fresh(work, folder)
        work.run(folder)  # imports all that its forks will need
        fresh(work, folder)
        self.operations, self.seconds = operations(lambda: work.run(folder), folder)
        self.reference = contents(folder)
        self.largest = max(map(len, self.reference.values()))

    def case(self, seed: int, number: int) -> Counter[str]:
        """One life; how often it was killed, by kind.

        Raises:
            Loss: what stood there after a kill, or in the end, is not what was promised.
        """
        rng, kills = rng_of(seed, number), Counter[str]()
        fresh(self.work, self.folder)
        for _ in range(rng.integers(1, 5)):
            kind = ("time", "operation", "byte")[rng.integers(3)]
            if kind == "time":
                ended = forked(self._run, after=float(rng.uniform(0, self.seconds)))
            elif kind == "operation":
                ended = forked(self._run, at_operation(self.folder, int(rng.integers(self.operations)), kill))
            else:
                ended = forked(self._run, at_byte(int(self.largest ** rng.uniform(0, 1)), deadly=True))
            if ended.said or ended.message:
                raise Loss(f"killed {dict(kills)}, then ended with {ended.said or ended.message}")
            kills[kind] += ended.killed
            ended = forked(lambda: self.work.check(self.folder))
            if ended.said:
                raise Loss(f"killed {dict(kills)}: {ended.said}")
        ended = forked(self._run)
        if ended.said or ended.message:
            raise Loss(f"killed {dict(kills)}, then ended with {ended.said or ended.message}")
        compare(contents(self.folder), self.reference)
        return kills

    def _run(self) -> object:
        return self.work.run(self.folder)


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--kills", type=int, default=1000, help="how many")
    parser.add_argument("--works", nargs="*", choices=WORKS, help="default: all")
    options = parser.parse_args(arguments)
    trial = Trial("kills", options.work, options.minutes)
    made = works(make_photos(trial.folder / "photos"), options.works)
    killers = [Killer(work, trial.folder / "now") for work in made]
    for number in trial.pending(10 * options.kills):
        if sum(row["kills"] for row in trial.rows) >= options.kills:
            break
        killer = killers[number % len(killers)]
        try:
            kills = killer.case(options.seed, number)
        except Loss as loss:
            raise Loss(f"kills, case {number}, {killer.work.name}: {loss}") from None
        trial.record(number, work=killer.work.name, kills=kills.total(), **kills)
    kinds = {kind: sum(row.get(kind, 0) for row in trial.rows) for kind in ("time", "operation", "byte")}
    by_work = {k.work.name: sum(r["kills"] for r in trial.rows if r["work"] == k.work.name) for k in killers}
    told = {f"at_a_{kind}": number for kind, number in kinds.items()}
    return trial.end(len(trial.rows), kills=sum(kinds.values()), **told, **by_work)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
