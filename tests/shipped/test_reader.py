import pytest
import torch
import torch.nn.functional as F

from inpo_fast.shipped import reader, scenes
from inpo_fast.shipped.reader import MISSING
from inpo_fast.shipped.scenes import Item, Scene


@pytest.fixture(scope="module")
def rendered():
    generator = torch.Generator().manual_seed(7)
    many = scenes.sample_scenes(3000, generator)
    return many, scenes.render(many, generator=generator)


def accuracies(images, many):
    return reader.accuracy_by_kind(reader.read_attributes(images, many), many)


def test_rendered_scenes_are_read_right(rendered):
    many, images = rendered
    found = accuracies(images, many)
    assert min(found.values()) >= 0.995, found


def test_blur_like_that_of_an_autoencoder_is_survived(rendered):
    many, images = (part[:1000] for part in rendered)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    found = accuracies(F.avg_pool2d(padded, 3, stride=1), many)
    assert found["all"] >= 0.99, found


def test_shifted_colours_and_noise_are_survived(rendered):
    many, images = (part[:1000] for part in rendered)
    generator = torch.Generator().manual_seed(1)
    shift = 0.05 * torch.randn(len(images), 3, 1, 1, generator=generator)
    noise = 0.05 * torch.randn(images.shape, generator=generator)
    found = accuracies(0.93 * images + shift + noise, many)
    assert found["all"] >= 0.99, found


def test_precision_of_the_images_does_not_matter(rendered):
    many, images = (part[:200] for part in rendered)
    assert reader.score(images.half(), many).mean() >= 0.995


@pytest.mark.parametrize("cells", [4, 8, 16, 64])
def test_noise_is_missing_rather_than_guessed(rendered, cells):
    many = rendered[0][:300]
    noise = torch.randn(300, 3, cells, cells, generator=torch.Generator().manual_seed(2))
    images = F.interpolate(noise, 64, mode="bilinear") if cells < 64 else noise
    assert reader.score(images, many).mean() < 0.05
    assert all(item.shape == MISSING for scene in reader.read(images) for item in scene.items)


def test_half_drawn_objects_are_not_named():
    image = scenes.render([Scene((Item("circle", "red", "large", "center"),), "white")])
    image[:, :, 32:] = image[:, :, :1, :1]
    (scene,) = reader.read(image)
    assert scene.background == "white"
    assert scene.items[0].shape == MISSING
    assert scene.items[0].color == "red"


def test_an_empty_background_has_no_items():
    black = scenes.palette(scenes.BACKGROUNDS, torch.device("cpu"))[2]
    (scene,) = reader.read(black[None, :, None, None].expand(1, 3, 64, 64))
    assert scene == Scene((), "black")


def test_the_wrong_scene_scores_what_it_shares(rendered):
    many, images = (part[:500] for part in rendered)
    for image, scene in list(zip(images, many, strict=True))[:50]:
        for key, edited in scenes.edits(scene)[::7]:
            (values,) = reader.read_attributes(image[None], [edited])
            target = scenes.attributes(edited)
            wrong = [k for k in target if values[k] != target[k]]
            assert wrong == [key] or len(wrong) <= 1
    others = many[1:] + many[:1]
    assert 0.2 < reader.score(images, others).mean() < 0.5


def test_objects_are_matched_to_the_prompt_in_any_order():
    first = Item("circle", "red", "large", "left")
    second = Item("square", "green", "small", "right")
    mirrored = Scene((second, first), "blue")
    image = scenes.render([Scene((first, second), "blue")])
    assert reader.score(image, [mirrored]).item() == 1.0


def test_missing_and_surplus_objects_cost_the_count():
    one = Item("circle", "red", "large", "left")
    two = Item("square", "green", "small", "right")
    (values,) = reader.read_attributes(
        scenes.render([Scene((one,), "blue")]), [Scene((one, two), "blue")]
    )
    assert values["count"] == "1"
    assert values["second shape"] == values["second color"] == MISSING
    assert values["first shape"] == "circle"
    (values,) = reader.read_attributes(
        scenes.render([Scene((one, two), "blue")]), [Scene((one,), "blue")]
    )
    assert values["count"] == "2"
    assert values["shape"] == "circle"


@pytest.mark.parametrize(
    ("images", "error"),
    [
        (torch.zeros(3, 64, 64), ValueError),
        (torch.zeros(1, 3, 32, 32), ValueError),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError),
    ],
)
def test_other_images_are_refused(images, error):
    with pytest.raises(error, match="images must"):
        reader.read(images)


def test_a_scene_per_image_is_required():
    with pytest.raises(ValueError, match="one scene per image"):
        reader.score(torch.zeros(2, 3, 64, 64), [])


def test_reading_nothing_gives_nothing():
    assert reader.read(torch.zeros(0, 3, 64, 64)) == []
