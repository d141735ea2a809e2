"""What monobath's nodes need of ComfyUI: names and signatures, read from a checkout without importing it.

    python scripts/comfyui_interface.py CHECKOUT                   # compare with the record: exit 1 where they differ
    python scripts/comfyui_interface.py CHECKOUT --write           # record it

The record is tests/fixtures/comfyui.json; the tests build the modules that the nodes import from it.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "comfyui.json"
NEEDED = {
    "comfy/sd.py": [
        "VAE.__init__", "VAE.process_input", "VAE.process_output", "VAE.encode", "VAE.decode", "VAE.encode_tiled",
        "VAE.decode_tiled", "VAE.encode_tiled_", "VAE.decode_tiled_", "VAE.memory_used_encode",
        "VAE.memory_used_decode",
        "VAE.first_stage_model", "VAE.latent_channels", "VAE.downscale_ratio", "VAE.upscale_ratio", "VAE.crop_input",
        "VAE.working_dtypes", "VAE.disable_offload", "VAE.device", "VAE.output_device", "VAE.vae_dtype", "VAE.patcher",
    ],
    "comfy/model_management.py": [
        "load_models_gpu", "vae_device", "vae_offload_device", "vae_dtype", "intermediate_device", "dtype_size",
    ],
    "comfy/model_patcher.py": ["ModelPatcher.__init__"],
    "comfy/utils.py": ["ProgressBar.__init__", "ProgressBar.update_absolute"],
    "folder_paths.py": ["models_dir", "add_model_folder_path", "get_filename_list", "get_full_path_or_raise"],
}  # fmt: skip
"""By file: functions, methods, and names that are set."""


def interface(checkout: Path) -> dict[str, dict[str, str]]:
    """Arguments of each function, "set" for other names; what is missing is left out."""
    found: dict[str, dict[str, str]] = {}
    for file, names in NEEDED.items():
        known: dict[str, str] = {}
        for node in ast.parse((checkout / file).read_text(encoding="utf-8")).body:
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(inner, ast.FunctionDef):
                    known[prefix + inner.name] = f"({', '.join(a.arg for a in inner.args.args)})"
                for name in _assigned(inner, bool(prefix)):
                    known.setdefault(prefix + name, "set")
        found[file] = {name: known[name] for name in names if name in known}
    return found


def _assigned(node: ast.AST, attributes: bool) -> set[str]:
    """Names that a statement sets, or attributes of self that a method sets."""
    names = set()
    for inner in ast.walk(node) if attributes else [node]:
        for target in inner.targets if isinstance(inner, ast.Assign) else []:
            if attributes and isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                names.add(target.attr)
            elif not attributes and isinstance(target, ast.Name):
                names.add(target.id)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--write", action="store_true", help="record what the checkout has")
    given = parser.parse_args()
    found = interface(given.checkout)
    if given.write:
        command = ["git", "-C", str(given.checkout), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        record = {"commit": commit, "interface": found}
        RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    same = True
    for file, names in NEEDED.items():
        for name in names:
            before, now = (part.get(file, {}).get(name, "missing") for part in (recorded["interface"], found))
            if before != now or now == "missing":
                sys.stdout.write(f"{file} {name}: recorded {before}, found {now}\n")
                same = False
    sys.stdout.write(f"the interface {'is' if same else 'differs from'} that of {recorded['commit'][:12]}\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
