"""Files that ship inside the package: recipes, weights, sample photos. No tensor library is imported here."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

from .errors import UserError
from .words import did_you_mean

_ROOT = Path(str(files("monobath")))


def sample_paths() -> list[Path]:
    """The packaged sample photos, sorted by name."""
    return sorted(p for p in (_ROOT / "samples").iterdir() if p.suffix in (".png", ".jpg"))


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(p.stem for p in (_ROOT / "recipes").glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """File of a recipe: a packaged name, else an existing path.

    Raises:
        UserError: neither; the message names the nearest packaged recipe.
    """
    if name in recipe_names():
        return _ROOT / "recipes" / f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path
    hint = did_you_mean(name, recipe_names(), f"packaged are: {', '.join(recipe_names())}")
    kind = "is a folder" if path.is_dir() else "is neither packaged nor an existing file"
    raise UserError(f"recipe {name!r} {kind}: {hint}")


def weights_names() -> list[str]:
    """Names of the packaged weights: those for people first, then those with a version."""
    versions = _folders() + [name for name in _aliases() if _versioned(name)]
    return [*short_names(), *sorted(versions)]


def short_names() -> list[str]:
    """Names of the packaged weights without a version, sorted: `default` and so on."""
    return sorted(name for name in _aliases() if not _versioned(name))


def weights_path(name: str) -> Path | None:
    """Folder of packaged weights (an alias is followed), or None where nothing of that name is packaged."""
    return _ROOT / "weights" / _folder(name) if name in weights_names() else None


def weights_stages(name: str) -> int:
    """How many scales a packaged name decodes through (`SamplerConfig.stages`); 0: as many as its files say."""
    return _aliases().get(name, (name, 0))[1]


def versioned_name(name: str) -> str | None:
    """The packaged name that goes on meaning these weights, decoded in this way; None: no packaged name.

    `default` may mean newer weights tomorrow. What is decoded through stages has a versioned name of its own.
    """
    if name not in weights_names():
        return None
    folder, stages = _aliases().get(name, (name, 0))
    if not stages:
        return folder
    return next((other for other, found in _aliases().items() if found == (folder, stages) and _versioned(other)), name)


def hint_for_channels(channels: int) -> str:
    """The end of a message about latents of so many channels: which packaged weights take them, if any do."""
    for name in weights_names():
        folder = weights_path(name)
        assert folder is not None
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["encoder"]["latent_channels"] == channels:
            return f"; {name} is packaged for {channels} channels"
    return ""


def _folders() -> list[str]:
    return sorted(p.name for p in (_ROOT / "weights").iterdir() if (p / "model.safetensors").is_file())


def _versioned(name: str) -> bool:
    return any(name.startswith(f"{folder}-") for folder in _folders())


def _folder(name: str) -> str:
    return _aliases().get(name, (name, 0))[0]


def _aliases() -> dict[str, tuple[str, int]]:
    """Names → folder, and stages: two names may be one checkpoint, decoded in two ways."""
    file = _ROOT / "weights" / "aliases.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: (entry["weights"], entry.get("stages", 0)) for name, entry in found.items()}
