"""The pairs, and the two objectives' training."""

import pytest
import torch

from inpo_fast.demo import align
from inpo_fast.demo.pipeline import DemoError
from inpo_fast.demo.preferences import Pairs, load_pairs
from inpo_fast.shipped import scenes
from inpo_fast.training import draws
from inpo_fast.training.step import Learner


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


def train(tiny, data, objective, advance=int, **settings):
    settings = align.Settings(**{"first_timestep": 0, "max_depth": 2, **settings})
    return align.train(tiny, data, objective, settings, seed=0, advance=advance)


LOSSES = {"inpo": "inpo", "diffusion-dpo": "dpo"}


@pytest.mark.parametrize("name", LOSSES)
def test_training_changes_a_copy_and_repeats_to_the_bit(tiny, shipped, name):
    pairs = load_pairs(shipped / "preferences.parquet", tiny, wanted=12, seed=0)
    objective = align.Objective(name, LOSSES[name], beta=100, learning_rate=1e-3)
    before = {key: value.clone() for key, value in tiny.unet.state_dict().items()}
    calls = []
    policies = [
        train(tiny, pairs, objective, lambda: calls.append(1), steps=3, pairs=2) for _ in range(2)
    ]
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


@pytest.mark.parametrize("name", LOSSES)
def test_training_learns_what_tells_winners_from_losers(tiny, name):
    generator = torch.Generator().manual_seed(0)
    bright = 1 + 0.1 * torch.randn(12, 4, 8, 8, generator=generator)
    pairs = Pairs(bright, -bright, tiny.embed(["a large red circle"] * 12))
    objective = align.Objective(name, LOSSES[name], beta=100, learning_rate=2e-3)
    _, curve = train(tiny, pairs, objective, steps=25, pairs=6)
    assert sum(curve.loss[-5:]) / 5 < 0.6
    assert sum(curve.accuracy[-5:]) / 5 > 0.75


def test_objectives_see_the_same_pairs_at_the_same_timesteps(tiny, shipped, monkeypatch):
    seen = {}

    def record(self, batch, micro, *, last):
        draw = self.timesteps.draw(
            len(batch), draws.generator(draws.Purpose.TIMESTEP, self.config.seed, micro)
        )
        seen.setdefault(self.config.loss_type, []).append(
            (batch.index.tolist(), draw.grid[-1].tolist())
        )
        self.meter.add({"loss": torch.zeros(()), "accuracy": torch.zeros(())})

    monkeypatch.setattr(Learner, "learn", record)
    settings = align.Settings(steps=3, pairs=2, prompts=2, sample_steps=1)
    result = align.run(tiny, shipped / "preferences.parquet", settings, seed=0)
    assert len(seen["inpo"]) == 3
    assert seen["inpo"] == seen["dpo"]
    assert {t for _, timesteps in seen["inpo"] for t in timesteps} <= set(range(501, 1000))
    # Without a gradient the policy stays the base, which draws from the same noise.
    assert torch.equal(result.images["inpo"], result.images["base"])
    assert [row.gain for row in result.rows] == [0.0, 0.0]
