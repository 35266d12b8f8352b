"""The configuration: what it refuses, and the flags made from it."""

import argparse
import dataclasses
import sys

import pytest

from inpo_fast.cli import main
from inpo_fast.shipped import model_path
from inpo_fast.training.config import ConfigError, PreferenceConfig
from inpo_fast.training.optimization import check_schedule


def parsed(*flags):
    parser = argparse.ArgumentParser()
    PreferenceConfig.add_arguments(parser)
    arguments = parser.parse_args(["--pretrained_model_name_or_path", "model", *flags])
    return PreferenceConfig.from_arguments(arguments)


def test_flags_without_values_are_the_defaults():
    assert parsed() == PreferenceConfig(pretrained_model_name_or_path="model")


def test_flags_have_diffusers_names_and_types():
    config = parsed(
        *("--train_batch_size", "8", "--learning_rate", "1e-8", "--scale_lr"),
        *("--lora_target_modules", "to_k", "to_v", "--max_grad_norm", "inf"),
        *("--mixed_precision", "bf16", "--beta_dpo", "5000", "--validation_prompts", "a b", "c"),
        *("--rank", "8", "--lr_scheduler", "cosine", "--gradient_checkpointing"),
        *("--loss_type", "dpo", "--loss_options", "anchor=0.1"),
    )
    assert config == PreferenceConfig(
        pretrained_model_name_or_path="model",
        train_batch_size=8,
        learning_rate=1e-8,
        scale_lr=True,
        lora_target_modules=("to_k", "to_v"),
        max_grad_norm=float("inf"),
        mixed_precision="bf16",
        beta_dpo=5000.0,
        validation_prompts=("a b", "c"),
        rank=8,
        lr_scheduler="cosine",
        gradient_checkpointing=True,
        loss_type="dpo",
        loss_options=("anchor=0.1",),
    )


def test_every_field_has_a_flag_with_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(PreferenceConfig):
        assert f"--{field.name}" in shown
        assert len(field.metadata["help"]) > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, got 0"),
        ({"train_batch_size": 2.5}, "train_batch_size must be of type <class 'int'>, got 2.5"),
        ({"seed": True}, "seed must be of type"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\^32\), got 4294967296"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16, got 'fp8'"),
        ({"loss_type": "ppo"}, "loss_type must be one of inpo, .*got 'ppo'"),
        ({"latents": "magic"}, "latents must be one of q_sample, .*got 'magic'"),
        ({"proportion_empty_prompts": 1.5}, "proportion_empty_prompts must be in .0, 1., got 1.5"),
        ({"use_8bit_adam": True, "optimizer": "adafactor"}, "use_8bit_adam needs optimizer=adamw"),
        ({"ties": "soft", "loss_type": "ipo"}, "ties=soft needs a loss_type .*inpo, smpo, dpo"),
        ({"loss_type": "sft", "beta_dpo": 1.0}, "loss_type=sft has no beta_dpo"),
        ({"loss_type": "ipo", "beta_dpo": 0.0}, "loss_type=ipo: beta must be finite and positive"),
        (
            {"loss_type": "kto", "loss_options": ("desirable_weight",)},
            "loss_type=kto: loss_options must be NAME=VALUE with a NAME of desirable_weight, "
            "undesirable_weight, got 'desirable_weight'",
        ),
        (
            {"loss_type": "dmpo", "loss_options": ("snr=0.5",)},
            "loss_type=dmpo: .* with a NAME of alpha, got 'snr=0.5'",
        ),
        ({"loss_options": ("beta=3",)}, "loss_type=inpo: loss_options must be none, .*got"),
        (
            {"loss_type": "dmpo", "loss_options": ("alpha=.1", "alpha=.2")},
            "loss_options must have each NAME once, got 'alpha=.2'",
        ),
        (
            {"loss_type": "dmpo", "loss_options": ("alpha=few",)},
            "alpha of loss_options must be a number, got 'few'",
        ),
        (
            {"loss_type": "dmpo", "loss_options": ("alpha=1.5",)},
            r"loss_type=dmpo: alpha must be in \(0, 1\), got 1.5",
        ),
        (
            {"loss_type": "dspo", "loss_options": ("variant=xl",)},
            "loss_type=dspo: variant must be 'sd15' or 'sdxl', got 'xl'",
        ),
        ({"fused_layers": True, "compile": "blocks"}, "fused_layers needs compile=none"),
        ({"samples_per_inversion": 2, "latents": "q_sample"}, "samples_per_inversion must be 1"),
        ({"inversion_eta": 0.1, "latents": "bdia"}, "inversion_eta needs latents=ddim"),
        ({"lora_alpha": 4.0}, "lora_alpha and output_kohya_format need a rank"),
        ({"output_kohya_format": True}, "lora_alpha and output_kohya_format need a rank"),
        ({"report_to": "wandb", "hub_model_id": 3}, "hub_model_id must be of type"),
    ],
)
def test_a_setting_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceConfig(**change)


