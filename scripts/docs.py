"""Build the documentation site into build/docs: `make docs`.

The pages of docs/ and model_cards/ are gathered in build/docs-source, with what the site makes itself: the gallery, by
`monobath eval --gallery` with the packaged models on the packaged photos. Links to other files of the repository become
the files' names; links to pages stay links. Sphinx then runs with warnings as errors.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = ROOT / "build" / "docs-source", ROOT / "build" / "docs"
GALLERY = ["default", "progressive", "f8c4"]
"""Packaged models of the gallery."""


def for_site(text: str, folder: str) -> str:
    """A page's text with links that lead somewhere on the site; folder is where the page is in the repository."""

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        place = (ROOT / folder / path).resolve()
        inside = place.relative_to(ROOT).as_posix() if ROOT in place.parents else ""
        if inside.startswith("docs/"):
            depth = "../" * folder.removeprefix("docs").count("/") if folder.startswith("docs") else "../"
            return f"[{words}]({depth}{inside.removeprefix('docs/')}{'#' + anchor if anchor else ''})"
        if inside.startswith("model_cards/"):
            return f"[{words}](/{inside})"
        if inside == "README.md":
            return f"[{words}](/models.md)" if anchor else f"[{words}](/index.md)"
        return words if "`" in words or "/" in words else f"{words} (`{inside}`)"

    text = text.replace("](../docs/images/", "](/images/")  # of the cards
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def gather() -> None:
    """build/docs-source, anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE)
    shutil.copytree(ROOT / "model_cards", SOURCE / "model_cards")
    for file in SOURCE.rglob("*.md"):
        inside = file.relative_to(SOURCE).parent.as_posix()
        folder = inside if inside.startswith("model_cards") else f"docs/{inside}".removesuffix("/.")
        text = re.sub(r"^---\n(?!file_format).*?^---\n", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
        file.write_text(for_site(text, folder), encoding="utf-8")
    index = SOURCE / "index.md"
    text = index.read_text(encoding="utf-8")
    left = sorted(p.stem for p in SOURCE.glob("*.md") if p != index and not re.search(rf"^{p.stem}$", text, re.M))
    more = "".join(f"{name}\n" for name in left)
    if more:
        index.write_text(text + f"\n:::{{toctree}}\n:caption: More\n:maxdepth: 1\n\n{more}:::\n", encoding="utf-8")


def make_gallery() -> None:
    """The gallery of the packaged models, where the site expects it."""
    command = [
        sys.executable, "-m", "monobath", "eval", "--data", str(ROOT / "src" / "monobath" / "samples"),
        "--model", *GALLERY, "--metrics", "psnr", "--repeats", "0", "--gallery", "--out", str(ROOT / "build" / "eval"),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(ROOT / "build" / "eval" / "gallery", SOURCE / "extra" / "gallery")


def main() -> int:
    gather()
    make_gallery()
    shutil.rmtree(TARGET, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(SOURCE), str(TARGET)]
    code = subprocess.run(command, check=False).returncode
    sys.stdout.write(f"{TARGET / 'index.html'}\n" if code == 0 else "")
    return code


if __name__ == "__main__":
    sys.exit(main())
