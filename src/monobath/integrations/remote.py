"""A model for diffusers without monobath: a folder with the weights and one module, which `auto_map` names.

    vae = diffusers.AutoModel.from_pretrained(FOLDER, trust_remote_code=True)      # an AutoencoderMonobath

The module is `vae.py` and what it imports from monobath, each file as it is inside a function, so that whoever trusts
it can read it. It needs torch and diffusers only.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

from .._version import __version__
from ..files import write_folder
from ..tokenizer import Tokenizer
from .autoencoder import AutoencoderMonobath

ROOT = Path(__file__).resolve().parent.parent
MODULE = "integrations.vae"
"""What the written module has at its end, and everything that it imports."""
STANDINS = {"resources": "hint_for_channels = lambda channels: ''  # nothing is packaged here"}
"""Modules that are not taken along, and what stands for them."""

HEADER = '''"""AutoencoderMonobath in one file, written by monobath {version} (`monobath export --for diffusers`).

Each function is one module of monobath (Apache-2.0), as it is there. Needs torch and diffusers.
"""

from __future__ import annotations

from types import SimpleNamespace

from diffusers import ModelMixin  # pipelines look for it here

'''


def write_remote(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads, atomically; returns it.

    Raises:
        UserError: the tokenizer has no form in diffusers, or the folder cannot be written.
    """
    model, source = AutoencoderMonobath.from_tokenizer(tokenizer), one_module()
    # diffusers keeps the modules of all models in one place: another text needs another name
    name = f"monobath_{hashlib.sha256(source.encode()).hexdigest()[:12]}"

    model.register_to_config(auto_map={"AutoModel": f"{name}.{AutoencoderMonobath.__name__}"})

    def files(partial: Path) -> None:
        model.save_pretrained(partial)
        (partial / f"{name}.py").write_text(source, encoding="utf-8")

    write_folder(folder, files)
    return folder


def one_module() -> str:
    """Source text of `MODULE` with all that it imports from monobath, in the order in which they need one another."""
    sections: dict[str, str] = {}

    def add(module: str) -> None:
        if module not in sections:
            text, needed = (STANDINS[module], []) if module in STANDINS else _without_relative_imports(_file(module))
            for other in needed:
                add(other)
            sections[module] = _section(module, text)

    add(MODULE)
    whole = f"AutoencoderMonobath = {_name(MODULE)}.AutoencoderMonobath\n"
    return "\n".join([HEADER.format(version=__version__), *sections.values(), whole])


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _without_relative_imports(file: Path) -> tuple[str, list[str]]:
    """A file's text with assignments for relative imports, and without `from __future__`, which must begin a file; and
    the modules that it needs.
    """
    text, package = file.read_text(encoding="utf-8"), file.relative_to(ROOT).parts[:-1]
    lines, needed = text.splitlines(), []
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
    for node in sorted(found, key=lambda node: -node.lineno):
        base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ())]
        wanted = []
        for alias in node.names:
            inside, here = ".".join([*base, alias.name]), alias.asname or alias.name
            is_module = _file(inside).is_file()
            needed.append(inside if is_module else ".".join(base))
            value = _name(needed[-1]) if is_module else f"{_name(needed[-1])}.{alias.name}"
            wanted.append(f"{' ' * node.col_offset}{here} = {value}")
        lines[node.lineno - 1 : node.end_lineno] = wanted
    return "\n".join(line for line in lines if not line.startswith("from __future__")), needed


def _section(module: str, text: str) -> str:
    body = "\n".join(f"    {line}" if line.strip() else "" for line in text.strip().splitlines())
    return (
        # Annotations are text, which is read among the global names.
        f"\ndef {_name(module)}():\n{body}\n\n"
        "    globals().update(locals())\n    return SimpleNamespace(**locals())\n\n\n"
        f"{_name(module)} = {_name(module)}()\n"
    )


def _name(module: str) -> str:
    return "_" + module.replace(".", "_")
