"""Every setting of a run reaches the place that it is for."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from inpo_fast.training.cache import _KEY
from inpo_fast.training.checkpoint import STATE
from inpo_fast.training.config import ConfigError
from inpo_fast.training.models import load_model
from inpo_fast.training.optimization import Stepper, make_optimizer
from inpo_fast.training.trainer import PreferenceTrainer
from inpo_fast.training.validation import _all_on, draw_images

from . import samples, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def uncounted(monkeypatch):
    monkeypatch.setattr("inpo_fast.training.step.count_flops", lambda _: (1, 2))


class Watched:
    """A training of one step, with what its models and its objective were given."""

    def __init__(self, model, output, data=None, **changes):
        config = tiny.config(model, output, **{"max_train_steps": 1, **changes})
        self.run = run = PreferenceTrainer(config, dataset=data or tiny.pairs())
        self.calls, self.losses, self.weights, self.settings = [], [], [], []
        predict, function = run.learner._predict, run.learner.objective.function
        backward = run.accelerator.backward

        def watched_predict(network, call, told):
            self.calls.append((call, told))
            return predict(network, call, told)

        def watched_function(*outputs, **settings):
            result = function(*outputs, **settings)
            self.losses.append(result.loss.item())
            self.settings.append((len(outputs[0]), settings))
            return result

        def watched_backward(loss, **options):
            self.weights.append(loss.item() / self.losses[-1])
            backward(loss, **options)

        run.learner._predict = watched_predict
        run.learner.objective = dataclasses.replace(
            run.learner.objective, function=watched_function
        )
        run.accelerator.backward = watched_backward
        self.batch = next(
            run.data.loader(run.order, proportion_empty_prompts=run.config.proportion_empty_prompts)
        )
        run.train()


@pytest.mark.parametrize("empty", [0.0, 1.0])
def test_text_and_sizes_of_both_images(tmp_path, empty):
    xl = tiny.save_pipeline(tmp_path / "xl", "StableDiffusionXLPipeline")
    data = tiny.pairs(xl=True)
    data._time_ids = torch.arange(data._time_ids.numel()).float().view_as(data._time_ids)
    seen = Watched(xl, tmp_path / "out", data, rank=2, proportion_empty_prompts=empty)
    batch = seen.batch
    assert len(batch.time_ids.unique()) == batch.time_ids.numel()
    assert (batch.text["prompt_embeds"] == 0).all() == bool(empty)
    for _, told in seen.calls:
        assert torch.equal(told.time_ids, batch.time_ids)
        for name, value in batch.paired_text.items():
            assert torch.equal(told.text[name], value)


def test_guidance_of_flux(tmp_path):
    flux = tiny.save_pipeline(tmp_path / "flux", "FluxPipeline")
    seen = Watched(flux, tmp_path / "out", rank=2, guidance_scale=2.25)
    assert {told.guidance for _, told in seen.calls} == {2.25}


@pytest.mark.parametrize(("beta", "expected"), [(None, 5000.0), (30.0, 30.0)])
def test_beta(model, tmp_path, beta, expected):
    seen = Watched(model, tmp_path, loss_type="dpo", beta_dpo=beta)
    assert [settings["beta"] for _, settings in seen.settings] == [expected]


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("dspo", {"variant": "sdxl"}),
        ("kto", {"desirable_weight": 0.25, "undesirable_weight": 2.0}),
        ("dmpo", {"alpha": 0.05}),
        ("mapo", {"snr": 0.25}),
        ("smpo", {"scale": 3.0}),
        ("dpo", {"anchor": 0.5}),
    ],
)
def test_other_settings_of_the_objective(model, tmp_path, loss, options):
    written = tuple(f"{name}={value}" for name, value in options.items())
    seen = Watched(model, tmp_path, loss_type=loss, loss_options=written, latents="q_sample")
    ((_, given),) = seen.settings
    assert {name: given[name] for name in options} == options
    for text in written:
        assert text in (tmp_path / "README.md").read_text()


def test_sdxl_has_the_settings_of_its_own_script(tmp_path):
    xl = tiny.save_pipeline(tmp_path / "xl", "StableDiffusionXLPipeline")
    options = {"rank": 2, "latents": "q_sample", "checkpointing_steps": 1}
    seen = Watched(xl, tmp_path / "out", tiny.pairs(xl=True), **options)
    assert [given["beta"] for _, given in seen.settings] == [5000.0]
    stored = json.loads((tmp_path / "out" / "checkpoint-1" / STATE).read_text())["config"]
    assert stored["beta_dpo"] == 5000.0


def test_sft_looks_at_winners_alone(model, tmp_path):
    seen = Watched(model, tmp_path, loss_type="sft")
    assert [rows for rows, _ in seen.settings] == [2]
    ((call, _),) = seen.calls
    assert len(call.latents) == 2
    # bright, as the winners are: α z + σ ε of many numbers
    alpha = seen.run.model.schedule.alpha[call.timesteps.numpy() + 1]
    bright = alpha * seen.batch.latents[:2].mean(dim=(1, 2, 3)).numpy()
    assert call.latents.mean(dim=(1, 2, 3)).numpy() == pytest.approx(bright, abs=0.3)


@pytest.mark.parametrize("samples_per_inversion", [1, 2])
def test_a_step_is_the_mean_of_its_samples(model, tmp_path, samples_per_inversion):
    options = {"samples_per_inversion": samples_per_inversion, "gradient_accumulation_steps": 3}
    seen = Watched(model, tmp_path, inversion_steps=2, **options)
    count = 3 * samples_per_inversion
    assert seen.weights == pytest.approx([1 / count] * count)


@pytest.mark.parametrize("latents", ["q_sample", "ddim"])
def test_winner_and_loser_share_their_levels(model, tmp_path, latents):
    seen = Watched(model, tmp_path, latents=latents, train_batch_size=4)
    winners, losers = torch.stack([call.timesteps for call, _ in seen.calls]).chunk(2, dim=1)
    assert torch.equal(winners, losers)
    # pairs differ where they are trained on
    assert len(winners[-1].unique()) > 1


def test_the_first_timestep(model, tmp_path):
    seen = Watched(model, tmp_path, loss_type="dpo", first_timestep=990, max_train_steps=6)
    times = torch.cat([call.timesteps for call, _ in seen.calls])
    assert times.min() >= 990 and len(times.unique()) > 3


@pytest.mark.parametrize("source", ["ddim", "renoise"])
def test_noise_of_the_inversion(model, tmp_path, source):
    options = {"latents": source, "first_timestep": 900, "inversion_steps": 3}
    ends = [
        Watched(model, tmp_path / str(eta), inversion_eta=eta, **options).calls[-1][0].latents
        for eta in (0.0, 1.0)
    ]
    # with all of the posterior's noise hardly anything of the deterministic path is left
    assert (ends[0] - ends[1]).std() > 0.5


def test_optimisers(model, tmp_path):
    settings = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    config = tiny.config(model, tmp_path, adam_weight_decay=0.03, **settings)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    found = make_optimizer(config, [weight], 0.7).param_groups[0]
    assert (found["lr"], found["betas"], found["eps"]) == (0.7, (0.8, 0.95), 1e-6)
    assert found["weight_decay"] == 0.03
    other = dataclasses.replace(config, optimizer="adafactor")
    found = make_optimizer(other, [weight], 0.7).param_groups[0]
    assert (found["lr"], found["weight_decay"]) == (0.7, 0.03)
    assert not found["relative_step"] and not found["scale_parameter"]


@pytest.mark.parametrize(("limit", "kept"), [(1.0, 0.2), (10.0, 1.0), (float("inf"), 1.0)])
def test_the_gradient_is_clipped_to_its_norm(limit, kept):
    weight = torch.nn.Parameter(torch.zeros(2))
    stepper = Stepper(torch.optim.SGD([weight], lr=1.0), None, limit)
    weight.grad = torch.tensor([3.0, 4.0])
    assert stepper.step().item() == 5.0
    assert weight.tolist() == pytest.approx([-3.0 * kept, -4.0 * kept], rel=1e-5)


def test_what_the_run_hands_on(model, tmp_path):
    options = {"lora_alpha": 6.0, "lora_target_modules": ("to_v",), "max_grad_norm": 0.25}
    run = Watched(model, tmp_path, rank=2, learning_rate=3e-4, **options).run
    adapter = run.policy.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, set(adapter.target_modules)) == (2, 6.0, {"to_v"})
    assert run.stepper.max_grad_norm == 0.25
    assert run.history[0]["lr"] == 3e-4


def test_skipped_steps_are_counted_on_when_a_run_is_resumed(model, tmp_path):
    options = {"checkpointing_steps": 1, "max_nonfinite_steps": 7}
    run = Watched(model, tmp_path, **options).run
    run.stepper.skipped, run.stepper._row = torch.tensor(5.0), torch.tensor(3.0)
    run.step = 2
    run.save_checkpoint()
    config = dataclasses.replace(run.config, resume_from_checkpoint="latest")
    again = PreferenceTrainer(config, dataset=tiny.pairs())
    assert again.step == 2
    assert again.stepper.state() == {"skipped": 5.0, "row": 3.0}


def test_validation_draws_with_the_averaged_weights(model, tmp_path, monkeypatch):
    seen = []

    def draw(config, given, policy, dtype):
        seen.append(policy.conv_in.weight.clone())
        raise KeyboardInterrupt

    monkeypatch.setattr("inpo_fast.training.trainer.draw_images", draw)
    # the average of one step is that step
    options = {"use_ema": True, "ema_decay": 0.5, "max_train_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        Watched(model, tmp_path, validation_prompts=("a",), **options)
    run = Watched(model, tmp_path / "plain", **options).run
    named = zip(run.policy.named_parameters(), run.ema.shadow_params, strict=True)
    (averaged,) = (shadow for (name, _), shadow in named if name == "conv_in.weight")
    assert torch.equal(seen[0], averaged)
    assert not torch.equal(seen[0], run.policy.conv_in.weight)


class Moved(torch.nn.Linear):
    """Notes where it is sent, and stays."""

    def to(self, place):
        self.places = [*vars(self).get("places", []), place]
        return self


def test_parts_of_a_loaded_pipeline_come_for_the_validation_and_go_back():
    here, there = Moved(1, 1), Moved(1, 1, device="meta")
    pipeline = SimpleNamespace(components={"vae": here, "unet": there, "safety_checker": None})
    with pytest.raises(KeyboardInterrupt), _all_on(pipeline, there.weight.device):
        assert here.places == [there.weight.device]
        raise KeyboardInterrupt
    assert here.places == [there.weight.device, here.weight.device]
    assert "places" not in vars(there)


def test_a_cache_beside_a_loaded_pipeline_needs_the_files_of_its_model(sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / _KEY).write_text("{}")
    config = tiny.config("", tmp_path / "out", dataset_name=str(cache))
    pipe = StableDiffusionPipeline.from_pretrained(sd, safety_checker=None)
    with pytest.raises(ConfigError, match="pretrained_model_name_or_path must name the model"):
        PreferenceTrainer(config, model=pipe)


def test_settings_of_validation_images(sd, tmp_path):
    other = samples.save_pipeline(tmp_path / "other", seed=5) / "vae"
    config = tiny.config(
        *(sd, tmp_path), resolution=16, validation_prompts=("a",), validation_inference_steps=3
    )

    def drawn(**changes):
        changed = dataclasses.replace(config, **changes)
        loaded = load_model(changed, None, torch.float32)
        return draw_images(changed, loaded, loaded.denoiser, torch.float32)

    first = drawn()
    assert first.shape == (1, 16, 16, 3) and (drawn() == first).all()
    for change in (
        {"pretrained_vae_model_name_or_path": str(other)},
        {"validation_guidance_scale": 1.0},
        {"validation_inference_steps": 2},
        {"seed": 1},
    ):
        assert (drawn(**change) != first).any(), change
