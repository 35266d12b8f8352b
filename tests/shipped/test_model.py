import re
import subprocess
import sys

import pytest
import torch

from inpo_fast import shipped
from inpo_fast.shipped import train
from inpo_fast.shipped.sampling import load_pipeline


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_importing_needs_torch_only():
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'pyarrow', 'PIL', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "import inpo_fast.shipped as shipped\n"
        "scenes = shipped.held_out_scenes(4)\n"
        "assert shipped.score(shipped.render(scenes), scenes).min() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_pipeline_loads_offline_as_any_other(monkeypatch):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = StableDiffusionPipeline.from_pretrained(shipped.model_path())
    assert isinstance(pipe.scheduler, DDIMScheduler)
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert (config.steps_offset, config.set_alpha_to_one, config.clip_sample) == (1, False, False)
    assert (config.prediction_type, config.timestep_spacing) == ("epsilon", "leading")
    assert pipe.safety_checker is None
    assert pipe.feature_extractor is None


def test_the_files_are_small_and_hold_half_precision():
    from safetensors import safe_open

    files = [path for path in shipped.model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3
    for path in weights:
        with safe_open(path, "pt") as tensors:
            dtypes = {tensors.get_tensor(key).dtype for key in tensors.keys()}
        assert dtypes == {torch.float16}


def test_the_files_name_no_machine():
    for path in shipped.model_path().rglob("*.json"):
        # Absolute paths; the vocabulary holds a lone slash.
        assert not re.search(r'"/\w', path.read_text())


def test_the_autoencoder_is_faithful_and_scaled(pipe):
    scenes = shipped.sample_scenes(64, torch.Generator().manual_seed(5))
    images = shipped.render(scenes, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
        latents = (
            posterior.sample(torch.Generator().manual_seed(0)) * pipe.vae.config.scaling_factor
        )
        decoded = pipe.vae.decode(posterior.mode()).sample
    assert shipped.score(decoded, scenes).mean() >= 0.995
    # 40 dB would be 4e-4 in these units; the renderer's own range is [-1, 1].
    assert (decoded - images).square().mean() < 4e-4
    assert latents.shape == (64, 4, 8, 8)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.15, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.1, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(pipe, dtype):
    images = shipped.render(shipped.held_out_scenes(1))
    ids = pipe.tokenizer(
        shipped.held_out_prompts(1), padding="max_length", return_tensors="pt"
    ).input_ids
    half = load_pipeline(dtype=dtype)
    timestep = torch.tensor(501)
    with torch.no_grad():

        def run(pipe, dtype):
            mode = pipe.vae.encode(images.to(dtype)).latent_dist.mode()
            states = pipe.text_encoder(ids)[0]
            scaled = mode * pipe.vae.config.scaling_factor
            noise = pipe.unet(scaled, timestep, states).sample
            return [part.float() for part in (mode, states, noise, pipe.vae.decode(mode).sample)]

        expected, found = run(pipe, torch.float32), run(half, dtype)
    for exact, rounded in zip(expected, found, strict=True):
        assert rounded.isfinite().all()
        # A few dozen roundings of relative size eps, in a network that hardly amplifies.
        assert (rounded - exact).norm() / exact.norm() < 30 * torch.finfo(dtype).eps


def test_prompts_are_followed_loosely_by_crisp_images(pipe):
    # The standard error of the mean over 48 images is 3 points; the figure is 73.9 % on 1024.
    scenes = shipped.held_out_scenes(48, seed=1)
    images = shipped.sample(pipe, [shipped.prompt(s) for s in scenes], steps=20)
    figures = shipped.accuracy_by_kind(shipped.read_attributes(images, scenes), scenes)
    assert 0.6 <= figures["all"] <= 0.85, figures
    # What is drawn is crisp enough to be read, right or wrong.
    seen = shipped.read(images)
    named = [shipped.MISSING not in (i.shape, i.color, i.size) for s in seen for i in s.items]
    assert sum(named) / len(named) >= 0.95


def test_an_image_depends_on_its_index_and_not_on_the_batch(pipe):
    prompts = shipped.held_out_prompts(5)
    together = shipped.sample(pipe, prompts, steps=3)
    apart = shipped.sample(pipe, prompts, steps=3, batch=2)
    assert torch.equal(together, shipped.sample(pipe, prompts, steps=3))
    # Another batch size may change the order of sums.
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=0)


def test_the_script_trains_from_nothing(tmp_path):
    config = train.Config(
        vae_steps=2,
        vae_batch=4,
        pool=16,
        clean_steps=2,
        corrupted_steps=3,
        batch=4,
        calibrations=1,
        evaluated=2,
    )
    device = torch.device("cpu")
    train.run("vae", tmp_path, device, config)
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").exists()
    train.run("text2image", tmp_path, device, config)
    assert "2 held-out prompts" in (tmp_path / "model" / "README.md").read_text()
    for path in (tmp_path / "model").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_the_trainer_minimises_and_averages():
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(3, 1)
    target = torch.tensor([[1.0, -2.0, 3.0]])

    def loss():
        x = torch.randn(32, 3, generator=generator)
        return (module(x) - x @ target.T).square().mean()

    trainer = train.Trainer([module], loss, generator)
    assert trainer.run("fit", 1500, (0.03, 0.0)) == 1500
    trainer.copy_average([module])
    torch.testing.assert_close(module.weight.data, target, atol=0.05, rtol=0)


def test_learning_rate_warms_up_and_falls():
    rates = [train.learning_rate(i / 100, 1.0, 0.1) for i in range(101)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_scaling_gives_unit_latents_and_keeps_the_images():
    vae = train.build_vae()
    images = shipped.render(shipped.held_out_scenes(32))
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        expected = vae.decode(before.mean).sample
        train.scale_latents(vae, images, torch.Generator().manual_seed(0))
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, expected, atol=1e-4, rtol=0)
        latents = after.sample(torch.Generator().manual_seed(0)) * train.SCALING_FACTOR
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
