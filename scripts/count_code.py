"""Lines of code by folder, without docstrings, comments and blank lines.

python scripts/count_code.py [src/monobath]
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


def lines_of_code(text: str) -> int:
    """Of a module's source. A string that stands alone, as docstrings of fields do, is no code."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            strings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - strings)


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else "src/monobath")
    counts: Counter[str] = Counter()
    for file in root.rglob("*.py"):
        counts[str(file.parent.relative_to(root))] += lines_of_code(file.read_text(encoding="utf-8"))
    for folder, count in sorted(counts.items()):
        sys.stdout.write(f"{count:6} {folder}\n")
    sys.stdout.write(f"{sum(counts.values()):6} in all\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
