"""Training on a GPU: exact at the start, without waiting, and with the same bits after a resume."""

import contextlib
import math
import re
import shutil

import pytest
import torch

pytest.importorskip("accelerate")

from inpo_fast.shipped import load_pipeline, model_path, preferences_path
from inpo_fast.training.optimization import TrainingError
from inpo_fast.training.trainer import PreferenceTrainer
from tests.gpu.trainings import (
    assert_resumed_run_is_whole,
    assert_same_bits,
    assert_steps_do_not_wait,
    poisoned,
    trainer,
    without_measuring,
)
from tests.training import tiny


@pytest.fixture(autouse=True)
def quick(cuda, request, monkeypatch):
    if request.function is not test_the_share_of_the_peak_is_reported:
        without_measuring(monkeypatch)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "no"])
def test_the_policy_starts_as_the_reference(model, tmp_path, precision, rank):
    run = trainer(model, tmp_path, mixed_precision=precision, rank=rank, max_train_steps=1)
    (first,) = run.train()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert first["policy_winner"] == first["reference_winner"] > 0
    assert first["policy_loser"] == first["reference_loser"] > 0


STEPS = {
    "full": {},
    "lora": {"rank": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "float16": {"mixed_precision": "fp16"},
    "average": {"use_ema": True},
    "several levels": {"samples_per_inversion": 2},
    "official": {"latents": "official", "mixed_precision": "fp16"},
    "renoise": {"latents": "renoise", "inversion_eta": 0.1},
    "bdia": {"latents": "bdia"},
    "soft ties": {"ties": "soft"},
    "kto": {"loss_type": "kto", "latents": "q_sample"},
    "dspo": {"loss_type": "dspo", "beta_dpo": 1.0},
    "mapo": {"loss_type": "mapo"},
    "sft": {"loss_type": "sft"},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_does_not_wait_for_the_device(model, tmp_path, no_sync, case):
    run = trainer(model, tmp_path, gradient_accumulation_steps=2, **STEPS[case])
    assert_steps_do_not_wait(run, no_sync)


def test_the_next_batch_does_not_wait_for_the_device(model, tmp_path, no_sync):
    run = trainer(model, tmp_path)
    here, there = (run.data.loader(run.order, device=d) for d in ("cpu", run.accelerator.device))
    next(here), next(there)
    with no_sync():
        fetched = [next(there) for _ in range(6)]
    for batch in fetched:
        expected = next(here)
        assert batch.latents.device.type == run.accelerator.device.type
        assert torch.equal(batch.latents.cpu(), expected.latents)
        assert torch.equal(batch.label.cpu(), expected.label)
        assert_same_bits({k: v.cpu() for k, v in batch.text.items()}, expected.text)


def test_float16_finds_its_loss_scale_and_keeps_it(model, tmp_path):
    settings = {
        "mixed_precision": "fp16",
        "loss_type": "dpo",
        "beta_dpo": 1.0,
        "max_train_steps": 8,
        "checkpointing_steps": 5,
    }
    whole = trainer(model, tmp_path / "whole", **settings)
    poisoned(whole, 3)
    history = whole.train()
    assert [row["step"] for row in history if not math.isfinite(row["loss"])] == [4]
    skipped = [0, *(row["skipped_steps"] for row in history)]
    assert skipped[4] == skipped[3] + 1
    # the last steps are taken: the scale has been found
    assert skipped[8] == skipped[6] and skipped[8] < 6
    scale = whole.accelerator.scaler.get_scale()
    # it starts at 2^16, halves at every step that is left out, and grows after 2,000 others
    assert scale == 2.0**16 / 2 ** skipped[8]
    start = trainer(model, tmp_path / "start", **settings).policy.state_dict()
    weights = whole.policy.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in weights.items())

    checkpoint = "checkpoint-5"
    kept = torch.load(tmp_path / "whole" / checkpoint / "scaler.pt", weights_only=True)
    assert kept["scale"] == 2.0**16 / 2 ** skipped[5]
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / checkpoint, tmp_path / "resumed" / checkpoint)
    resumed = trainer(model, tmp_path / "resumed", resume_from_checkpoint="latest", **settings)
    assert resumed.accelerator.scaler.get_scale() == kept["scale"]
    again = resumed.train()
    assert [row["skipped_steps"] for row in again] == skipped[6:]
    assert resumed.accelerator.scaler.get_scale() == scale
    assert_same_bits(resumed.policy.state_dict(), weights)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_loss_that_is_not_finite_skips_its_step(model, tmp_path, optimizer):
    run = trainer(model, tmp_path, optimizer=optimizer)
    poisoned(run, 1)
    after = []
    run.learner.meter.add = _recording(run, after)
    history = run.train()
    assert [row["skipped_steps"] for row in history] == [0, 1, 1]
    assert math.isnan(history[1]["loss"])
    assert_same_bits(after[1], after[0])
    assert any(not torch.equal(after[2][name], value) for name, value in after[1].items())


