"""How every benchmark ends as a command."""

from __future__ import annotations

import sys
from collections.abc import Callable

from monobath import UserError


def exit_code(main: Callable[[], int], interruption: type[BaseException] | tuple[()] = ()) -> int:
    """Run a benchmark: a mistake is one line and 2; an interruption, if there is such a kind, its own line and 130."""
    try:
        return main()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except interruption as error:
        sys.stderr.write(f"{error}\n")
        return 130
