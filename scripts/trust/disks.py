"""Full, read-only, vanishing and slow disks, and torn files: one line, and what was there stays; or it is right.

    python scripts/trust/disks.py [--cases 2000]

The works of `works.py` meet, by turns: no file that may grow beyond a random byte; a disk error (full, read-only, input
or output error, gone) at a random file operation, once or from then on; a folder that vanishes at one; a small tmpfs
that really is full (as root); operations that take 20 ms each. Each ends well or with one `UserError`; what stands
there must be readable or be refused; without the fault, the same command then ends with the bytes of a run that never
met one, and no temporary file is left.

Torn: a file that was written whole is cut at a random byte, then read and used. The readers are those of `hostile.py`:
they say so in one line, or what they read is right. A run whose newest checkpoint is torn goes on from the one before.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from faults import Ended, Fault, at_byte, at_operation, failing, forked
from hostile import Target, targets
from kills import Killer
from trial import Loss, Trial, exit_code, parser_of, rng_of
from works import WORKS, compare, contents, fresh, make_photos, works

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.ENOENT, errno.EDQUOT, errno.ESTALE)
KINDS = ("byte", "error", "lasting error", "vanishing", "full tmpfs", "slow", "torn")


@contextmanager
def tmpfs(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A small file system in the place of a folder; False where this user may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


class Disks:
    """All works, and a disk that fails."""

    def __init__(self, folder: Path, seed: int, names: Sequence[str] = ()) -> None:
        self.folder, self.seed = folder / "now", seed
        self.killers = [Killer(work, self.folder) for work in works(make_photos(folder / "photos"), names)]
        self.originals, self.torn = folder / "originals", folder / "torn"
        self.targets = targets(self.originals)
        for target in self.targets:
            target.read(self.originals / target.name)  # imports what forks need

    def case(self, number: int) -> tuple[str, str]:
        """Its kind, and how it ended: "error", "result", or "skipped"."""
        rng, kind = rng_of(self.seed, number), KINDS[number % len(KINDS)]
        if kind == "torn":
            target = self.targets[rng.integers(len(self.targets))]
            return kind, self._torn(target, target.files[rng.integers(len(target.files))], float(rng.random()))
        killer = self.killers[number // len(KINDS) % len(self.killers)]
        fresh(killer.work, self.folder)
        place, operation = self.folder, int(rng.integers(killer.operations))
        fail = failing(ERRORS[rng.integers(len(ERRORS))])
        faults: dict[str, Callable[[], Fault]] = {
            "byte": lambda: at_byte(int(killer.largest ** rng.uniform(0.6, 1)), deadly=False),
            "error": lambda: at_operation(place, operation, fail),
            "lasting error": lambda: at_operation(place, operation, fail, lasting=True),
            "vanishing": lambda: at_operation(place, operation, partial(shutil.rmtree, place, True)),
            "slow": lambda: at_operation(place, operation, partial(time.sleep, 0.02), lasting=True),
        }
        if kind == "full tmpfs":
            size = sum(map(len, killer.reference.values())) // 1024
            with tmpfs(self.folder, max(8, int(size * rng.uniform(0.05, 1.2)))) as mounted:
                if not mounted:
                    return kind, "skipped"
                ended = forked(lambda: killer.work.run(self.folder))
                self._judge(killer, ended, check=False)
            fresh(killer.work, self.folder)
        else:
            ended = forked(lambda: killer.work.run(self.folder), faults[kind]())
            self._judge(killer, ended, check=kind != "vanishing")
        if kind == "slow" and ended.message:
            raise Loss(f"a slow disk: {ended.message}")
        if kind == "vanishing":
            fresh(killer.work, self.folder)
        again = forked(lambda: killer.work.run(self.folder))
        if again.said or again.message:
            raise Loss(f"{kind}, {killer.work.name}: without the fault: {again.said or again.message}")
        compare(contents(self.folder), killer.reference)
        return kind, "error" if ended.message else "result"

    def _judge(self, killer: Killer, ended: Ended, *, check: bool) -> None:
        if ended.said or ended.killed or "\n" in ended.message:
            raise Loss(f"{killer.work.name} ended with: {ended.said or ended.message or 'a signal'}")
        if check and (checked := forked(lambda: killer.work.check(self.folder))).said:
            raise Loss(f"{killer.work.name}, after {ended.message!r}: {checked.said}")

    def _torn(self, target: Target, file: str, share: float) -> str:
        shutil.rmtree(self.torn, ignore_errors=True)
        shutil.copytree(self.originals / target.name, self.torn)
        os.truncate(self.torn / file, int(share * (self.torn / file).stat().st_size))
        ended = forked(lambda: target.read(self.torn))
        if ended.said or ended.killed or "\n" in ended.message:
            raise Loss(f"{target.name}, {file} torn at {share}: {ended.said or ended.message or 'a signal'}")
        return "error" if ended.message else "result"


def main(arguments: list[str]) -> int:
    parser = parser_of(__doc__ or "", cases=2000)
    parser.add_argument("--works", nargs="*", choices=WORKS, help="default: all")
    options = parser.parse_args(arguments)
    trial = Trial("disks", options.work, options.minutes)
    disks = Disks(trial.folder, options.seed, options.works)
    for number in trial.pending(options.cases):
        try:
            kind, ended = disks.case(number)
        except Loss as loss:
            raise Loss(f"disks, case {number}, {KINDS[number % len(KINDS)]}: {loss}") from None
        trial.record(number, kind=kind, ended=ended)
    told = {
        kind.replace(" ", "_"): f"{sum(r['kind'] == kind and r['ended'] == 'error' for r in trial.rows)} errors of "
        f"{sum(r['kind'] == kind and r['ended'] != 'skipped' for r in trial.rows)}"
        for kind in KINDS
    }
    return trial.end(options.cases, **told)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
