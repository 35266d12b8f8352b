"""The schedulers in unmodified diffusers pipelines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from inpo_fast import NoiseSchedule, Sampler, schedulers
from tests.schedulers import tiny
from tests.schedulers.cases import FORWARD, INVERSE, PAIRS, STABLE_DIFFUSION, loop

ROOT = Path(__file__).resolve().parents[2]

_pipes = {}


@pytest.fixture
def pipe_of():
    """A family's pipeline, made once, with a DDIM scheduler."""

    def get(name):
        if name not in _pipes:
            _pipes[name] = tiny.build(name)
        pipe = _pipes[name]
        pipe.scheduler = DDIMScheduler(**STABLE_DIFFUSION)
        return pipe

    return get


@pytest.fixture
def calls_of():
    """The calls of a pipeline's UNet while a function runs: (timestep, sample)."""

    def record(pipe, function):
        seen = []

        def hook(module, arguments, keywords, output):
            seen.append((int(arguments[1]), arguments[0]))

        handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
        try:
            return function(), seen
        finally:
            handle.remove()

    return record


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cls", FORWARD)
def test_drop_in(pipe_of, calls_of, monkeypatch, family, cls):
    pipe = pipe_of(family)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    progress, bar = [], []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count=1):
            bar.append(count)

    def watch(pipe, step, t, tensors):
        progress.append((step, int(t)))
        return tensors

    monkeypatch.setattr(pipe, "progress_bar", lambda total=None: Bar())
    first, calls = calls_of(pipe, lambda: tiny.call(pipe, family, callback_on_step_end=watch))
    steps = int(5 * tiny.FAMILIES[family][1].get("strength", 1))
    expected = pipe.scheduler.timesteps[-steps * cls.order :].tolist()
    assert [t for t, _ in calls] == [t for _, t in progress] == expected
    # the bar counts steps, not calls
    assert bar == [1] * steps
    assert first.isfinite().all()
    monkeypatch.undo()
    # a second call of the pipeline knows nothing of the first
    assert torch.equal(tiny.call(pipe, family), first)

    # and it is another solver than DDIM, with a result nearby
    pipe = pipe_of(family)
    distance = (tiny.call(pipe, family) - first).abs().max()
    assert 1e-6 < distance < 2


@pytest.mark.parametrize("cls", FORWARD)
def test_an_interrupted_call_leaves_nothing_behind(pipe_of, cls):
    pipe = pipe_of("sd")
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    first = tiny.call(pipe, "sd")

    def stop(pipe, step, t, tensors):
        if step == 1:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        tiny.call(pipe, "sd", seed=3, callback_on_step_end=stop)
    assert torch.equal(tiny.call(pipe, "sd"), first)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
        {"timestep_spacing": "linspace"},
    ],
    ids=str,
)
def test_a_pipeline_runs_the_program(pipe_of, calls_of, name, config):
    pipe = pipe_of("sd")
    cls, _, solver = PAIRS[name]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **config)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    result, calls = calls_of(pipe, lambda: tiny.call(pipe, "sd", latents=noise))

    embeddings, empty = pipe.encode_prompt("a red circle", "cpu", 1, True)
    both = torch.cat([empty, embeddings])
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    program = solver(NoiseSchedule.from_diffusers(ddim, 5))

    def model(z, t):
        return pipe.unet(z, t, encoder_hidden_states=both).sample

    expected = Sampler(model, program, guidance_scale=3.0, state="float32").run(noise).sample()
    assert len(calls) == program.model_calls
    # Guidance in float32 (the pipeline) or folded into float64 coefficients; the sampler's model
    # sees z after rounding u. Each is a few eps in every model output, times gain and steps.
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PAIRS)
def test_inversion_and_back_in_a_pipeline(pipe_of, name):
    forward, inverse, _ = PAIRS[name]
    pipe = pipe_of("sd")
    pipe.scheduler = forward.from_config(pipe.scheduler.config)
    up = inverse.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(5)
    up.set_timesteps(5)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    # guidance 1: one call of the UNet on the prompt, as the pipeline does it
    embeddings, _ = pipe.encode_prompt("a red circle", "cpu", 1, False)

    @torch.no_grad()
    def model(z, t):
        return pipe.unet(z, t, encoder_hidden_states=embeddings).sample

    noise = loop(up, latents, model)
    start = pipe.scheduler.set_state(up.state)
    options = {"guidance_scale": 1.0, "steps": 5}
    exact = tiny.call(pipe, "sd", latents=start, **options)
    inexact = tiny.call(pipe, "sd", latents=noise, **options)
    # O-BELM starts from a step of no length on Stable Diffusion's table, so it magnifies most
    error = (exact - latents).abs().max().item()
    assert error < 1e-4
    if name != "edict":
        assert (inexact - latents).abs().max().item() > 100 * error


