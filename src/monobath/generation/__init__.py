"""Generating latents: a DiT, how it is guided and sampled, and its files."""

from __future__ import annotations

from .generator import GenerationSampler, Generator, GeneratorConfig

__all__ = ["GenerationSampler", "Generator", "GeneratorConfig"]
