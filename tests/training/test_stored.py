"""Batches of encoded pairs in memory: layout, sampling and what the draws depend on."""

import gc
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from inpo_fast.training import DataError, MemoryPairs, Scaling

N, SHAPE = 10, (2, 4, 3, 2)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pairs(**change):
    settings = {
        "mean": normal(0, N, *SHAPE),
        "std": normal(1, N, *SHAPE).abs(),
        "text": {"prompt_embeds": normal(2, N, 5, 6), "pooled_prompt_embeds": normal(3, N, 6)},
        "empty_text": {"prompt_embeds": torch.zeros(5, 6), "pooled_prompt_embeds": torch.ones(6)},
        "time_ids": torch.arange(N * 12).reshape(N, 2, 6),
        "label": torch.linspace(0.5, 1, N),
        "scaling": Scaling(torch.full((4,), 0.5), torch.full((4,), 2.0)),
        **change,
    }
    return MemoryPairs(settings.pop("mean"), settings.pop("std"), settings.pop("text"), **settings)


def take(data, steps, *, batch_size=4, seed=0, start=0, **options):
    order = data.order(batch_size=batch_size, seed=seed, last="pad")
    return list(itertools.islice(data.loader(order, start=start, **options), steps))


def equal(one, other):
    return (
        torch.equal(one.latents, other.latents)
        and all(torch.equal(one.text[name], other.text[name]) for name in one.text)
        and torch.equal(one.time_ids, other.time_ids)
        and torch.equal(one.label, other.label)
        and torch.equal(one.index, other.index)
        and one.epoch == other.epoch
    )


def test_winners_come_first_and_pairs_stay_together():
    data = pairs(std=None)
    (batch,) = take(data, 1)
    mean, text = normal(0, N, *SHAPE), normal(2, N, 5, 6)
    assert len(batch) == 4
    assert batch.latents.dtype == torch.float32 and batch.label.dtype == torch.float32
    for place, index in enumerate(batch.index.tolist()):
        for side in (0, 1):
            row = side * 4 + place
            assert torch.equal(batch.latents[row], (mean[index, side] - 0.5) * 2)
            assert batch.time_ids[row].tolist() == [12 * index + 6 * side + i for i in range(6)]
            assert torch.equal(batch.paired_text["prompt_embeds"][row], text[index])
        assert torch.equal(batch.text["prompt_embeds"][place], text[index])
        assert batch.label[place] == torch.linspace(0.5, 1, N)[index]


def test_without_deviations_a_batch_is_that_of_zeros():
    zeros = pairs(std=torch.zeros(N, *SHAPE))
    for one, other in zip(take(pairs(std=None), 6), take(zeros, 6), strict=True):
        assert equal(one, other)


def test_the_posterior_is_sampled_anew_in_every_epoch():
    # one pair, one batch an epoch: 400 draws of every element
    data = pairs(
        **{
            name: (value[:1] if isinstance(value, torch.Tensor) else value)
            for name, value in {
                "mean": normal(0, N, *SHAPE),
                "std": normal(1, N, *SHAPE).abs(),
                "time_ids": None,
                "label": None,
            }.items()
        },
        text={"prompt_embeds": normal(2, 1, 5, 6)},
        empty_text=None,
    )
    batches = take(data, 400, batch_size=1)
    drawn = torch.stack([batch.latents for batch in batches]) / 2 + 0.5
    noise = (drawn - normal(0, N, *SHAPE)[0]) / normal(1, N, *SHAPE).abs()[0]
    assert [batch.epoch for batch in batches] == list(range(400))
    # mean and deviation of 400·48 standard normals: five standard errors
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    # winner and loser have noise of their own
    winners, losers = noise[:, 0].flatten(), noise[:, 1].flatten()
    assert abs((winners * losers).mean()) < 5 / len(winners) ** 0.5


def test_a_step_is_the_same_from_wherever_it_is_reached():
    data = pairs()
    told = take(data, 9, proportion_empty_prompts=0.5)
    resumed = take(data, 4, start=5, proportion_empty_prompts=0.5)
    assert all(equal(a, b) for a, b in zip(resumed, told[5:], strict=True))
    other = take(data, 1, seed=1)[0]
    assert not torch.equal(other.latents, told[0].latents)


