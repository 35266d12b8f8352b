"""The marginal of t is exactly uniform: all outcomes of the generator are enumerated."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from inpo_fast.training import TimestepSampler, even_grid, inversion_depth


class Scripted:
    """Stands in for torch's random functions and returns what it was told."""

    def __init__(self, monkeypatch):
        self.integers, self.order = [], []
        monkeypatch.setattr(torch, "randint", lambda high, shape, generator: self.integers.pop(0))
        monkeypatch.setattr(torch, "randperm", lambda n, generator: self.order.pop(0))


@pytest.mark.parametrize(
    ("total", "steps", "first"), [(1000, 10, 0), (40, 7, 0), (50, 3, 11), (12, 12, 0), (9, 1, 4)]
)
def test_t_is_exactly_uniform(monkeypatch, total, steps, first):
    sampler = TimestepSampler(total, steps, first_timestep=first)
    buckets = Counter(inversion_depth(t, total, steps) for t in range(first, total))
    scripted, probability = Scripted(monkeypatch), Counter()
    count = total - first
    depths = []
    for place in range(count):
        # the bucket that this place falls into has some size: give it every offset at once
        ends = itertools.accumulate(buckets.values())
        size = next(s for end, s in zip(ends, buckets.values(), strict=True) if place < end)
        scripted.integers = [torch.tensor([place]), torch.arange(size)]
        draw = sampler.draw(size)
        depths.append(len(draw.grid))
        for t in draw.grid[-1].tolist():
            probability[t] += Fraction(1, count * size)
            assert inversion_depth(t, total, steps) == len(draw.grid)
        assert draw.train_at == (len(draw.grid),)
    assert probability == dict.fromkeys(range(first, total), Fraction(1, count))
    assert sampler.mean_calls == pytest.approx(np.mean(depths))


@pytest.mark.parametrize(
    ("total", "steps", "first", "samples"),
    [(40, 4, 0, 2), (40, 4, 0, 4), (50, 5, 20, 2), (50, 5, 0, 3)],
)
def test_t_is_exactly_uniform_for_every_sample_of_an_inversion(
    monkeypatch, total, steps, first, samples
):
    sampler = TimestepSampler(total, steps, samples_per_inversion=samples, first_timestep=first)
    depths = range(inversion_depth(first, total, steps), steps + 1)
    size = total // steps
    scripted, probability, ends = Scripted(monkeypatch), Counter(), []
    orders = list(itertools.permutations(range(len(depths))))
    for order in orders:
        scripted.order, scripted.integers = [torch.tensor(order)], [torch.arange(size)]
        draw = sampler.draw(size)
        assert len(draw.train_at) == samples and draw.train_at[-1] == len(draw.grid)
        assert set(draw.train_at) == {depths[index] for index in order[:samples]}
        ends.append(len(draw.grid))
        for node in draw.train_at:
            for t in draw.grid[node - 1].tolist():
                probability[t] += Fraction(1, len(orders) * samples * size)
                assert inversion_depth(t, total, steps) == node
    assert probability == dict.fromkeys(range(first, total), Fraction(1, total - first))
    assert sampler.mean_calls == pytest.approx(np.mean(ends))


@pytest.mark.parametrize("samples", [1, 3, 10])
def test_grids_of_a_real_generator(samples):
    sampler = TimestepSampler(samples_per_inversion=samples)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(200):
        draw = sampler.draw(16, generator)
        assert draw.grid.shape == (draw.train_at[-1], 16) and draw.grid.dtype == np.int64
        assert (np.diff(draw.grid, axis=0) == 100).all()
        assert (draw.grid[0] >= 0).all() and (draw.grid[0] < 100).all()
        seen.append(draw.grid[[node - 1 for node in draw.train_at]].ravel())
    # each pair has its own t
    assert len(set(draw.grid[-1].tolist())) > 8
    counts = np.bincount(np.concatenate(seen) // 100, minlength=10)
    expected = 200 * 16 * samples / 10
    # micro-batches share their bucket: 200 independent draws, six standard errors
    error = 6 * (200 * 0.1 * 0.9) ** 0.5 * 16 * samples**0.5
    assert (np.abs(counts - expected) <= error).all()
    first = sampler.draw(4, torch.Generator().manual_seed(5))
    again = sampler.draw(4, torch.Generator().manual_seed(5))
    assert (first.grid == again.grid).all() and first.train_at == again.train_at


def test_grids_whose_steps_are_no_integers():
    sampler = TimestepSampler(1000, 7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        grid = sampler.draw(64, generator).grid
        assert (grid >= 0).all() and set(np.diff(grid, axis=0).ravel()) <= {142, 143}


def test_an_even_grid_ends_at_t_and_takes_every_level_at_most_once():
    for t in range(60):
        for steps in range(1, min(t + 1, 12) + 1):
            grid = even_grid([t], steps)[:, 0]
            assert grid[-1] == t and len(set(grid.tolist())) == steps and grid[0] >= 0
            # nodes are levels counted from 1, equally far apart up to rounding
            assert np.abs(np.diff([-1, *grid]) - (t + 1) / steps).max() <= 1
    assert even_grid([999, 99], 10).T.tolist() == [
        [99, 199, 299, 399, 499, 599, 699, 799, 899, 999],
        [9, 19, 29, 39, 49, 59, 69, 79, 89, 99],
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be in 1 … 1000, got 0"),
        ({"max_steps": 1001}, "max_steps must be in 1 … 1000, got 1001"),
        ({"first_timestep": 1000}, "first_timestep must be in 0 … 999, got 1000"),
        ({"samples_per_inversion": 0}, "samples_per_inversion must be in 1 … 10"),
        ({"samples_per_inversion": 11}, "samples_per_inversion must be in 1 … 10"),
        (
            {"samples_per_inversion": 2, "max_steps": 7},
            "samples_per_inversion > 1 needs buckets of one size",
        ),
        (
            {"samples_per_inversion": 2, "first_timestep": 450},
            "first_timestep must begin a bucket, got 10, 1000 and 450",
        ),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TimestepSampler(**options)


def test_an_empty_draw():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        TimestepSampler().draw(0)
