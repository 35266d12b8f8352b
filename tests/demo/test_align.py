"""Depth buckets, pairs and the two objectives' training loop."""

import itertools

import pytest
import torch

from inpo_fast.demo import align
from inpo_fast.demo.pipeline import DemoError
from inpo_fast.demo.preferences import Pairs, depth_buckets, load_pairs, plan
from inpo_fast.shipped import scenes
from inpo_fast.training import inversion_depth

BUCKETS = depth_buckets(1, 1000, 2)


@pytest.mark.parametrize(("first", "depth"), [(1, 1), (1, 3), (1, 10), (501, 4), (600, 2)])
def test_buckets_hold_every_timestep_at_its_depth(first, depth):
    buckets = depth_buckets(first, 1000, depth)
    assert list(itertools.chain(*(steps for _, steps in buckets))) == list(range(first, 1000))
    for bucket, timesteps in buckets:
        assert all(inversion_depth(t, 1000, depth) == bucket for t in timesteps)
    depths = [bucket for bucket, _ in buckets]
    assert depths == sorted(set(depths))
    assert depths[-1] == depth


def test_a_plan_covers_buckets_in_every_step_and_pairs_in_every_epoch():
    buckets = depth_buckets(1, 1000, 3)
    steps = plan(36, buckets, steps=9, pairs=4, seed=0)
    assert len(steps) == 9
    for step in steps:
        assert [micro.depth for micro in step] == [1, 2, 3]
        for micro, (_, timesteps) in zip(step, buckets, strict=True):
            assert len(micro.timesteps) == len(micro.chosen) == 4
            assert set(micro.timesteps) <= set(timesteps)
    chosen = torch.cat([micro.chosen for step in steps for micro in step])
    assert chosen.bincount().tolist() == [3] * 36
    for epoch in chosen.split(36):
        assert epoch.sort().values.tolist() == list(range(36))
    again = plan(36, buckets, steps=9, pairs=4, seed=0)
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


def train(tiny, pairs, objective, steps, advance=int):
    return align.train(tiny, pairs, objective, steps, warmup=0.1, seed=0, advance=advance)


@pytest.mark.parametrize("name", ["inpo", "diffusion-dpo"])
def test_training_changes_a_copy_and_repeats_to_the_bit(tiny, shipped, name):
    pairs = load_pairs(shipped / "preferences.parquet", tiny, wanted=12, seed=0)
    objective = align.Objective(name, beta=100, learning_rate=1e-3)
    before = {key: value.clone() for key, value in tiny.unet.state_dict().items()}
    batches = plan(12, BUCKETS, steps=3, pairs=2, seed=0)
    calls = []
    policies = [train(tiny, pairs, objective, batches, lambda: calls.append(1)) for _ in range(2)]
    assert len(calls) == 2 * 3
    (first, curve), (second, again) = policies
    assert curve == again
    assert len(curve.loss) == len(curve.accuracy) == 3
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
    _, curve = train(tiny, pairs, objective, plan(12, BUCKETS, steps=25, pairs=6, seed=0))
    assert sum(curve.loss[-5:]) / 5 < 0.6
    assert sum(curve.accuracy[-5:]) / 5 > 0.75


def test_objectives_train_on_the_same_batches(tiny, shipped, monkeypatch):
    seen = {}

    def record(_, pairs, objective, steps, **__):
        seen[objective.name] = (pairs, steps)
        return tiny.unet, align.Curve([0.0], [0.5])

    monkeypatch.setattr(align, "train", record)
    settings = align.Settings(steps=2, pairs=2, prompts=2, sample_steps=1)
    result = align.run(tiny, shipped / "preferences.parquet", settings, seed=0)
    assert seen["inpo"][0] is seen["diffusion-dpo"][0]
    assert seen["inpo"][1] is seen["diffusion-dpo"][1]
    # The stand-in returns the base itself, from the same noise.
    assert torch.equal(result.images["inpo"], result.images["base"])
    assert [row.gain for row in result.rows] == [0.0, 0.0]


def test_the_learning_rate_rises_and_falls():
    rates = [align.learning_rate(step, 20, 0.1) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.1
    assert align.learning_rate(0, 1, 0.1) == 1.0