@pytest.mark.parametrize("one", [False, True])
def test_inpainting_blends_at_the_level_of_the_latents(pipe_of, one):
    # what is known must be at the noise level of the track that it is blended into
    pipe = pipe_of("inpaint")
    cls = schedulers.EDICTScheduler
    pipe.scheduler = cls.from_config(pipe.scheduler.config, set_alpha_to_one=one)
    original, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    levels = []

    def watch(pipe, step, t, tensors):
        scheduler = pipe.scheduler
        following = scheduler.timesteps[2 + step + 1] if step < 7 else None
        if following is not None:
            noisy = scheduler.add_noise(original, noise, torch.tensor([int(following)]))
            # α x + σ n
            level = torch.linalg.lstsq(
                torch.stack([original.flatten(), noise.flatten()], 1), noisy.flatten()
            ).solution
            levels.append(level[0].item() ** 2)
        return tensors

    tiny.call(pipe, "inpaint", callback_on_step_end=watch)
    # 5 steps at strength 0.8: pairs at 601, 401, 201, 1 and the end, ᾱ_0 or 1
    table = pipe.scheduler.alphas_cumprod
    expected = [table[t].item() for t in (401, 401, 201, 201, 1, 1)]
    expected.append(pipe.scheduler.final_alpha_cumprod.item())
    # ᾱ_0 is 1e-3 from 1
    assert levels == pytest.approx(expected, abs=1e-5)
    # outside a run it is that of DDIMScheduler
    ddim = DDIMScheduler(**STABLE_DIFFUSION)
    times = torch.tensor([601])
    assert torch.equal(
        pipe.scheduler.add_noise(original, noise, times), ddim.add_noise(original, noise, times)
    )


@pytest.mark.parametrize("cls", FORWARD)
def test_sdxl_in_two_parts(pipe_of, cls):
    # base and refiner, each with a scheduler of its own
    base, refiner = pipe_of("sdxl"), pipe_of("sdxl-img2img")
    base.scheduler = cls.from_config(base.scheduler.config)
    refiner.scheduler = cls.from_config(refiner.scheduler.config)
    half = tiny.call(base, "sdxl", steps=6, denoising_end=0.5)
    # 831 and 665 are above 500
    taken = base.scheduler.step_index
    assert taken == 2 * cls.order
    result = tiny.call(refiner, "sdxl-img2img", steps=6, image=half, denoising_start=0.5)
    assert result.isfinite().all()
    # for order 2 the pipeline adds one call, at the timestep before
    assert refiner.scheduler.begin_index == taken - (cls.order - 1)
    assert refiner.scheduler.step_index == 6 * cls.order


@pytest.mark.parametrize("cls", FORWARD)
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_16_bit_pipelines(cls, dtype):
    pipe = tiny.build("sd").to(dtype)
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    result = tiny.call(pipe, "sd")
    assert result.dtype == dtype and result.isfinite().all()


def test_a_batch_and_a_list_of_generators(pipe_of):
    pipe = pipe_of("sd")
    pipe.scheduler = schedulers.BDIAScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = tiny.call(pipe, "sd", prompt=["a red circle"] * 2, generator=generators)
    alone = tiny.call(pipe, "sd", seed=1)
    # another batch size is another order of the same float32 sums
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-4)


def test_noise_in_steps_is_refused(pipe_of):
    pipe = pipe_of("sd")
    pipe.scheduler = schedulers.OBELMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="eta must be 0"):
        tiny.call(pipe, "sd", eta=0.5)


def test_custom_timesteps(pipe_of, calls_of):
    pipe = pipe_of("sd")
    for cls in FORWARD:
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        _, calls = calls_of(pipe, lambda: tiny.call(pipe, "sd", timesteps=[900, 500, 100, 20]))
        assert [t for t, _ in calls][:: cls.order] == [900, 500, 100, 20]


def test_a_saved_pipeline_comes_back_in_a_fresh_process(tmp_path):
    pipe = tiny.build("sd")
    script = """
import sys
import torch
from diffusers import DiffusionPipeline
import inpo_fast.schedulers

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        "a red circle", num_inference_steps=3, output_type="latent",
        generator=torch.Generator().manual_seed(0), guidance_scale=3.0,
    ).images
    torch.save(latents, folder + "/latents.pt")
    kind = type(pipe.scheduler)
    print(kind.__module__, kind.__name__, pipe.scheduler.config.steps_offset)
"""
    weights = {"BDIAScheduler": {"gamma": 0.5}, "EDICTScheduler": {"mixing_coeff": 0.9}}
    expected = {}
    for cls in FORWARD:
        own = weights.get(cls.__name__, {})
        pipe.scheduler = cls(**STABLE_DIFFUSION, **own)
        folder = tmp_path / cls.__name__
        pipe.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"] == [cls.__module__, cls.__name__]
        expected[str(folder)] = tiny.call(pipe, "sd", steps=3)
    finished = subprocess.run(
        [sys.executable, "-c", script, *expected],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    lines = [f"{cls.__module__} {cls.__name__} 1" for cls in FORWARD]
    assert finished.stdout.splitlines() == lines
    for folder, latents in expected.items():
        # the same machine, another number of threads
        torch.testing.assert_close(torch.load(f"{folder}/latents.pt"), latents, rtol=0, atol=1e-4)


def test_inverse_schedulers_are_saved_too(tmp_path):
    for cls in INVERSE:
        cls.from_config(DDIMScheduler(**STABLE_DIFFUSION).config).save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is cls and loaded.config.steps_offset == 1
