"""Laws of the package as a whole: who imports whom, what an import costs, what the files may say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from monobath import resources

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "monobath"
LAYERS = [
    "cli", "app", "integrations", "export", "evaluation", "training", "data", "generation", "tokenizer",
    "autoencoders", "store", "config", "decoding", "losses", "decoders", "models", "scales", "tiles", "sampling",
    "flow",
]  # fmt: skip
LEAVES = {"devices", "errors", "files", "images", "resources", "words", "_version"}
ENTRY = {"__init__", "__main__"}
MODULES = sorted(SOURCE.rglob("*.py"))


def layer_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_layers(file: Path) -> set[str]:
    """First name below `monobath` of everything a module imports from the package, lazily or not."""
    package = ("monobath", *file.relative_to(SOURCE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            path = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*path, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "monobath" and len(name) > 1}
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_only_down_the_list(file):
    own = layer_of(file)
    if own in ENTRY:
        return
    assert own in LAYERS or own in LEAVES, f"{own} has no place in the list of layers"
    for other in imported_layers(file) - {own, "UserError", "Tokenizer", "__version__"}:
        if other in LEAVES:
            continue
        assert own in LAYERS, f"{own} is a leaf and must not import {other}"
        assert LAYERS.index(other) > LAYERS.index(own), f"{own} must not import {other}: the arrow goes up"


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_every_module_with_code_says_what_it_is(file):
    text = file.read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("module", ["monobath", "monobath.cli", "monobath.resources"])
def test_importing_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_base_install_decodes_without_the_extras():
    """`Tokenizer` needs none of the packages that only extras bring, nor torch.compile's, which take seconds."""
    code = (
        "import sys\n"
        "for name in ('accelerate', 'webdataset', 'torchmetrics', 'diffusers', 'tensorboard', 'scipy', 'matplotlib',"
        " 'efficientnet_lite_pytorch', 'lpips', 'skimage', 'fastapi', 'gradio', 'ray'):\n"
        "    sys.modules[name] = None\n"
        "import torch, monobath\n"
        "tokenizer = monobath.Tokenizer.from_pretrained('default')\n"
        "z = tokenizer.encode(torch.zeros(1, 3, 24, 40)).mode()\n"
        "assert tokenizer.decode(z).shape == (1, 3, 24, 40)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def project_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_machine_paths_and_no_registry_hosts():
    texts = {".py", ".md", ".toml", ".yaml", ".txt", ".json", ".html", ""}
    forbidden = re.compile(
        r"/(?:home|root|work|Users)/\w|files\.pythonhosted|pypi\.org|--(?:extra-)?index-url|/opt/pypi"
    )
    for file in project_files():
        if file.suffix in texts and file != Path(__file__).resolve():
            found = forbidden.search(file.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{file.relative_to(ROOT)}: {found.group()}"


def test_makefile_has_the_promised_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "check"):
        assert re.search(rf"^{target}:", text, re.MULTILINE)


def test_a_wheel_carries_every_file_of_the_package():
    """An editable install hides a file that `package-data` forgets: only the wheel would miss it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["monobath"]
    carried = {path for pattern in patterns for path in SOURCE.glob(pattern)}
    ours = {path for path in project_files() if SOURCE in path.parents and path.suffix != ".py"}
    assert ours
    assert not ours - carried, "not in package-data of pyproject.toml"


def test_every_weights_name_leads_to_a_folder():
    assert "default" in resources.weights_names()
    for name in resources.weights_names():
        path = resources.weights_path(name)
        assert path is not None, name
        assert (path / "model.safetensors").is_file(), name


def test_only_training_knows_accelerate():
    for file in MODULES:
        if layer_of(file) != "training":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not any(m.split(".")[0] == "accelerate" for m in modules), file.relative_to(SOURCE)


def test_packaged_weights_are_small():
    for folder in {resources.weights_path(name) for name in resources.weights_names()}:
        assert folder is not None
        assert 0 < sum(f.stat().st_size for f in folder.iterdir()) <= 20_000_000, folder.name
