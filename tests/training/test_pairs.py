"""What a record says: winner, label, ties, and values that cannot be."""

import io

import pytest
from PIL import Image

from inpo_fast.training.pairs import CorruptImage, DataError, Ties, pair_of
from tests.training import samples

ROW = {"jpg_0": b"first", "jpg_1": b"second", "label_0": 1, "caption": "a"}


@pytest.mark.parametrize("label", [1, 1.0, True])
def test_the_first_wins(label):
    pair = pair_of({**ROW, "label_0": label}, 7, Ties())
    assert pair == (b"first", b"second", "a", 1.0, 7)


@pytest.mark.parametrize("label", [0, 0.0, False])
def test_the_second_wins(label):
    assert pair_of({**ROW, "label_0": label}, 7, Ties()) == (b"second", b"first", "a", 1.0, 7)


def test_chosen_and_rejected():
    record = {"prompt": "a", "chosen": b"one", "rejected": b"two"}
    assert pair_of(record, 3, Ties("error")) == (b"one", b"two", "a", 1.0, 3)


def test_ties():
    tie = {**ROW, "label_0": 0.5}
    assert pair_of(tie, 0, Ties("drop")) is None
    assert pair_of(tie, 0, Ties("soft")) == (b"first", b"second", "a", 0.5, 0)
    with pytest.raises(
        DataError, match=r"row 9 is a tie .* choose ties='drop', 'random' or 'soft'"
    ):
        pair_of(tie, 9, Ties("error"))


def test_random_ties_depend_on_the_seed_and_the_row_only():
    tie = {**ROW, "label_0": 0.5}

    def winners(seed):
        pairs = [pair_of(tie, row, Ties("random", seed)) for row in range(400)]
        assert {pair.label for pair in pairs} == {1.0}
        assert all({pair.winner, pair.loser} == {b"first", b"second"} for pair in pairs)
        return [pair.winner == b"first" for pair in pairs]

    assert winners(0) == winners(0) != winners(1)
    # five standard deviations of a fair coin
    assert abs(sum(winners(0)) - 200) < 5 * 10


@pytest.mark.parametrize("label", [2, -1, 0.25, None, "1", float("nan")])
def test_other_labels_are_refused(label):
    with pytest.raises(DataError, match=rf"label_0 must be 0, 0.5 or 1, got {label!r} in row 5"):
        pair_of({**ROW, "label_0": label}, 5, Ties())


def test_images_in_every_form(tmp_path):
    data = samples.encoded(0)
    (tmp_path / "a.png").write_bytes(data)
    forms = [
        data,
        {"bytes": data, "path": None},
        {"bytes": data, "path": "nowhere.png"},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        tmp_path / "a.png",
    ]
    for form in forms:
        assert pair_of({**ROW, "jpg_0": form}, 0, Ties()).winner == data
    decoded = pair_of({**ROW, "jpg_0": samples.picture(0)}, 0, Ties()).winner
    assert Image.open(io.BytesIO(decoded)).tobytes() == samples.picture(0).tobytes()


@pytest.mark.parametrize(
    "value", [None, {"bytes": None, "path": None}, {"bytes": None, "path": "/gone"}]
)
def test_missing_images_are_corrupt(value):
    with pytest.raises(CorruptImage, match=r"jpg_1.*(is missing|No such file)"):
        pair_of({**ROW, "jpg_1": value}, 0, Ties())


def test_other_types_are_refused():
    with pytest.raises(DataError, match=r"jpg_0 must be bytes, .* got int in row 4"):
        pair_of({**ROW, "jpg_0": 3}, 4, Ties())
    with pytest.raises(DataError, match="caption must be text, got list in row 4"):
        pair_of({**ROW, "caption": ["a"]}, 4, Ties())
    assert pair_of({**ROW, "caption": None}, 4, Ties()).caption == ""


def test_digests_tell_pairs_apart():
    digest = pair_of(ROW, 0, Ties()).digest()
    assert len(digest) == 16 and pair_of(ROW, 5, Ties()).digest() == digest
    swapped = {**ROW, "jpg_0": b"second", "jpg_1": b"first", "label_0": 0}
    assert pair_of(swapped, 0, Ties()).digest() == digest
    others = [
        {"caption": "b"},
        {"label_0": 0},
        {"jpg_0": b"firsts"},
        {"jpg_0": b"firs", "jpg_1": b"tsecond"},
    ]
    assert len({pair_of({**ROW, **other}, 0, Ties()).digest() for other in others} | {digest}) == 5


def test_wrong_settings():
    with pytest.raises(ValueError, match=r"ties must be one of \('drop', .*, got 'keep'"):
        Ties("keep")
    with pytest.raises(ValueError, match="seed must not be negative, got -1"):
        Ties("random", -1)
