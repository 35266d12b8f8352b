"""Scenes of the shipped model: their attributes, prompts, split and renderer.

A scene is one or two flat objects over a plain background. One object has one of nine places; two
objects stand opposite each other, so that their places are a relation ("left of", "above", ...).
For batches a scene is a row of nine integers ("codes"): the background, then shape, colour, size
and place of either object, with -1 throughout an absent second object.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

IMAGE_SIZE = 64

SHAPES = ("circle", "square", "triangle", "cross")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 60),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (150, 60, 190),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (10, 10, 10),
    "blue": COLORS["blue"],
    "green": COLORS["green"],
    "yellow": COLORS["yellow"],
}
# Radii in pixels. The gap between the ranges is what makes the size readable.
SIZES: Mapping[str, tuple[float, float]] = {"small": (5.5, 7.0), "large": (10.0, 11.5)}
PLACES: Mapping[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "center": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}
# What the first of two objects is to the second, by the places of both.
RELATIONS: Mapping[str, tuple[str, str]] = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}

# Distance in pixels of an outer place from the image centre, for one object and for two.
SINGLE_OFFSET, PAIR_OFFSET = 18.0, 16.0
# Largest random displacement in pixels. Two objects may slide further across their axis.
_JITTER, _SLIDE = 2.0, 8.0

CODE_LENGTH = 9
_SECOND = 5
_SHAPE, _COLOR, _SIZE, _PLACE = range(4)


@dataclass(frozen=True)
class Item:
    """One object. Values are keys of the tables above (a reading may say "missing")."""

    shape: str
    color: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """One or two objects, in the order in which the prompt names them, over a background."""

    items: tuple[Item, ...]
    background: str


def attributes(scene: Scene) -> dict[str, str]:
    """Name every attribute of `scene`: those of its objects, their places, background and count.

    The keys of one object are "shape", "color", "size" and "place"; those of two are
    "first shape" to "second size" and "relation". The last word of a key is its kind.
    """
    values = {"count": str(len(scene.items)), "background": scene.background}
    pair = len(scene.items) == 2
    for prefix, item in zip(("first ", "second ") if pair else ("",), scene.items, strict=False):
        values |= {
            f"{prefix}shape": item.shape,
            f"{prefix}color": item.color,
            f"{prefix}size": item.size,
        }
    if pair:
        places = (scene.items[0].place, scene.items[1].place)
        values["relation"] = next((k for k, v in RELATIONS.items() if v == places), "missing")
    elif scene.items:
        values["place"] = scene.items[0].place
    return values


def with_attribute(scene: Scene, key: str, value: str) -> Scene:
    """Return `scene` with the attribute `key` (as `attributes` names it) set to `value`."""
    if key not in attributes(scene) or key == "count":
        raise ValueError(f"key must be an attribute of the scene other than its count, got {key!r}")
    *prefix, kind = key.split()
    if kind == "background":
        edited = replace(scene, background=value)
    elif kind == "relation":
        if value not in RELATIONS:
            raise ValueError(f"value must be one of {sorted(RELATIONS)}, got {value!r}")
        first, second = scene.items
        places = RELATIONS[value]
        edited = replace(
            scene, items=(replace(first, place=places[0]), replace(second, place=places[1]))
        )
    else:
        index = 1 if prefix == ["second"] else 0
        items = list(scene.items)
        items[index] = replace(items[index], **{kind: value})
        edited = replace(scene, items=tuple(items))
    encode([edited])
    return edited


def edits(scene: Scene) -> list[tuple[str, Scene]]:
    """List every valid change of one attribute as (key, edited scene)."""
    options = {
        "shape": tuple(SHAPES),
        "color": tuple(COLORS),
        "size": tuple(SIZES),
        "place": tuple(PLACES),
        "background": tuple(BACKGROUNDS),
        "relation": tuple(RELATIONS),
        "count": (),
    }
    changes = []
    for key, old in attributes(scene).items():
        for value in options[key.split()[-1]]:
            clash = [item.color for item in scene.items] + [scene.background]
            if value == old or (key.endswith(("color", "background")) and value in clash):
                continue
            changes.append((key, with_attribute(scene, key, value)))
    return changes


SINGLE_PHRASINGS = (
    "a {size} {color} {shape} {place} on a {background} background",
    "on a {background} background, a {size} {color} {shape} {place}",
    "{size} {color} {shape} {place}, {background} background",
    "a picture of a {size} {color} {shape} {place} on a {background} background",
)
PAIR_PHRASINGS = (
    "a {size} {color} {shape} {relation} a {size2} {color2} {shape2} on a {background} background",
    "on a {background} background, a {size} {color} {shape} {side} a {size2} {color2} {shape2}",
    "{size} {color} {shape} {relation} {size2} {color2} {shape2}, {background} background",
    "a picture of a {size} {color} {shape} {side} a {size2} {color2} {shape2} "
    "on a {background} background",
)


def _place_phrase(place: str) -> str:
    return {"left": "on the left", "right": "on the right", "center": "in the center"}.get(
        place, f"at the {place}"
    )


# For every slot of a phrasing: the column of the codes that fills it, and the phrase per code.
# The relation follows from the place of the first object, so codes that no pair uses are empty.
_FIRST = {places[0]: relation for relation, places in RELATIONS.items()}
SLOTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "background": (0, tuple(BACKGROUNDS)),
    "shape": (1, SHAPES),
    "color": (2, tuple(COLORS)),
    "size": (3, tuple(SIZES)),
    "place": (4, tuple(map(_place_phrase, PLACES))),
    "relation": (4, tuple(_FIRST.get(place, "") for place in PLACES)),
    "side": (
        4,
        tuple(
            f"to the {place} of" if place in ("left", "right") else _FIRST.get(place, "")
            for place in PLACES
        ),
    ),
    "shape2": (5, SHAPES),
    "color2": (6, tuple(COLORS)),
    "size2": (7, tuple(SIZES)),
}


def prompt(scene: Scene, phrasing: int = 0) -> str:
    """Describe `scene` in one of four phrasings; 0 is the canonical one."""
    codes = encode([scene])[0].tolist()
    phrasings = PAIR_PHRASINGS if len(scene.items) == 2 else SINGLE_PHRASINGS
    if not 0 <= phrasing < len(phrasings):
        raise ValueError(f"phrasing must lie in 0 ... {len(phrasings) - 1}, got {phrasing}")
    words = {slot: values[codes[column]] for slot, (column, values) in SLOTS.items()}
    return phrasings[phrasing].format(**words)


def parse(text: str) -> Scene:
    """Return the scene that `text`, in one of the phrasings, describes; ValueError if in none."""
    for phrasing in (*SINGLE_PHRASINGS, *PAIR_PHRASINGS):
        pattern = phrasing
        for slot, (_, values) in SLOTS.items():
            options = "|".join(sorted(filter(None, values), key=len, reverse=True))
            pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{options})")
        if match := re.fullmatch(pattern, text):
            codes = torch.full((1, CODE_LENGTH), -1)
            for slot, phrase in match.groupdict().items():
                column, values = SLOTS[slot]
                codes[0, column] = values.index(phrase)
            if codes[0, _SECOND] >= 0:
                first = tuple(PLACES)[codes[0, 4]]
                codes[0, 8] = tuple(PLACES).index(dict(RELATIONS.values())[first])
            return decode(codes)[0]
    raise ValueError(f"text must follow one of the phrasings of a scene, got {text!r}")


_TABLES = (SHAPES, tuple(COLORS), tuple(SIZES), tuple(PLACES))


def encode(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return the codes [B, 9] int64 of `scenes`; ValueError if one of them cannot be drawn."""
    rows = []
    for scene in scenes:
        if len(scene.items) not in (1, 2):
            raise ValueError(f"a scene must have one or two items, got {len(scene.items)}")
        if scene.background not in BACKGROUNDS:
            raise ValueError(
                f"background must be one of {tuple(BACKGROUNDS)}, got {scene.background!r}"
            )
        row = [tuple(BACKGROUNDS).index(scene.background)]
        for item in scene.items:
            values = (item.shape, item.color, item.size, item.place)
            for name, table, value in zip(
                ("shape", "color", "size", "place"), _TABLES, values, strict=True
            ):
                if value not in table:
                    raise ValueError(f"{name} must be one of {table}, got {value!r}")
                row.append(table.index(value))
            if item.color == scene.background:
                raise ValueError(f"an item must differ from its background, both {item.color!r}")
        if len(scene.items) == 2:
            places = (scene.items[0].place, scene.items[1].place)
            if places not in RELATIONS.values():
                raise ValueError(
                    f"places of two items must be one of {tuple(RELATIONS.values())}, got {places}"
                )
        rows.append(row + [-1] * (CODE_LENGTH - len(row)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, CODE_LENGTH)


def decode(codes: torch.Tensor) -> list[Scene]:
    """Return the scenes of `codes` [B, 9] int64: the inverse of `encode`."""
    scenes = []
    for background, *rest in codes.tolist():
        items = tuple(
            Item(*(table[code] for table, code in zip(_TABLES, values, strict=True)))
            for values in (rest[:4], rest[4:])
            if values[0] >= 0
        )
        scenes.append(Scene(items, tuple(BACKGROUNDS)[background]))
    return scenes


def _held_out_background(codes: torch.Tensor) -> torch.Tensor:
    """Return for each row the background [B] that is held out with its objects, or none (>= 6).

    Each combination of objects is held out with at most one background, so a training sampler
    only has to avoid that one. One combination in ten per background, or 3 in 5, has one.
    """
    key = torch.zeros_like(codes[:, 0])
    for column in codes[:, 1:].unbind(1):
        key = key * 11 + (column + 1)
    # A multiplicative hash kept below 2^63: the products stay exact in int64.
    key = (key % 2147483647) * 1103515245 % 2147483647
    return (key >> 8) % 10


def is_held_out(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return [B] bool: whether the combination of attributes is kept out of the training data."""
    codes = encode(scenes)
    return _held_out_background(codes) == codes[:, 0]


def sample_codes(
    count: int, generator: torch.Generator, *, held_out: bool | None = None
) -> torch.Tensor:
    """Draw codes [count, 9] int64 on the generator's device; two scenes in three have two objects.

    Args:
        count: number of scenes B.
        generator: source of randomness; its device is where the codes are made.
        held_out: True draws from held-out combinations only, False from the others only
            (the training data), None from all.
    """
    device = generator.device

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=generator, device=device)

    relations = torch.tensor(
        [[tuple(PLACES).index(p) for p in pair] for pair in RELATIONS.values()], device=device
    )
    pair = integers(3) > 0
    places = relations[integers(len(RELATIONS))]
    first_place = torch.where(pair, places[:, 0], integers(len(PLACES)))
    columns = [integers(len(BACKGROUNDS))]
    for place in (first_place, places[:, 1]):
        columns += [integers(len(SHAPES)), integers(len(COLORS)), integers(len(SIZES)), place]
    codes = torch.stack(columns, dim=1)
    codes[:, 5:] = torch.where(pair[:, None], codes[:, 5:], -1)

    # The background is drawn last, uniformly from those that the objects and the split allow.
    names, colors = tuple(BACKGROUNDS), tuple(COLORS)
    clash = torch.tensor([[c == b for b in names] for c in (*colors, None)], device=device)
    allowed = ~(clash[codes[:, 2]] | clash[codes[:, 6]])
    index = torch.arange(len(names), device=device)
    held = _held_out_background(codes)[:, None] == index
    if held_out is not None:
        allowed &= held if held_out else ~held
    draw = torch.rand(count, len(names), generator=generator, device=device)
    codes[:, 0] = draw.masked_fill(~allowed, -1.0).argmax(dim=1)
    if held_out:
        # Most combinations of objects have no held-out background: draw again for them.
        kept = codes[allowed.any(dim=1)]
        if len(kept) < count:
            more = sample_codes(count - len(kept), generator, held_out=True)
            return torch.cat([kept, more])
    return codes


def sample_scenes(
    count: int, generator: torch.Generator, *, held_out: bool | None = None
) -> list[Scene]:
    """Draw `count` random scenes; see `sample_codes`."""
    return decode(sample_codes(count, generator, held_out=held_out))


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return `count` distinct scenes whose combination of attributes no training image had."""
    generator = torch.Generator().manual_seed(seed)
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        scenes |= dict.fromkeys(sample_scenes(count, generator, held_out=True))
    return list(itertools.islice(scenes, count))


def signed_distance(
    shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """Return the distance in pixels to the edge of `shape`, negative inside.

    Args:
        shape: one of `SHAPES`.
        x, y: pixel coordinates relative to the centre of the bounding box, right and down.
        radius: radius in pixels; all three broadcast together.
    """
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.88 * radius
    if shape == "triangle":
        # Equilateral; `TRIANGLE_DROP` centers its bounding box.
        down = y - TRIANGLE_DROP * radius
        return torch.maximum(down, (3**0.5 * x.abs() - down) / 2) - 0.6 * radius
    u, v = x.abs(), y.abs()
    return torch.maximum(torch.maximum(u, v) - 1.05 * radius, torch.minimum(u, v) - 0.4 * radius)


# By how much the centroid of a triangle lies below the centre of its bounding box, in radii.
TRIANGLE_DROP = 0.3
# Area of each shape in units of the squared radius.
AREAS = (3.14159265, (2 * 0.88) ** 2, 3 * 3**0.5 * 0.6**2, 4 * 0.4 * (2 * 1.05 - 0.4))


def coverage(distance: torch.Tensor) -> torch.Tensor:
    """Return the fraction of a pixel inside an edge at the given signed distance in pixels."""
    return (0.5 - distance).clamp(0, 1)


def pixel_grid(device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coordinates x [64] and y [64, 1] of pixel centres relative to the image's."""
    axis = torch.arange(IMAGE_SIZE, device=device, dtype=torch.float32) + 0.5 - IMAGE_SIZE / 2
    return axis, axis[:, None]


def palette(table: Mapping[str, tuple[int, int, int]], device: torch.device) -> torch.Tensor:
    """Return the colours of `table` as [N, 3] float32 in [-1, 1]."""
    return torch.tensor(list(table.values()), dtype=torch.float32, device=device) / 127.5 - 1


def render_codes(codes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw `codes` [B, 9] int64 as antialiased images [B, 3, 64, 64] float32 in [-1, 1].

    Positions and sizes are drawn continuously from `generator`; None draws the middle of every
    range. The images lie on the device of `codes`, where the generator must live too.
    """
    device = codes.device
    batch = len(codes)
    items = codes[:, 1:].reshape(batch, 2, 4)
    present = items[..., _SHAPE] >= 0
    items = items.clamp(min=0)
    pair = present[:, 1]
    if generator is None:
        noise = torch.zeros(batch, 2, 3, device=device)
    else:
        noise = torch.rand(batch, 2, 3, generator=generator, device=device) * 2 - 1

    limits = torch.tensor(list(SIZES.values()), device=device)[items[..., _SIZE]]
    radius = limits.mean(-1) + noise[..., 2] * (limits[..., 1] - limits[..., 0]) / 2
    grid = torch.tensor(list(PLACES.values()), dtype=torch.float32, device=device)
    direction = grid[items[..., _PLACE]]
    offset = torch.where(pair, PAIR_OFFSET, SINGLE_OFFSET)[:, None, None]
    across = (direction == 0) & pair[:, None, None]
    center = direction * offset + noise[..., :2] * torch.where(across, _SLIDE, _JITTER)

    x, y = pixel_grid(device)
    x = x - center[..., 0, None, None]
    y = y - center[..., 1, None, None]
    radius = radius[..., None, None]
    distances = torch.stack([signed_distance(shape, x, y, radius) for shape in SHAPES])
    index = items[..., _SHAPE][None, ..., None, None].expand(1, *distances.shape[1:])
    alpha = coverage(distances.gather(0, index)[0]) * present[..., None, None]

    colors = palette(COLORS, device)[items[..., _COLOR]]
    image = palette(BACKGROUNDS, device)[codes[:, 0], :, None, None]
    for item in range(2):
        image = image + alpha[:, item, None] * (colors[:, item, :, None, None] - image)
    return image


def render(
    scenes: Sequence[Scene],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Draw `scenes` as images [B, 3, 64, 64] float32 in [-1, 1]; see `render_codes`."""
    return render_codes(encode(scenes).to(device), generator)