def test_settings_of_the_objective_are_those_of_its_script_for_the_model_or_given():
    sd, xl = "StableDiffusionPipeline", "StableDiffusionXLPipeline"

    def found(pipeline, loss, *options, beta=None):
        config = PreferenceConfig(loss_type=loss, beta_dpo=beta, loss_options=options)
        completed = config.for_model(pipeline)
        assert completed.for_model(sd) == completed and completed.beta_dpo is not None
        return completed.settings

    assert found(sd, "inpo") == {"beta": 2000.0} and found(xl, "inpo") == {"beta": 5000.0}
    assert found(xl, "inpo", beta=2000.0) == {"beta": 2000.0}
    assert found(xl, "dpo", "anchor=0.5") == {"beta": 5000.0, "anchor": 0.5}
    assert found(sd, "dspo") == {"beta": 0.001, "variant": "sd15"}
    assert found(xl, "dspo") == {"beta": 5000.0, "variant": "sdxl"}
    assert found(xl, "dspo", "variant=sd15") == {"beta": 0.001, "variant": "sd15"}
    assert found(sd, "dspo", "variant=sdxl") == {"beta": 5000.0, "variant": "sdxl"}
    given = {"beta": 0.002, "variant": "sd15"}
    assert found(xl, "dspo", "variant=sd15", beta=0.002) == given
    assert found(sd, "dmpo", "alpha=5e-2") == {"beta": 2000.0, "alpha": 0.05}
    assert PreferenceConfig(loss_type="sft").for_model(xl).settings == {}


def test_eight_bit_adam_says_what_to_install(monkeypatch):
    import torch

    from inpo_fast.training.optimization import make_optimizer

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        make_optimizer(PreferenceConfig(use_8bit_adam=True), [parameter], 1e-3)


@pytest.mark.parametrize(
    ("changes", "total", "rate"),
    [
        ({"lr_warmup_steps": 4}, 4, "75%"),
        ({"lr_warmup_steps": 100}, 2, "1%"),
        ({"lr_warmup_steps": 10, "lr_scheduler": "cosine"}, 5, "40%"),
        ({"lr_warmup_steps": 3}, 4, None),
        ({"lr_warmup_steps": 0}, 1, None),
        ({"lr_warmup_steps": 0, "lr_scheduler": "linear"}, 1, None),
        ({"lr_warmup_steps": 100, "lr_scheduler": "constant"}, 1, None),
        ({"lr_warmup_steps": 100}, None, None),
    ],
)
def test_a_run_that_ends_in_its_warmup_warns(changes, total, rate, recwarn):
    config = PreferenceConfig(**changes)
    check_schedule(config, total)
    said = [str(warning.message) for warning in recwarn]
    if rate is None:
        assert said == []
    else:
        (line,) = said
        assert line.startswith(f"lr_warmup_steps={config.lr_warmup_steps} is not over when the run")
        assert f"after {total} optimiser steps" in line and f"rises to {rate} of" in line


@pytest.mark.parametrize("lr_scheduler", ["constant_with_warmup", "linear", "cosine", "polynomial"])
def test_a_run_at_learning_rate_0_is_refused(lr_scheduler):
    config = PreferenceConfig(lr_warmup_steps=1, lr_scheduler=lr_scheduler)
    with pytest.raises(ConfigError, match="lr_warmup_steps=1 leaves a run of 1 optimiser steps"):
        check_schedule(config, 1)


def test_what_may_change_when_a_run_is_resumed():
    before = PreferenceConfig(validation_prompts=("a",)).to_dict()
    after = PreferenceConfig(logging_steps=3, checkpoints_total_limit=2, validation_prompts=("b",))
    assert after.differences(before) == []
    # more steps, unless the learning rate was made for so many
    assert PreferenceConfig(max_train_steps=9, num_train_epochs=2).differences(before) == []
    cosine = PreferenceConfig(lr_scheduler="cosine").to_dict()
    longer = PreferenceConfig(lr_scheduler="cosine", max_train_steps=9)
    assert longer.differences(cosine) == ["max_train_steps: the checkpoint has None, this run 9"]
    lines = PreferenceConfig(learning_rate=1e-3, rank=4).differences(before)
    assert lines == [
        "rank: the checkpoint has None, this run 4",
        "learning_rate: the checkpoint has 1e-05, this run 0.001",
    ]


def test_the_command_line_reports_an_error_in_one_line(capsys, tmp_path):
    status = main(
        ["train", "--pretrained_model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path)]
    )
    assert status == 1
    assert capsys.readouterr().err.startswith("inpo-fast train: pretrained_model_name_or_path")


def test_a_missing_column_is_named(capsys, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"jpg_0": [b""], "caption": ["a"]}), tmp_path / "pairs.parquet")
    status = main(
        [
            *("train", "--pretrained_model_name_or_path", str(model_path())),
            *("--dataset_name", str(tmp_path / "pairs.parquet"), "--output_dir", str(tmp_path)),
        ]
    )
    assert status == 1
    assert "missing: jpg_1, label_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", __file__], "output_dir must be a folder, and"),
        (["--output_dir", str(model_path())], "output_dir must not be the folder of a pipeline"),
        (["--lr_scheduler", "cosin"], "lr_scheduler must be one of linear, cosine"),
        (["--lr_scheduler", "piecewise_constant"], "lr_scheduler must be one of linear, cosine"),
        (["--max_train_steps", "1"], "lr_warmup_steps=100 leaves a run of 1 optimiser steps at a"),
        (["--report_to", "wandb"], "report_to=wandb needs wandb, which is not installed: pip inst"),
        (["--report_to", "all"], "report_to=all needs a tracker, which is not installed: pip inst"),
        (["--report_to", "wanda"], "mixed_precision or report_to cannot be: Unsupported logging"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
    flags, message, capsys, tmp_path, monkeypatch
):
    # no tracker is installed
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    given = ["--pretrained_model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path)]
    assert main(["train", *given, *flags]) == 1
    assert capsys.readouterr().err.startswith(f"inpo-fast train: {message}")
