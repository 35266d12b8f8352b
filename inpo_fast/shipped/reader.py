"""Read the attributes of a scene back from its pixels, by classical vision.

The background is the palette colour that most pixels have; objects are connected regions that
differ from it. The shape is found by drawing each candidate with the region's own area and centroid
and comparing: analysis by synthesis, so nothing is learned and nothing has to be tuned to a model.
What does not look like anything drawable is read as "missing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations

import torch
import torch.nn.functional as F

from . import scenes as _scenes
from .scenes import BACKGROUNDS, COLORS, IMAGE_SIZE, PLACES, RELATIONS, SHAPES, Item, Scene

MISSING = "missing"

# Colour distances are Euclidean in RGB with channels in [-1, 1]; palette colours lie 0.7 or more
# apart, so half of that is unambiguous.
_COLOR_TOLERANCE = 0.35
# A pixel belongs to an object from this distance to the background.
_OBJECT_DISTANCE = 0.35
# Fraction of pixels that must have the background's colour; two large objects leave 0.75.
_BACKGROUND_FRACTION = 0.5
# Smallest region that counts as an object, in pixels; the smallest object drawn has 55.
_SMALLEST_AREA = 12
# Overlap (intersection over union) from which a region counts as the shape.
_SHAPE_OVERLAP = 0.75
# Between the drawn ranges 5.5 ... 7 and 10 ... 11.5 pixels, and well outside them.
_SIZE_THRESHOLD, _SMALLEST_RADIUS, _LARGEST_RADIUS = 8.5, 4.0, 14.0
# A pixel with this share of the region's largest distance to the background is no edge.
_INSIDE = 0.85
_MOST_ITEMS = 3
_CHUNK = 256


def read(images: torch.Tensor) -> list[Scene]:
    """Recover the scenes shown by `images`.

    Args:
        images: [B, 3, 64, 64], floating point in [-1, 1], on any device.

    Returns:
        B scenes with zero to three items; any value may be "missing". Two items are given places
        relative to each other, as in a scene of two.
    """
    expected = (3, IMAGE_SIZE, IMAGE_SIZE)
    if images.dim() != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(f"images must have shape [B, 3, 64, 64], got {list(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [-1, 1], got {images.dtype}")
    return [scene for chunk in torch.split(images, _CHUNK) for scene in _read_chunk(chunk)]


def read_attributes(images: torch.Tensor, scenes: Sequence[Scene]) -> list[dict[str, str]]:
    """Read from `images` [B, 3, 64, 64] a value for every attribute that `scenes` have.

    Objects are matched to those of the scene so that most attributes agree. The keys are those of
    `scenes.attributes`; what cannot be found is "missing".
    """
    if len(images) != len(scenes):
        raise ValueError(f"there must be one scene per image, got {len(scenes)} for {len(images)}")
    return [_align(seen, scene) for seen, scene in zip(read(images), scenes, strict=True)]


def score(images: torch.Tensor, scenes: Sequence[Scene]) -> torch.Tensor:
    """Return the fraction [B] float32 of the attributes of `scenes` that `images` show."""
    values = read_attributes(images, scenes)
    return torch.tensor([_agreement(v, s) for v, s in zip(values, scenes, strict=True)])


def accuracy_by_kind(
    values: Sequence[Mapping[str, str]], scenes: Sequence[Scene]
) -> dict[str, float]:
    """Return the fraction right for each kind of attribute ("shape", "color", ...) and "all".

    "all" is the mean of the scenes' scores. `values` come from `read_attributes`.
    """
    right: dict[str, list[bool]] = {}
    for value, scene in zip(values, scenes, strict=True):
        for key, target in _scenes.attributes(scene).items():
            right.setdefault(key.split()[-1], []).append(value[key] == target)
    result = {kind: sum(hits) / len(hits) for kind, hits in sorted(right.items())}
    scores = [_agreement(v, s) for v, s in zip(values, scenes, strict=True)]
    return result | {"all": sum(scores) / len(scores)}


def _agreement(values: Mapping[str, str], scene: Scene) -> float:
    target = _scenes.attributes(scene)
    return sum(values[key] == value for key, value in target.items()) / len(target)


def _align(seen: Scene, scene: Scene) -> dict[str, str]:
    wanted = len(scene.items)
    absent = Item(MISSING, MISSING, MISSING, MISSING)
    candidates = seen.items + (absent,) * (wanted - len(seen.items))
    readings = []
    for chosen in permutations(candidates, wanted):
        values = _scenes.attributes(Scene(chosen, seen.background))
        values["count"] = str(len(seen.items))
        readings.append(values)
    return max(readings, key=lambda values: _agreement(values, scene))


def _read_chunk(images: torch.Tensor) -> list[Scene]:
    pixels = images.detach().float().clamp(-1, 1)
    backgrounds, ground = _find_background(pixels)
    different = _distance(pixels, ground) > _OBJECT_DISTANCE
    known = torch.tensor(
        [b != MISSING for b in backgrounds], dtype=torch.bool, device=pixels.device
    )
    owner, masks = _find_objects(different & known[:, None, None])
    found: list[list[tuple[Item, tuple[float, float]]]] = [[] for _ in backgrounds]
    if len(owner):
        objects = _describe(pixels[owner], ground[owner], masks)
        for index, entry in zip(owner.tolist(), objects, strict=True):
            found[index].append(entry)
    return [
        Scene(_place(entries), background)
        for entries, background in zip(found, backgrounds, strict=True)
    ]


def _distance(pixels: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
    """Return the distance [B, 64, 64] of pixels [B, 3, 64, 64] to a colour [B, 3]."""
    red, green, blue = (pixels - color[..., None, None]).square().unbind(1)
    return (red + green + blue).sqrt()


def _find_background(pixels: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Return the background's name per image and its measured colour [B, 3]."""
    palette = _scenes.palette(BACKGROUNDS, pixels.device)
    colors = pixels.flatten(2).mT
    close = (torch.cdist(colors, palette) < _COLOR_TOLERANCE).float()
    share, index = close.mean(dim=1).max(dim=1)
    chosen = close.gather(2, index[:, None, None].expand(-1, colors.shape[1], 1))
    color = (colors * chosen).sum(dim=1) / chosen.sum(dim=1).clamp(min=1)
    names = tuple(BACKGROUNDS)
    found = [
        names[i] if s >= _BACKGROUND_FRACTION else MISSING
        for i, s in zip(index.tolist(), share.tolist(), strict=True)
    ]
    return found, color


