"""The figures of the packaged models: one file, docs/figures.json, which the pages' tables are made of.

    python scripts/figures.py RESULTS.json      # what `monobath eval` wrote becomes docs/figures.json, and the tables
    python scripts/figures.py                   # the tables again
    python scripts/figures.py --check           # exit 1 where a page's table is another

A page says where the table goes: between the lines <!-- figures --> and <!-- /figures -->.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures.json"
PAGES = [ROOT / "README.md", ROOT / "docs" / "models.md"]
LABELS = {
    "default": "**`default`**, `progressive`",
    "f8c4": "`f8c4`, `f8c4-progressive`",
    "TAEF2": "TAEF2 (MIT), millions of pictures",
}
"""How systems are called in the tables; others by their names."""
CODECS = ("JPEG", "WebP", "AVIF")
METRICS = {"psnr": ("PSNR, dB", 2), "efflite": ("EffLite distance", 3), "fd_efflite": ("FD-EffLite", 1)}


def from_results(results: dict[str, Any]) -> dict[str, Any]:
    """What the tables need of results.json: codecs keep bits, not numbers, and are left out."""
    systems = []
    for system in results["systems"]:
        if system["kind"] in CODECS:
            continue
        numbers = round(system["bits_per_pixel"] * 64 / (8 if system["kind"] == "bicubic" else 16))
        figures = {name: system["figures"][name]["value"] for name in METRICS if name in system["figures"]}
        systems.append({"name": system["name"], "numbers": numbers, **figures})
    pictures = f"{len(results['names'])} held-out photos, short side {results['short_side']}, centre crop"
    return {"command": results["command"], "pictures": pictures, "systems": sorted(systems, key=lambda s: s["numbers"])}


def table(figures: dict[str, Any]) -> str:
    """Markdown."""
    head = ["system", "numbers per 8×8 pixels", *(title for title, _ in METRICS.values())]
    rows = [head, ["---"] * len(head)]
    for system in figures["systems"]:
        cells = [f"{system[name]:.{digits}f}" if name in system else "–" for name, (_, digits) in METRICS.items()]
        rows.append([LABELS.get(system["name"], system["name"]), str(system["numbers"]), *cells])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{lines}\n\n{figures['pictures']}, 8 bit, means (`{figures['command']}`)."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, help="results.json of monobath eval")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.results:
        figures = from_results(json.loads(given.results.read_text(encoding="utf-8")))
        FIGURES.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    wanted = f"<!-- figures -->\n{table(json.loads(FIGURES.read_text(encoding='utf-8')))}\n<!-- /figures -->"
    other = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        changed = re.sub(r"<!-- figures -->.*?<!-- /figures -->", lambda _: wanted, text, flags=re.S)
        other += [page.name] if changed != text else []
        if not given.check:
            page.write_text(changed, encoding="utf-8")
    if given.check and other:
        sys.stdout.write(f"{', '.join(other)}: the table is not that of docs/figures.json; run scripts/figures.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