def _recording(run, after):
    """The meter's `add`, which takes the weights too when it is given the norm of a step."""
    add = run.learner.meter.add

    def recording(values):
        if "grad_norm" in values:
            after.append({k: v.clone() for k, v in run.policy.state_dict().items()})
        add(values)

    return recording


RESUMED = {
    "full adamw": {"use_ema": True},
    "full adafactor": {"optimizer": "adafactor", "learning_rate": 1e-4},
    "lora adamw": {"rank": 2, "gradient_checkpointing": True},
    "lora adafactor": {"rank": 2, "optimizer": "adafactor"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(model, tmp_path, case):
    assert_resumed_run_is_whole(model, tmp_path, **RESUMED[case])


def test_too_little_memory_says_what_to_lower(model, tmp_path):
    # activations of 64 MiB a layer, and no segment of the allocator has such a hole
    data = tiny.pairs(64, size=64)
    run = trainer(model, tmp_path, data, mixed_precision="no", train_batch_size=64)
    with _no_more_memory(), pytest.raises(TrainingError) as caught:
        run.train()
    message = str(caught.value)
    assert message.startswith("too little memory: lower train_batch_size (64)")
    for remedy in ("gradient_checkpointing", "mixed_precision=bf16", "a LoRA", "use_8bit_adam"):
        assert remedy in message
    del run, caught
    # nothing is broken for the next one
    assert len(trainer(model, tmp_path / "after").train()) == 3


def test_the_share_of_the_peak_is_reported(model, tmp_path):
    history = trainer(model, tmp_path).train()
    assert all(0 < row["mfu"] < 1 and row["samples_per_second"] > 0 for row in history)


@pytest.mark.parametrize("rank", [None, 2])
def test_images_are_encoded_and_validated_while_training(tmp_path, rank):
    """On the shipped pipeline, whose encoders and images go to the GPU and come back."""
    config = tiny.config(
        *(model_path(), tmp_path),
        dataset_name=str(preferences_path()),
        max_train_samples=4,
        rank=rank,
        mixed_precision="bf16",
        inversion_steps=2,
        dataloader_num_workers=0,
        validation_prompts=("a large red circle",),
        validation_inference_steps=2,
        validation_steps=2,
    )
    run = PreferenceTrainer(config)
    first, *others = run.train()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["accuracy"] == 0.5
    assert others[-1]["margin_mean"] != 0
    assert {p.device.type for p in run.policy.parameters()} == {run.accelerator.device.type}
    pipe = load_pipeline()
    if rank is None:
        pipe.register_modules(unet=type(pipe.unet).from_pretrained(tmp_path, subfolder="unet"))
    else:
        pipe.load_lora_weights(tmp_path)
    mine = run.policy.state_dict()
    for name, value in pipe.unet.state_dict().items():
        name = re.sub(r"\.(lora_[AB])\.\w+\.", r".\1.default.", name)
        # frozen weights were rounded
        theirs = value.to(mine[name].dtype)
        assert torch.equal(mine[name].cpu(), theirs), name


@contextlib.contextmanager
def _no_more_memory():
    """The allocator may not take more from the device than it holds."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
