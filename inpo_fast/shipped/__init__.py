"""The shipped model, its preference data, and the scenes that it draws.

`model_path()` is a complete text-to-image pipeline of 11 MB for
`StableDiffusionPipeline.from_pretrained`. It draws coloured shapes (`Scene`), so whether an image
shows what its prompt says can be read from the pixels (`read`, `score`) instead of being guessed
by a learned model. Importing this package needs torch only.
"""

from __future__ import annotations

from pathlib import Path

from .reader import MISSING, accuracy_by_kind, read, read_attributes, score
from .sampling import accuracy, load_pipeline, model_path, sample
from .scenes import (
    Item,
    Scene,
    attributes,
    edits,
    held_out_scenes,
    is_held_out,
    parse,
    prompt,
    render,
    sample_scenes,
    with_attribute,
)

__all__ = [
    "MISSING",
    "Item",
    "Scene",
    "accuracy",
    "accuracy_by_kind",
    "attributes",
    "edits",
    "held_out_prompts",
    "held_out_scenes",
    "is_held_out",
    "load_pipeline",
    "model_path",
    "parse",
    "preferences_path",
    "prompt",
    "read",
    "read_attributes",
    "render",
    "sample",
    "sample_scenes",
    "score",
    "with_attribute",
]


def preferences_path() -> Path:
    """Return the parquet file of preference pairs: jpg_0, jpg_1, label_0 and caption."""
    return Path(__file__).parent / "preferences.parquet"


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Return the canonical prompts of `held_out_scenes(count, seed)`."""
    return [prompt(scene) for scene in held_out_scenes(count, seed)]
