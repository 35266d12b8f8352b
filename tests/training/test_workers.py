"""Processes of a `DataLoader`."""

import os

import pytest
from torch.utils.data import DataLoader, Dataset

from inpo_fast.training.workers import worker_options

kept = []


class Tells:
    """Makes a folder where the interpreter that holds it is taken down."""

    def __init__(self, path):
        self.path, self.make = str(path), os.mkdir

    def __del__(self):
        self.make(self.path)


class Squares(Dataset):
    def __init__(self, path):
        self.path = path

    def __getitem__(self, index):
        if index == 0:
            kept.append(Tells(self.path))
        return index * index

    def __len__(self):
        return 4


def test_no_processes():
    assert worker_options(0) == {}


@pytest.mark.parametrize("at_once", [True, False])
def test_a_worker_does_not_take_its_interpreter_down(tmp_path, at_once):
    options = worker_options(1)
    if not at_once:  # the folder is there then
        del options["worker_init_fn"]
    loader = DataLoader(Squares(tmp_path / "told"), batch_size=None, **options)
    assert list(loader) == [0, 1, 4, 9]
    assert (tmp_path / "told").exists() is not at_once
