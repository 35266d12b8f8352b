"""Decoding, buckets, crops and size conditioning, against diffusers and by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from inpo_fast.training.images import Preprocess, decode, to_unit
from inpo_fast.training.pairs import CorruptImage
from tests.training import samples


def gradient(height, width):
    """Red rises down, green rises across, so that a pixel says where it came from."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)
    return Image.fromarray(pixels)


def test_one_image_size_gets_the_bucket_that_diffusers_chooses():
    from diffusers.training_utils import find_nearest_bucket, parse_buckets_string

    written = "512,512;512,768;768,512; 1024, 1024 ;640,448"
    preprocess = Preprocess.of_flags(aspect_ratio_buckets=written)
    assert list(preprocess.buckets) == parse_buckets_string(written)
    generator = np.random.default_rng(0)
    for height, width in [(512, 512), (64, 64), *generator.integers(20, 2000, (300, 2)).tolist()]:
        # diffusers compares |h·w_b − w·h_b|, larger for a larger bucket of the same shape: the same
        # here, where both images of the pair have this size
        expected = find_nearest_bucket(height, width, preprocess.buckets)
        assert preprocess.bucket_of([(height, width)] * 2) == expected


def test_a_pair_of_two_shapes_gets_the_bucket_nearest_to_both():
    preprocess = Preprocess(((512, 512), (512, 768), (768, 512)))
    assert preprocess.bucket_of([(512, 768), (768, 512)]) == 0
    assert preprocess.bucket_of([(512, 768), (512, 700)]) == 1
    # a large image has no more say than a small one, and neither is first
    assert preprocess.bucket_of([(2000, 3000), (60, 80)]) == 1
    assert preprocess.bucket_of([(60, 80), (2000, 3000)]) == 1


def test_an_image_of_the_bucket_s_size_is_left_alone():
    image = samples.picture(0, (16, 24))
    view = samples.BUCKETS.view(image, 0, flipped=False)
    assert view.pixels.dtype == torch.uint8
    assert torch.equal(view.pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert view.time_ids.tolist() == [16, 24, 0, 0, 16, 24]
    flipped = samples.BUCKETS.view(image, 0, flipped=True)
    assert torch.equal(flipped.pixels, view.pixels.flip(2))


def test_the_crop_is_where_time_ids_say():
    preprocess = Preprocess(((16, 16),))
    # height decides the scale, 1: only columns are left over
    image = gradient(16, 45)
    for flipped in (False, True):
        for place, left in [(None, 14), ((0.0, 0.0), 0), ((0.5, 0.5), 15), ((0.0, 0.999), 29)]:
            view = preprocess.view(image, 0, flipped=flipped, place=place)
            assert view.time_ids.tolist() == [16, 45, 0, left, 16, 16]
            columns = range(left, left + 16)
            expected = [44 - x if flipped else x for x in columns]
            assert view.pixels[1, 0].tolist() == expected
            assert view.pixels[0, :, 0].tolist() == list(range(16))


def test_scaling_covers_the_bucket_and_keeps_the_shape():
    preprocess = Preprocess(((32, 16),))
    view = preprocess.view(gradient(200, 150), 0, flipped=False)
    # 32/200 > 16/150: scaled to 32 × 24, 4 columns cut on either side
    assert view.time_ids.tolist() == [200, 150, 0, 4, 32, 16]
    columns = view.pixels[1, 16].float()
    scaled = (torch.arange(16) + 4 + 0.5) * 150 / 24 - 0.5
    # bilinear scaling keeps a ramp a ramp; one for rounding to whole levels
    assert (columns - scaled).abs().max() <= 1
    small = preprocess.view(gradient(5, 40), 0, flipped=False)
    assert small.pixels.shape == (3, 32, 16) and small.time_ids[3] == 120


def test_random_places_are_uniform():
    preprocess = Preprocess(((16, 16),))
    counts = np.zeros(5)
    for at in np.linspace(0, 1, 1000, endpoint=False):
        view = preprocess.view(gradient(20, 16), 0, flipped=False, place=(at, at))
        counts[view.time_ids[2]] += 1
    assert counts.tolist() == [200] * 5


def test_to_unit():
    values = to_unit(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert values.tolist() == [-1.0, 1.0, pytest.approx(-0.6, abs=1e-7)]


def test_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    buffer = io.BytesIO()
    gradient(16, 24).save(buffer, format="PNG", exif=exif)
    image = decode(buffer.getvalue())
    assert image.size == (16, 24)
    assert image.getpixel((15, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_other_modes_become_rgb(mode):
    buffer = io.BytesIO()
    kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
    Image.new(mode, (3, 2)).save(buffer, format=kind)
    image = decode(buffer.getvalue())
    assert image.mode == "RGB" and image.size == (3, 2)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_every_truncation_is_corrupt_and_nothing_else_is_raised(kind):
    whole = samples.encoded(0, (40, 40), kind)
    assert decode(whole).size == (40, 40)
    for length in range(0, len(whole) // 2, max(1, len(whole) // 60)):
        with pytest.raises(CorruptImage):
            decode(whole[:length])


def test_garbage_is_corrupt_or_an_image():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = np.frombuffer(samples.encoded(0, (20, 20), kind), dtype=np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[generator.integers(0, len(whole), 8)] = generator.integers(0, 256, 8)
            try:
                assert decode(broken.tobytes()).mode == "RGB"
            except CorruptImage as error:
                assert str(error)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resolution": 100}, "resolution must be a positive multiple of 8, got 100"),
        ({}, "resolution must be a positive multiple of 8, got None"),
        ({"resolution": 0}, "resolution must be a positive multiple of 8, got 0"),
        ({"aspect_ratio_buckets": ""}, "must be written h,w;h,w, got ''"),
        ({"aspect_ratio_buckets": "64x64"}, "must be written h,w;h,w, got '64x64'"),
        ({"aspect_ratio_buckets": "64,64;"}, "must be written h,w;h,w"),
        ({"aspect_ratio_buckets": "64,60"}, "positive multiples of 8, got 64,60"),
        ({"aspect_ratio_buckets": "64,64;64,64"}, "buckets must differ"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        Preprocess.of_flags(**flags)


def test_flags():
    got = Preprocess.of_flags(resolution=512)
    assert got == Preprocess(((512, 512),), random_crop=False, flip=True)
    got = Preprocess.of_flags(resolution=64, random_crop=True, no_hflip=True)
    assert got == Preprocess(((64, 64),), random_crop=True, flip=False)
    with pytest.raises(ValueError, match="buckets must hold at least one size"):
        Preprocess(())
