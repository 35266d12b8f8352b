"""Depth buckets, pairs and the two objectives' training loop."""

import itertools

import pytest
import torch

from inpo_fast.demo import align
from inpo_fast.demo.pipeline import DemoError
from inpo_fast.demo.preferences import Pairs, depth_buckets, load_pairs, plan
from inpo_fast.shipped import scenes
from inpo_fast.training.latents import inversion_depth

SETTINGS = align.Settings(steps=3, pairs=2, depths=2, prompts=2, sample_steps=2)


@pytest.mark.parametrize("depths", [1, 3, 4, 10])
def test_buckets_hold_every_timestep_at_its_depth(depths):
    buckets = depth_buckets(1000, depths)
    assert sorted(itertools.chain(*buckets)) == list(range(1, 1000))
    for depth, bucket in enumerate(buckets, start=1):
        assert all(inversion_depth(t, 1000, depths) == depth for t in bucket)
    sizes = [len(bucket) for bucket in buckets]
    assert max(sizes) - min(sizes) <= 1


def test_a_plan_covers_depths_in_every_step_and_pairs_in_every_epoch():
    options = {"steps": 9, "pairs": 4, "depths": 3, "num_train_timesteps": 1000}
    steps = plan(36, **options, seed=0)
    buckets = depth_buckets(1000, 3)
    assert len(steps) == 9
    for step in steps:
        assert [micro.depth for micro in step] == [1, 2, 3]
        for micro in step:
            assert len(micro.timesteps) == len(micro.chosen) == 4
            assert set(micro.timesteps) <= set(buckets[micro.depth - 1])
    chosen = torch.cat([micro.chosen for step in steps for micro in step])
    assert chosen.bincount().tolist() == [3] * 36
    for epoch in chosen.split(36):
        assert epoch.sort().values.tolist() == list(range(36))
    again = plan(36, **options, seed=0)
    assert [m.timesteps for s in again for m in s] == [m.timesteps for s in steps for m in s]


def test_pairs_put_the_preferred_image_first_and_leave_ties_out(tiny, shipped):
    pairs = load_pairs(shipped / "preferences.parquet", tiny, wanted=100, seed=0)
    assert len(pairs.winners) == len(pairs.losers) == len(pairs.text) == 12
    # The fixture's winners show their caption's scene; JPEG moves the latents a little.
    chosen = scenes.sample_scenes(13, torch.Generator().manual_seed(0))[:12]
    latents = tiny.encode(scenes.render(chosen))
    text = tiny.embed([scenes.prompt(scene) for scene in chosen])
    for winner, loser, words in zip(*pairs, strict=True):
        index = (text - words).abs().amax(dim=(1, 2)).argmin()
        distances = (latents - winner).flatten(1).norm(dim=1)
        assert distances.argmin() == index
        assert (latents - loser).flatten(1).norm(dim=1).argmin() == (index + 1) % 12


def test_fewer_pairs_on_request(tiny, shipped):
    assert len(load_pairs(shipped / "preferences.parquet", tiny, wanted=5, seed=0).text) == 5


@pytest.mark.parametrize("content", [None, b"not parquet"])
def test_pairs_that_cannot_be_read(tiny, tmp_path, content):
    path = tmp_path / "preferences.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DemoError, match="no preference pairs can be read from"):
        load_pairs(path, tiny, wanted=1, seed=0)


@pytest.mark.parametrize("name", ["inpo", "diffusion-dpo"])
def test_training_changes_a_copy_and_repeats_to_the_bit(tiny, shipped, name):
    pairs = load_pairs(shipped / "preferences.parquet", tiny, wanted=12, seed=0)
    objective = align.Objective(name, beta=100, learning_rate=1e-3)
    before = {key: value.clone() for key, value in tiny.unet.state_dict().items()}
    steps = []
    policies = [
        align.train(tiny, pairs, objective, SETTINGS, seed=0, advance=lambda: steps.append(1))
        for _ in range(2)
    ]
    assert len(steps) == 2 * SETTINGS.steps
    (first, curve), (second, again) = policies
    assert curve == again
    assert len(curve.loss) == len(curve.accuracy) == SETTINGS.steps
    # The policy starts as the reference: every logit is 0.
    assert curve.loss[0] == pytest.approx(0.693147, abs=1e-6)
    assert curve.accuracy[0] == 0.5
    reference = tiny.unet.state_dict()
    assert all(torch.equal(before[key], reference[key]) for key in before)
    changed = first.state_dict()
    assert any(not torch.equal(before[key], changed[key]) for key in before)
    assert all(torch.equal(changed[k], v) for k, v in second.state_dict().items())


@pytest.mark.parametrize("name", ["inpo", "diffusion-dpo"])
def test_training_learns_what_tells_winners_from_losers(tiny, name):
    generator = torch.Generator().manual_seed(0)
    bright = 1 + 0.1 * torch.randn(12, 4, 8, 8, generator=generator)
    pairs = Pairs(bright, -bright, tiny.embed(["a large red circle"] * 12))
    objective = align.Objective(name, beta=100, learning_rate=2e-3)
    settings = align.Settings(steps=25, pairs=6, depths=2)
    _, curve = align.train(tiny, pairs, objective, settings, seed=0, advance=int)
    assert sum(curve.loss[-5:]) / 5 < 0.6
    assert sum(curve.accuracy[-5:]) / 5 > 0.75


def test_the_learning_rate_rises_and_falls():
    settings = align.Settings(steps=20, warmup=0.1)
    rates = [align.learning_rate(step, settings) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert align.learning_rate(0, align.Settings(steps=1)) == 1.0