def _find_objects(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return owner [K] and mask [K, 64, 64] of the largest connected regions of `mask` [B, 64, 64].

    At most three per image. A pixel's label is the largest pixel number that its region holds,
    found by sweeping along rows and columns in turn until nothing changes.
    """
    batch, height, width = mask.shape
    names = torch.arange(1, height * width + 1, device=mask.device)
    labels = mask * names.reshape(1, height, width)
    while True:
        spread = _sweep(_sweep(labels, mask).mT, mask.mT).mT
        if torch.equal(spread, labels):
            break
        labels = spread
    areas = torch.zeros(batch, height * width + 1, device=mask.device)
    areas.scatter_add_(1, labels.flatten(1), mask.float().flatten(1))
    areas[:, 0] = 0
    area, name = areas.topk(_MOST_ITEMS, dim=1)
    owner, slot = (area >= _SMALLEST_AREA).nonzero(as_tuple=True)
    return owner, labels[owner] == name[owner, slot][:, None, None]


def _sweep(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Give every run of `mask` [B, H, W] along a row the largest of its `labels`."""
    run = (~mask).cumsum(-1)
    largest = torch.zeros(*run.shape[:-1], run.shape[-1] + 1, dtype=labels.dtype, device=run.device)
    largest.scatter_reduce_(-1, run, labels, "amax")
    return largest.gather(-1, run) * mask


def _describe(
    pixels: torch.Tensor, ground: torch.Tensor, masks: torch.Tensor
) -> list[tuple[Item, tuple[float, float]]]:
    """Return item (without place) and centre in pixels of K regions.

    Args:
        pixels: images [K, 3, 64, 64]; ground: background colours [K, 3]; masks: [K, 64, 64].
    """
    device = pixels.device
    region = F.max_pool2d(masks[:, None].float(), 5, stride=1, padding=2)[:, 0]
    # Pixels at the edge are blends with the background, so the colour comes from the others.
    distance = _distance(pixels, ground) * masks
    inside = (distance > _INSIDE * distance.amax(dim=(1, 2), keepdim=True))[:, None].float()
    color = (pixels * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)
    nearness, color_index = torch.cdist(color, _scenes.palette(COLORS, device)).min(dim=1)

    contrast = color - ground
    scale = contrast.square().sum(1).clamp(min=1e-6)
    alpha = torch.einsum("kchw,kc->khw", pixels - ground[..., None, None], contrast)
    alpha = (alpha / scale[:, None, None]).clamp(0, 1) * region
    area = alpha.sum(dim=(1, 2)).clamp(min=1e-6)
    x, y = _scenes.pixel_grid(device)
    center_x = (alpha * x).sum(dim=(1, 2)) / area
    center_y = (alpha * y).sum(dim=(1, 2)) / area

    radius = (area[:, None] / torch.tensor(_scenes.AREAS, device=device)).sqrt()
    drop = torch.zeros(len(SHAPES), device=device)
    drop[SHAPES.index("triangle")] = _scenes.TRIANGLE_DROP
    box_y = center_y[:, None] - drop * radius
    right = x - center_x[:, None, None]
    overlaps = []
    for index, shape in enumerate(SHAPES):
        down = y - box_y[:, index, None, None]
        edge = _scenes.signed_distance(shape, right, down, radius[:, index, None, None])
        drawn = _scenes.coverage(edge)
        both = torch.minimum(alpha, drawn).sum(dim=(1, 2))
        overlaps.append(both / torch.maximum(alpha, drawn).sum(dim=(1, 2)))
    overlap, shape_index = torch.stack(overlaps, dim=1).max(dim=1)
    pick = torch.arange(len(radius), device=device), shape_index
    columns = (
        overlap,
        shape_index,
        nearness,
        color_index,
        radius[pick],
        center_x,
        box_y[pick],
    )
    objects = []
    for fit, form, near, hue, r, cx, cy in zip(*(c.tolist() for c in columns), strict=True):
        fits = fit >= _SHAPE_OVERLAP and _SMALLEST_RADIUS <= r <= _LARGEST_RADIUS
        item = Item(
            shape=SHAPES[form] if fits else MISSING,
            color=tuple(COLORS)[hue] if near <= _COLOR_TOLERANCE else MISSING,
            size=("large" if r > _SIZE_THRESHOLD else "small") if fits else MISSING,
            place=MISSING,
        )
        objects.append((item, (cx, cy)))
    return objects


def _place(entries: list[tuple[Item, tuple[float, float]]]) -> tuple[Item, ...]:
    """Name the places of one image's objects, from their centres."""
    if len(entries) == 2:
        (first, (x0, y0)), (second, (x1, y1)) = entries
        dx, dy = x1 - x0, y1 - y0
        places = (MISSING, MISSING)
        # Objects on a diagonal stand in no single relation.
        if max(abs(dx), abs(dy)) > 1.25 * min(abs(dx), abs(dy)):
            if abs(dx) > abs(dy):
                places = RELATIONS["left of" if dx > 0 else "right of"]
            else:
                places = RELATIONS["above" if dy > 0 else "below"]
        return replace(first, place=places[0]), replace(second, place=places[1])
    names = {cell: name for name, cell in PLACES.items()}
    half = _scenes.SINGLE_OFFSET / 2

    def cell(value: float) -> int:
        return int(value > half) - int(value < -half)

    return tuple(replace(item, place=names[cell(x), cell(y)]) for item, (x, y) in entries)
