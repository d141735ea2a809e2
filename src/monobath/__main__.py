"""`python -m monobath` is `monobath`; `accelerate launch -m monobath train …` needs it."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