def test_a_pair_gets_the_same_draws_in_any_batch():
    data = pairs()
    by_index = {}
    for size in (1, 3, 5):
        for batch in take(data, -(-N // size), batch_size=size):
            for place, index in enumerate(batch.index.tolist()):
                latents = batch.latents[[place, size + place]]
                assert torch.equal(by_index.setdefault(index, latents), latents)
    assert sorted(by_index) == list(range(N))


def test_captions_are_dropped_at_the_stated_rate():
    data = pairs()
    batches = take(data, 300, proportion_empty_prompts=0.2)
    zero = torch.cat([batch.text["prompt_embeds"] == 0 for batch in batches]).all((1, 2))
    one = torch.cat([batch.text["pooled_prompt_embeds"] == 1 for batch in batches]).all(1)
    assert torch.equal(zero, one)
    # 1200 pairs (the pads of an epoch repeat a draw): five standard errors of 1000 draws
    assert abs(zero.float().mean() - 0.2) < 5 * (0.2 * 0.8 / 1000) ** 0.5
    assert not any((b.text["prompt_embeds"] == 0).all((1, 2)).any() for b in take(data, 50))


def test_two_spawned_workers_give_the_same_batches():
    data = pairs()
    here = take(data, 6)
    there = take(data, 6, num_workers=2)
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))


def test_to_keeps_every_field():
    (batch,) = take(pairs(), 1)
    assert equal(batch.to("cpu"), batch)
    assert batch.to("meta").latents.device.type == "meta"
    assert batch.to("meta").time_ids.device.type == "meta"


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 0.18215, "shift_factor": None}, 0.0, 0.18215),
        ({"scaling_factor": 1.5, "shift_factor": 0.06}, 0.06, 1.5),
        (
            {"scaling_factor": 0.5, "latents_mean": [-1.0, 2.0], "latents_std": [4.0, 8.0]},
            [-1.0, 2.0],
            [0.125, 0.0625],
        ),
    ],
)
def test_scaling_of_an_autoencoder(config, shift, scale):
    got = Scaling.of(SimpleNamespace(latent_channels=2, **config))
    assert torch.equal(got.shift, torch.tensor(shift).expand(2))
    assert torch.equal(got.scale, torch.tensor(scale).expand(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": normal(0, N, 3, 4, 3, 2)}, r"mean must have the shape \[N, 2, C, h, w\]"),
        ({"std": normal(0, N, 2, 4, 3, 3)}, "std must have the shape of mean"),
        ({"label": torch.ones(3)}, "label must have an entry for each of 10 pairs, got 3"),
        ({"label": torch.full((N,), 2.0)}, r"label must be probabilities, in \[0, 1\], got 2"),
        ({"label": torch.full((N,), float("nan"))}, r"label must be probabilities, .*got nan"),
        ({"empty_text": {}}, "empty_text must have the names of text"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        pairs(**change)


def test_dropping_captions_needs_the_empty_prompt():
    data = pairs(empty_text=None)
    with pytest.raises(ValueError, match="empty_text must be given where captions are dropped"):
        take(data, 1, proportion_empty_prompts=1.0)
    with pytest.raises(ValueError, match=r"proportion_empty_prompts must be in \[0, 1\], got 1.5"):
        take(data, 1, proportion_empty_prompts=1.5)


class Watched(MemoryPairs):
    """Counts the pairs that were read, and fails at one of them."""

    def __init__(self, *args, fail_at=None, **options):
        super().__init__(*args, **options)
        self.count, self.fail_at = 0, fail_at
        self.progress = threading.Condition()

    def read(self, position, **options):
        with self.progress:
            if self.count == self.fail_at:
                raise DataError("no such pair")
            self.count += 1
            self.progress.notify_all()
        return super().read(position, **options)


def watched(**options):
    return Watched(normal(0, 8, *SHAPE), None, {"prompt_embeds": normal(1, 8, 3)}, **options)


def threads():
    """Of loaders."""
    return {thread for thread in threading.enumerate() if "inpo-fast-batches" in thread.name}


def test_the_next_batch_is_made_while_one_is_used():
    data = watched()
    batches = data.loader(data.order(batch_size=2))
    next(batches)
    with data.progress:
        assert data.progress.wait_for(lambda: data.count == 4, timeout=60)
        # and no more than one
        assert not data.progress.wait_for(lambda: data.count > 4, timeout=0.2)


def test_an_error_comes_at_its_batch():
    data = watched(fail_at=3)
    batches = data.loader(data.order(batch_size=2))
    next(batches)
    with pytest.raises(DataError, match="no such pair"):
        next(batches)


def test_a_loader_that_is_closed_ends_its_thread():
    data = watched()
    others = threads()
    batches = data.loader(data.order(batch_size=2))
    next(batches)
    (thread,) = threads() - others
    del batches
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()
