"""What the tests of training on a GPU share."""

import math
import shutil

import torch

from inpo_fast.determinism import reproducible_training
from inpo_fast.training.batch import PairBatch
from inpo_fast.training.trainer import PreferenceTrainer
from tests.training import tiny

BLOCKS = {
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "norm_num_groups": 8,
    "attention_head_dim": 2,
}
"""Two heads of 16 channels, which the fused attention kernels take, and one resolution, so that
only three different blocks are compiled."""


def save_model(folder, **shape):
    """A pipeline folder with a UNet of this shape."""
    tiny.save_pipeline(folder)
    tiny.with_trained_norms(tiny.unet(**shape)).save_pretrained(folder / "unet")
    return folder


def without_measuring(monkeypatch):
    """Counting FLOPs and measuring the peak take longer than the trainings here."""
    monkeypatch.setattr("inpo_fast.training.step.count_flops", lambda _: (1, 2))
    monkeypatch.setattr("inpo_fast.training.trainer.measured_peak", lambda *_: 1.0)


def trainer(model, output, data=None, **changes):
    settings = {"mixed_precision": "bf16", "inversion_steps": 2, **changes}
    return PreferenceTrainer(tiny.config(model, output, **settings), dataset=data or tiny.pairs())


def poisoned(run, micro):
    """Let micro-batch number `micro` of the run have latents that are not finite."""
    healthy = run.data.loader

    def loader(order, *, start, **options):
        batches = healthy(order, start=start, **options)
        for number, batch in enumerate(batches, start):
            bad = batch.latents * float("nan") if number == micro else batch.latents
            yield PairBatch(bad, batch.text, None, batch.label, batch.index, batch.epoch)

    run.data.loader = loader


def assert_same_bits(mine, theirs):
    """Of nested state dicts."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert_same_bits(value, theirs[key])
    elif isinstance(mine, torch.Tensor):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    else:
        assert mine == theirs


def assert_steps_do_not_wait(run, no_sync):
    """Of a run that accumulates two micro-batches a step; `no_sync` is the fixture."""
    batches = run.data.loader(run.order, device=run.accelerator.device)
    fetched = [next(batches) for _ in range(10)]

    def step(number):
        for micro in (2 * number, 2 * number + 1):
            run.learner.learn(fetched[micro], micro, last=micro % 2 == 1)
        run.learner.meter.add({"grad_norm": run.stepper.step()})
        run.schedule.step()
        if run.ema is not None:
            run.ema.step(run.parameters)

    # the settings of `train`
    with reproducible_training():
        for number in range(2):
            step(number)
        with no_sync():
            for number in range(2, 5):
                step(number)
    values = run.learner.meter.read(lambda value: value)
    assert math.isfinite(values["loss"])
    # float16 leaves steps out while it looks for its loss scale
    assert run.stepper.check(limit=20) == 0 or run.accelerator.scaler is not None


def assert_resumed_run_is_whole(model, folder, **changes):
    """A run that is interrupted after two steps of five ends with the bits of one that is not."""
    settings = {
        "max_train_steps": 5,
        "checkpointing_steps": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        **changes,
    }
    whole = trainer(model, folder / "whole", **settings)
    logged = whole.train()
    (folder / "resumed").mkdir()
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "resumed" / "checkpoint-2")
    resumed = trainer(model, folder / "resumed", resume_from_checkpoint="latest", **settings)
    assert resumed.step == 2
    again = resumed.train()
    assert all(math.isfinite(row["loss"]) for row in logged)
    assert logged[-1]["margin_mean"] != 0
    for key in ("loss", "margin_mean", "grad_norm", "lr"):
        assert [row[key] for row in again] == [row[key] for row in logged[2:]], key
    assert_same_bits(resumed.policy.state_dict(), whole.policy.state_dict())
    mine, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert mine["state"]
    assert_same_bits(mine["state"], theirs["state"])
    if whole.ema is not None:
        shadow = dict(enumerate(resumed.ema.shadow_params))
        assert_same_bits(shadow, dict(enumerate(whole.ema.shadow_params)))
