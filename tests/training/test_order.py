"""The order of the pairs: complete, without repeats, sharded evenly, resumable anywhere."""

import itertools

import pytest

from inpo_fast.training.order import BatchOrder

BUCKETS = [0, 1, 0, 0, 1, 2, 0, 1, 1, 0, 0, 1, 2, 0, 0, 1, 0]  # 9, 6 and 2 pairs


def epoch_of(order, epoch):
    steps = order.steps_per_epoch
    return [order[epoch * steps + position] for position in range(steps)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_epoch_has_no_pair_twice_and_one_bucket_a_step(world_size, batch_size):
    ranks = [
        BatchOrder(BUCKETS, batch_size=batch_size, rank=rank, world_size=world_size, seed=3)
        for rank in range(world_size)
    ]
    size = batch_size * world_size
    expected = sum(BUCKETS.count(bucket) // size for bucket in {0, 1, 2})
    assert {order.steps_per_epoch for order in ranks} == {expected}
    for epoch in range(3):
        seen = []
        for batches in zip(*(epoch_of(order, epoch) for order in ranks), strict=True):
            picks = [pick for batch in batches for pick in batch]
            assert {len(batch) for batch in batches} == {batch_size}
            assert len({BUCKETS[pick.position] for pick in picks}) == 1
            assert {pick.epoch for pick in picks} == {epoch}
            seen += [pick.position for pick in picks]
        assert len(seen) == len(set(seen)) == len(BUCKETS) - ranks[0].left_out


def test_what_an_epoch_leaves_out_changes():
    order = BatchOrder(BUCKETS, batch_size=4)
    assert order.left_out == 1 + 2 + 2
    seen = {
        pick.position for epoch in range(12) for batch in epoch_of(order, epoch) for pick in batch
    }
    # the bucket of two pairs never fills a batch; every other pair gets its turn
    assert seen == {index for index, bucket in enumerate(BUCKETS) if bucket != 2}


def test_padding_repeats_pairs_of_the_same_bucket_only():
    order = BatchOrder(BUCKETS, batch_size=4, last="pad")
    assert order.left_out == 0 and order.steps_per_epoch == 3 + 2 + 1
    batches = epoch_of(order, 0)
    assert {len(batch) for batch in batches} == {4}
    assert all(len({BUCKETS[pick.position] for pick in batch}) == 1 for batch in batches)
    counts = [sum(pick.position == i for b in batches for pick in b) for i in range(len(BUCKETS))]
    assert min(counts) == 1 and sum(counts) == 24
    assert counts[5] == counts[12] == 2


def test_a_step_needs_no_history():
    order = BatchOrder(BUCKETS, batch_size=2, seed=1)
    told = list(itertools.islice(order.from_step(0), 40))
    again = BatchOrder(BUCKETS, batch_size=2, seed=1)
    assert again[33] == told[33]
    assert list(itertools.islice(again.from_step(17), 23)) == told[17:]


def test_seeds_and_epochs_differ():
    order = BatchOrder(BUCKETS, batch_size=2, seed=1)
    other = BatchOrder(BUCKETS, batch_size=2, seed=2)

    def indices(batches):
        return [[pick.position for pick in batch] for batch in batches]

    assert indices(epoch_of(order, 0)) != indices(epoch_of(other, 0))
    assert indices(epoch_of(order, 0)) != indices(epoch_of(order, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 10}, r"no bucket has the 10 pairs .* \[9, 6, 2\] pairs; lower batch_size"),
        ({"rank": 2, "world_size": 2}, "rank must be in 0 … 1, got 2"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"last": "keep"}, "last must be 'drop' or 'pad', got 'keep'"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        BatchOrder(BUCKETS, **{"batch_size": 2, **change})


def test_no_pairs():
    with pytest.raises(ValueError, match="no bucket has"):
        BatchOrder([], batch_size=1, last="pad")
