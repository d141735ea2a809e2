"""Packaged files."""

from pathlib import Path


def weights_path(name: str) -> Path | None:
    return None


def weights_names() -> list[str]:
    return []
