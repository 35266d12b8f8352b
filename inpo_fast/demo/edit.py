"""Part 2: change one attribute of an image through its prompt, and read from pixels what happened.

A held-out scene is inverted under its own prompt and decoded under the prompt of the edited scene.
The inversion may stop short of pure noise: `strength` is the fraction of the grid that is used, 0.8
in EDICT and BDIA, and the less of it, the more of the image stays. Shapes and colours of the
shipped model's scenes are decided at the noisy end, so the demo uses all of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..ops import LatticeRangeError, NonFiniteError
from ..sampler import Sampler, StateKind
from ..shipped import reader, scenes
from ..shipped.scenes import Scene
from .measures import mean_and_error
from .pipeline import Denoiser, Pipeline
from .solvers import SOLVERS, RoundTrip, round_trip

STRENGTHS: Mapping[str, float] = dict.fromkeys(SOLVERS, 1.0)
"""Fraction of the steps that is inverted, by solver."""


@dataclass(frozen=True)
class Edit:
    """A scene, the one that the edit asks for, and the name of the attribute that differs."""

    source: Scene
    target: Scene
    key: str

    @property
    def prompt(self) -> str:
        """The prompt that asks for the edit."""
        return scenes.prompt(self.target)

    @property
    def change(self) -> str:
        """For people: `color: red -> blue`."""
        before, after = scenes.attributes(self.source), scenes.attributes(self.target)
        return f"{self.key}: {before[self.key]} -> {after[self.key]}"


@dataclass(frozen=True)
class EditRow:
    """One solver over all edits.

    Attributes:
        strength: fraction of the steps that was inverted.
        state: `lattice`, or `float32` for DDIM, to which the lattice gives nothing.
        success: fraction of edits whose attribute has its new value.
        preservation: fraction of all other attributes that kept their value.
        error: what stopped the run, or None; the fractions are then 0.
    """

    solver: str
    state: str
    strength: float
    edits: int
    success: float
    success_se: float
    preservation: float
    preservation_se: float
    error: str | None = None


@dataclass(frozen=True)
class EditResult:
    """Rows and pictures: source [B, 3, H, W] and an edited batch by solver."""

    rows: list[EditRow]
    edits: list[Edit]
    sources: Tensor
    edited: dict[str, Tensor]


def choose_edits(count: int, seed: int) -> list[Edit]:
    """One change each for `count` held-out scenes; the kinds of attribute take turns."""
    generator = torch.Generator().manual_seed(seed)
    kinds = ("color", "background", "shape", "size")
    edits = []
    for index, scene in enumerate(scenes.held_out_scenes(count, seed)):
        kind = kinds[index % len(kinds)]
        options = [option for option in scenes.edits(scene) if option[0].split()[-1] == kind]
        pick = int(torch.randint(len(options), (), generator=generator))
        key, target = options[pick]
        edits.append(Edit(scene, target, key))
    return edits


def measure(edits: Sequence[Edit], images: Tensor) -> tuple[Tensor, Tensor]:
    """What `images` [B, 3, H, W] show of the edits.

    Returns:
        [B] 1 where the attribute has its new value, else 0, and [B] the fraction of the other
        attributes that have the source's value; both float32.
    """
    # Aligned with the target: objects are told apart by their attributes, those asked for included.
    values = reader.read_attributes(images, [edit.target for edit in edits])
    success, preserved = [], []
    for edit, value in zip(edits, values, strict=True):
        wanted = scenes.attributes(edit.target)
        others = [value[key] == wanted[key] for key in wanted if key != edit.key]
        success.append(float(value[edit.key] == wanted[edit.key]))
        preserved.append(sum(others) / len(others))
    return torch.tensor(success), torch.tensor(preserved)


def run(
    pipeline: Pipeline,
    *,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    strengths: Mapping[str, float] = STRENGTHS,
) -> EditResult:
    """Make `count` edits with every solver."""
    edits = choose_edits(count, seed)
    sources = [edit.source for edit in edits]
    images = scenes.render(sources, generator=torch.Generator().manual_seed(seed))
    latents = pipeline.encode(images)
    before = pipeline.denoiser([scenes.prompt(scene) for scene in sources])
    after = pipeline.denoiser([edit.prompt for edit in edits])
    rows, edited = [], {}
    with tqdm(total=len(SOLVERS), desc="2/3 edit") as bar:
        for solver in SOLVERS:
            bar.set_postfix_str(solver)
            strength = strengths[solver]
            ways = round_trip(solver, pipeline.schedule(steps).fraction(strength))
            error = None
            success = preserved = torch.zeros(count)
            try:
                end = _decode_as_edited(latents, ways, before, after, guidance)
            except (LatticeRangeError, NonFiniteError) as stopped:
                error = str(stopped)
            else:
                edited[solver] = pipeline.decode(end)
                success, preserved = measure(edits, edited[solver])
            rows.append(
                EditRow(
                    solver,
                    _state(ways),
                    strength,
                    count,
                    *mean_and_error(success),
                    *mean_and_error(preserved),
                    error,
                )
            )
            bar.update()
    return EditResult(rows, edits, images, edited)


def _state(ways: RoundTrip) -> StateKind:
    return "lattice" if ways.exact else "float32"


def _decode_as_edited(
    latents: Tensor, ways: RoundTrip, before: Denoiser, after: Denoiser, guidance: float
) -> Tensor:
    """Invert `latents` [B, 4, h, w] with the model `before` and come back with `after`."""
    there = Sampler(before, ways.to_noise, guidance_scale=guidance, state=_state(ways))
    back = Sampler(after, ways.to_image, guidance_scale=guidance, state=_state(ways))
    noise = there.run(latents)
    return back.run(noise if ways.exact else noise.sample()).sample()
