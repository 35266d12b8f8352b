import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inpo_fast.shipped import scenes
from inpo_fast.shipped.scenes import Item, Scene

CIRCLE = Item("circle", "red", "large", "left")
SQUARE = Item("square", "green", "small", "right")
PAIR = Scene((CIRCLE, SQUARE), "blue")
SINGLE = Scene((Item("triangle", "yellow", "small", "top left"),), "white")


def draw(count, seed=0, **options):
    return scenes.sample_scenes(count, torch.Generator().manual_seed(seed), **options)


def test_prompts_read_naturally():
    expected = "a large red circle left of a small green square on a blue background"
    assert scenes.prompt(PAIR) == expected
    expected = "a small yellow triangle at the top left on a white background"
    assert scenes.prompt(SINGLE) == expected


@given(seed=st.integers(0, 2**31), phrasing=st.integers(0, 3))
def test_a_scene_survives_its_codes_and_every_phrasing(seed, phrasing):
    for scene in draw(4, seed):
        assert scenes.decode(scenes.encode([scene])) == [scene]
        assert scenes.parse(scenes.prompt(scene, phrasing)) == scene


def test_parse_refuses_other_text():
    with pytest.raises(ValueError, match="phrasings of a scene"):
        scenes.parse("a cat on a mat")


def test_every_edit_changes_exactly_one_attribute():
    for scene in draw(50):
        before = scenes.attributes(scene)
        changes = scenes.edits(scene)
        assert {key for key, _ in changes} == set(before) - {"count"}
        for key, edited in changes:
            after = scenes.attributes(edited)
            assert [k for k in before if before[k] != after[k]] == [key]


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (Scene((), "blue"), "one or two items, got 0"),
        (Scene((CIRCLE,), "pink"), "background must be one of .* got 'pink'"),
        (Scene((CIRCLE,), "red"), "background must be one of"),
        (Scene((Item("star", "red", "large", "left"),), "blue"), "shape must be one of"),
        (Scene((Item("circle", "blue", "large", "left"),), "blue"), "differ from its background"),
        (Scene((CIRCLE, CIRCLE), "blue"), "places of two items"),
    ],
)
def test_scenes_that_cannot_be_drawn_are_refused(scene, message):
    with pytest.raises(ValueError, match=message):
        scenes.encode([scene])


def test_images_have_the_stated_form_and_centre():
    image = scenes.render([PAIR, SINGLE])
    assert image.shape == (2, 3, 64, 64)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    red = torch.tensor(scenes.COLORS["red"]) / 127.5 - 1
    torch.testing.assert_close(image[0, :, 32, 16], red, atol=1e-6, rtol=0)


def test_drawn_areas_are_those_stated():
    # Antialiasing by distance is exact along straight edges parallel to the axes and errs at
    # corners by a fraction of a pixel, which for a radius of ten stays below two per cent.
    x, y = scenes.pixel_grid("cpu")
    radius = torch.tensor(10.0)
    for shape, area in zip(scenes.SHAPES, scenes.AREAS, strict=True):
        drawn = scenes.coverage(scenes.signed_distance(shape, x, y + 0 * x, radius)).sum()
        assert drawn.item() == pytest.approx(area * 100, rel=0.02)


def test_rendering_is_deterministic_and_jittered():
    many = draw(64)

    def images(seed):
        return scenes.render(many, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(images(1), images(1))
    assert (images(1) != images(2)).flatten(1).any(dim=1).all()


def test_a_batch_is_drawn_like_its_parts():
    many = draw(32)
    alone = torch.cat([scenes.render([scene]) for scene in many])
    torch.testing.assert_close(scenes.render(many), alone, atol=1e-6, rtol=0)


def test_objects_neither_touch_nor_leave_the_image():
    generator = torch.Generator().manual_seed(0)
    codes = scenes.sample_codes(2000, generator)
    codes[:, 3] = codes[:, 7] = 1
    images = scenes.render_codes(codes, generator)
    ground = scenes.palette(scenes.BACKGROUNDS, codes.device)[codes[:, 0], :, None, None]
    covered = (images - ground).abs().sum(dim=1) > 0.02
    # The widest large triangle may lose its outermost pixel, nothing else reaches the border.
    border = torch.cat([covered[:, 0], covered[:, -1], covered[:, :, 0], covered[:, :, -1]], dim=1)
    assert border.float().mean() < 0.01


def test_held_out_combinations_never_occur_in_training():
    generator = torch.Generator().manual_seed(3)
    training = scenes.sample_scenes(20000, generator, held_out=False)
    assert not scenes.is_held_out(training).any()
    held_out = scenes.held_out_scenes(500)
    assert len(set(held_out)) == 500
    assert scenes.is_held_out(held_out).all()
    assert not set(held_out) & set(training)
    share = scenes.is_held_out(scenes.sample_scenes(20000, generator)).float().mean()
    assert 0.05 < share < 0.15


def test_held_out_scenes_are_the_same_everywhere():
    assert scenes.held_out_scenes(20) == scenes.held_out_scenes(20)
    assert scenes.held_out_scenes(20) != scenes.held_out_scenes(20, seed=1)


def test_samples_cover_every_value_evenly():
    values = {}
    for scene in draw(6000):
        for key, value in scenes.attributes(scene).items():
            values.setdefault(key.split()[-1], []).append(value)
    counts = {"shape": 4, "color": 6, "size": 2, "place": 9, "relation": 4, "background": 6}
    for kind, count in counts.items():
        seen = values[kind]
        shares = [seen.count(value) / len(seen) for value in set(seen)]
        assert len(shares) == count
        assert min(shares) > 0.6 / count
