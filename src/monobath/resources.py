"""Files that ship inside the package: recipes, weights, sample photos. No tensor library is imported here."""

from __future__ import annotations

import json
from functools import cache
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
    return list(_packaged(_ROOT))


def short_names() -> list[str]:
    """Names of the packaged weights without a version, sorted: `default` and so on."""
    return [name for name, (folder, _) in _packaged(_ROOT).items() if not name.startswith(folder)]


def weights_path(name: str) -> Path | None:
    """Folder of packaged weights (an alias is followed), or None where nothing of that name is packaged."""
    known = _packaged(_ROOT)
    return _ROOT / "weights" / known[name][0] if name in known else None


def weights_stages(name: str) -> int:
    """How many scales a packaged name decodes through (`SamplerConfig.stages`); 0: as many as its files say."""
    return _packaged(_ROOT).get(name, (name, 0))[1]


def versioned_name(name: str) -> str | None:
    """The packaged name that goes on meaning these weights, decoded in this way; None: no packaged name.

    `default` may mean newer weights tomorrow. What is decoded through stages has a versioned name of its own.
    """
    known = _packaged(_ROOT)
    if name not in known:
        return None
    return next((other for other in known if known[other] == known[name] and other.startswith(known[name][0])), name)


def hint_for_channels(channels: int) -> str:
    """The end of a message about latents of so many channels: which packaged weights take them, if any do."""
    for name, (folder, _) in _packaged(_ROOT).items():
        config = json.loads((_ROOT / "weights" / folder / "config.json").read_text(encoding="utf-8"))
        if config["encoder"]["latent_channels"] == channels:
            return f"; {name} is packaged for {channels} channels"
    return ""


@cache
def _packaged(root: Path) -> dict[str, tuple[str, int]]:
    """Names → folder, and stages: two names may be one checkpoint, decoded in two ways. A version begins as a folder's
    name does."""
    file = root / "weights" / "aliases.json"
    aliases = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {p.parent.name: (p.parent.name, 0) for p in root.glob("weights/*/model.safetensors")}
    found |= {name: (entry["weights"], entry.get("stages", 0)) for name, entry in aliases.items()}
    return dict(sorted(found.items(), key=lambda item: (item[0].startswith(item[1][0]), item[0])))
