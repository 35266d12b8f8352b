"""What users can ask `invert` and `Inversion` for."""

import threading
import warnings
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderTiny

import inpo_fast
from inpo_fast import SOLVERS, AmplificationWarning, BDIAScheduler, EDICTScheduler, invert
from tests.pipelines import tiny

STEPS = 3


def inverted(pipe, image=None, prompt="a cat", **options):
    image = tiny.images() if image is None else image
    return invert(pipe, image, prompt, **{"num_inference_steps": STEPS, **options})


def pil(tensor):
    """Of [3, H, W]."""
    return PIL.Image.fromarray((tensor * 255).round().byte().permute(1, 2, 0).numpy())


def test_every_form_of_image(pipe):
    """8-bit values in every container give the same latents."""
    bytes_ = (tiny.images(2) * 255).round().byte()
    array = bytes_.permute(0, 2, 3, 1).numpy()
    expected = inverted(pipe, bytes_).image_latents
    forms = [
        bytes_.float() / 255,
        array,
        array.astype(np.float32) / 255,
        [pil(image.float() / 255) for image in bytes_],
        list(array),
        np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape),  # read-only
        (array.astype(np.float64) / 255).astype(">f8"),
        array[:, ::-1][:, ::-1],
        list(bytes_),
        (bytes_[:1], bytes_[1:]),
    ]
    for form in forms:
        torch.testing.assert_close(inverted(pipe, form).image_latents, expected, rtol=0, atol=1e-6)
    single = inverted(pipe, pil(bytes_[0].float() / 255)).image_latents
    torch.testing.assert_close(single, expected[:1], rtol=0, atol=1e-5)


def test_latents_are_those_of_diffusers(pipe):
    image = tiny.images()
    encoded = pipe.vae.encode(image * 2 - 1).latent_dist
    factor = pipe.vae.config.scaling_factor
    expected = encoded.mode() * factor
    torch.testing.assert_close(inverted(pipe, image).image_latents, expected)
    # a generator asks for a sample of the posterior
    drawn = inverted(pipe, image, generator=torch.Generator().manual_seed(1)).image_latents
    expected = encoded.sample(torch.Generator().manual_seed(1)) * factor
    torch.testing.assert_close(drawn, expected)


def test_one_generator_per_image(pipe):
    images = tiny.images(1).expand(2, -1, -1, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    latents = inverted(pipe, images, generator=generators).image_latents
    for index, seed in enumerate((1, 2)):
        alone = inverted(pipe, generator=torch.Generator().manual_seed(seed)).image_latents
        torch.testing.assert_close(latents[index : index + 1], alone)
    assert not torch.equal(latents[0], latents[1])


def test_an_autoencoder_without_a_posterior():
    pipe = tiny.build("sd")
    torch.manual_seed(0)
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    parts = {**pipe.components, "vae": small}
    pipe = type(pipe)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert inverted(pipe, verify=True).bits_equal
    with pytest.raises(ValueError, match="AutoencoderTiny has no posterior"):
        inverted(pipe, generator=torch.Generator())


def test_output_types(pipe):
    inversion = inverted(pipe, tiny.images(2))
    tensor = inversion.edit("a dog", output_type="pt").images
    assert tensor.shape == (2, 3, 16, 16) and 0 <= tensor.min() and tensor.max() <= 1
    array = inversion.edit("a dog", output_type="np").images
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    pictures = inversion.edit("a dog").images
    assert np.array_equal(np.array(pictures[1]), (array[1] * 255).round().astype(np.uint8))
    latents = inversion.edit("a dog", output_type="latent").images
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensor)
    output = inversion.reconstruct(output_type="latent")
    assert torch.equal(output.images, output.latents)
    assert inversion.edit("a dog")[0] is not None, "indexes like a diffusers output"


def test_the_edit_is_another_prompt_from_the_same_noise(pipe):
    inversion = inverted(pipe)
    same = inversion.edit("a cat", output_type="latent").images
    assert torch.equal(same, inversion.reconstruct(output_type="latent").latents)
    assert not torch.equal(same, inversion.edit("a dog", output_type="latent").images)
    assert not torch.equal(
        same, inversion.edit("a cat", guidance_scale=7.5, output_type="latent").images
    )


def test_latents_go_into_the_pipeline(pipe):
    inversion = inverted(tiny.build("sd"), solver="ddim", guidance_scale=1.0)
    own = tiny.build("sd")
    images = own(
        "a cat",
        latents=inversion.latents,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        output_type="pt",
    ).images
    back = inversion.reconstruct(output_type="pt").images
    torch.testing.assert_close(images, back, rtol=0, atol=1e-4)


def test_negative_prompts(pipe):
    def noise(**options):
        return inverted(pipe, tiny.images(2), guidance_scale=4.0, **options).state.sample()

    plain = noise()
    assert torch.equal(plain, noise(negative_prompt=""))
    one = noise(negative_prompt="bad")
    assert not torch.equal(plain, one)
    assert torch.equal(one, noise(negative_prompt=["bad", "bad"]))
    mixed = noise(negative_prompt=["bad", ""])
    torch.testing.assert_close(mixed[0], one[0])
    torch.testing.assert_close(mixed[1], plain[1])


def test_an_edit_keeps_guidance_and_negative_prompt(pipe, pipe_of):
    inversion = inverted(pipe, guidance_scale=4.0, negative_prompt="bad")
    kept = inversion.edit("a dog", output_type="latent").images
    again = inversion.edit(
        "a dog", guidance_scale=4.0, negative_prompt="bad", output_type="latent"
    ).images
    assert torch.equal(kept, again)
    none = inversion.edit("a dog", negative_prompt="", output_type="latent").images
    assert not torch.equal(kept, none)
    # also where the edit changes something else that is negative
    xl = inverted(pipe_of("sdxl"), guidance_scale=4.0, negative_prompt="bad")
    sizes = {"negative_original_size": (16, 16), "negative_target_size": (8, 8)}
    kept = xl.edit("a dog", output_type="latent", **sizes).images
    again = xl.edit("a dog", negative_prompt="bad", output_type="latent", **sizes).images
    assert torch.equal(kept, again)
    assert not torch.equal(kept, xl.edit("a dog", output_type="latent").images)
    second = xl.edit("a dog", negative_prompt_2="worse", output_type="latent").images
    both = xl.edit(
        "a dog", negative_prompt="bad", negative_prompt_2="worse", output_type="latent"
    ).images
    assert torch.equal(second, both)
    # also from an inversion that had no use for it, and from embeddings
    negative = pipe.encode_prompt("bad", "cpu", 1, False)[0]
    options = {"guidance_scale": 4.0, "output_type": "latent"}
    embedded = inverted(pipe, guidance_scale=1.0, negative_prompt_embeds=negative)
    kept = embedded.edit("a dog", **options).images
    assert torch.equal(kept, embedded.edit("a dog", negative_prompt="bad", **options).images)
    unguided = inverted(pipe, guidance_scale=1.0, negative_prompt="bad")
    kept = unguided.edit("a dog", guidance_scale=4.0, output_type="latent").images
    none = unguided.edit(
        "a dog", guidance_scale=4.0, negative_prompt="", output_type="latent"
    ).images
    assert not torch.equal(kept, none)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_prompt_embeddings(pipe_of, name):
    """Embeddings of the prompts are the prompts."""
    pipe = pipe_of(name)
    options = {"true_cfg_scale": 3.0} if name == "flux" else {"guidance_scale": 3.0}
    words = inverted(pipe, negative_prompt="bad", verify=True, **options)
    told = words.conditioning.tensors
    embeddings = {k: v for k, v in told.items() if k.endswith("_embeds")}
    given = inverted(pipe, prompt=None, verify=True, **embeddings, **options)
    assert words.bits_equal and given.bits_equal
    assert given.state.equal(words.state)
    edited = given.edit("a dog", output_type="latent").images
    assert torch.equal(edited, words.edit("a dog", output_type="latent").images)
    positive = {k: v for k, v in embeddings.items() if not k.startswith("negative_")}
    assert torch.equal(
        given.edit(output_type="latent", **positive).images, words.reconstruct().latents
    )


def test_settings_reach_the_encoder_and_the_edit(pipe_of):
    pipe = pipe_of("sdxl")
    plain, skipped = inverted(pipe), inverted(pipe, clip_skip=1, verify=True)
    assert skipped.bits_equal and not plain.state.equal(skipped.state)
    own = skipped.edit("a cat", output_type="latent").images
    assert torch.equal(own, skipped.reconstruct().latents)


def test_guidance_per_image(pipe):
    inversion = inverted(pipe, tiny.images(2), guidance_scale=[1.0, 5.0], verify=True)
    assert inversion.bits_equal
    low = inverted(pipe, tiny.images(2), guidance_scale=1.0).state.sample()
    torch.testing.assert_close(inversion.state.sample()[0], low[0], rtol=1e-4, atol=1e-5)
    edited = inversion.edit("a dog", guidance_scale=[2.0, 3.0], output_type="latent").images
    assert torch.isfinite(edited).all()


def test_numbers_of_numpy_and_torch(pipe, pipe_of, tmp_path):
    """Taken as the numbers that they are, and written to files."""
    plain = inverted(pipe, num_inference_steps=None, timesteps=[900, 500, 20], guidance_scale=2.5)
    other = inverted(
        pipe,
        num_inference_steps=None,
        timesteps=torch.tensor([900, 500, 20]),
        guidance_scale=np.float32(2.5),
        strength=np.float32(1.0),
        gamma=np.float64(1.0),
        clip_skip=None,
    )
    assert other.state.equal(plain.state)
    other.save(tmp_path / "numbers")
    for timesteps in ([900, 500, 20], torch.tensor([900, 500, 20]), np.array([900, 500, 20])):
        expected = {"timesteps": timesteps, "guidance_scale": np.float32(2.5), "strength": 1}
        loaded = other.load(tmp_path / "numbers", pipe, **expected)
    assert loaded.reconstruct().bits_equal
    with pytest.raises(ValueError, match="was made with timesteps"):
        other.load(tmp_path / "numbers", pipe, timesteps=torch.tensor([900, 500, 21]))
    xl = inverted(pipe_of("sdxl"), original_size=(np.int64(16), np.int32(16)))
    xl.save(tmp_path / "size")
    assert xl.load(tmp_path / "size", xl.adapter.pipe).request.options["original_size"] == [16, 16]


@pytest.mark.parametrize("scheduler", [BDIAScheduler, EDICTScheduler])
def test_schedulers_of_this_package_give_their_grid(pipe, scheduler):
    own = tiny.build("sd")
    own.scheduler = scheduler.from_config(own.scheduler.config)
    assert inverted(own).state.equal(inverted(pipe).state)


def test_strength_uses_the_cleanest_part_of_the_grid(pipe):
    full = inverted(pipe, num_inference_steps=10)
    half = inverted(pipe, num_inference_steps=10, strength=0.5, verify=True)
    assert half.bits_equal and half.schedule.num_steps == half.model_calls == 5
    assert (half.schedule.timesteps == full.schedule.timesteps[:6]).all()
    # the noise that is reported is the noise's part of the latents, whatever its level
    alpha, sigma = half.schedule.alpha[-1], half.schedule.sigma[-1]
    noisy = alpha * half.image_latents.double() + sigma * half.noise.double()
    torch.testing.assert_close(noisy.float(), half.state.sample(), rtol=0, atol=1e-5)
    assert half.report["noise_std"] == float(half.noise.std())


def test_explicit_timesteps(pipe):
    grid = [901, 500, 20]
    inversion = inverted(pipe, num_inference_steps=None, timesteps=grid, verify=True)
    assert inversion.bits_equal
    assert inversion.schedule.timesteps.tolist() == [0, 20, 500, 901]


def test_explicit_sigmas(pipe_of):
    inversion = inverted(
        pipe_of("sd3"), num_inference_steps=None, sigmas=[1.0, 0.7, 0.2], verify=True
    )
    assert inversion.bits_equal
    shift = 3.0
    expected = [shift * s / (1 + (shift - 1) * s) for s in (0.0, 0.2, 0.7, 1.0)]
    np.testing.assert_allclose(inversion.schedule.sigma, expected, rtol=1e-6)


def test_solver_parameters_and_factories(pipe):
    soft = inverted(pipe, solver="bdia", gamma=0.94, verify=True)
    assert soft.bits_equal and "47/50" in soft.report["solver"]
    exact = inverted(pipe, solver="bdia", gamma=Fraction(47, 50))
    assert soft.state.equal(exact.state)

    def mine(schedule, *, direction, softness):
        return SOLVERS["bdia"](schedule, gamma=softness, direction=direction)

    assert inverted(pipe, solver=mine, softness=0.94).state.equal(soft.state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverted(pipe, solver="edict", p=0.93)
    with pytest.warns(AmplificationWarning):
        inverted(pipe, solver="bdia", gamma=0.01, num_inference_steps=5, state="float32")


@pytest.mark.parametrize("state", ["float64", "float32"])
def test_floating_states(pipe, state):
    """Reversible in floating point to rounding, and the bits are reported as they are."""
    inversion = inverted(pipe, state=state, verify=True)
    assert inversion.bits_equal == (inversion.latent_error == 0)
    assert inversion.latent_error < 1e-4


def test_the_vae_floor_is_apart_from_the_latent_error(pipe):
    image = tiny.images()
    inversion = inverted(pipe, image, verify=True)
    decoded = pipe.vae.decode(pipe.vae.encode(image * 2 - 1).latent_dist.mode()).sample
    error = (decoded.detach().clamp(-1, 1) - (image * 2 - 1)).square().mean().sqrt()
    assert inversion.vae_floor == pytest.approx(float(error), rel=1e-5)
    assert inversion.latent_error == 0


def test_callback(pipe):
    seen = []

    def callback(given, index, timestep, tensors):
        assert given is pipe
        seen.append((index, int(timestep), tensors))
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    options = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": names,
    }
    inversion = inverted(pipe, **options)
    assert [index for index, *_ in seen] == list(range(STEPS))
    assert [time for _, time, _ in seen] == [u.timestep for u in inversion.plan.to_noise.updates]
    assert set(seen[0][2]) == set(names)
    assert torch.equal(seen[-1][2]["latents"], inversion.state.sample())
    assert torch.equal(seen[0][2]["prompt_embeds"], inversion.conditioning.tensors["prompt_embeds"])
    seen.clear()
    edited = inversion.edit("a dog", output_type="latent", **options).images
    assert torch.equal(seen[-1][2]["latents"], edited)


def test_a_callback_object_brings_its_names(pipe):
    class Callback:
        tensor_inputs = ("prompt_embeds",)

        def __call__(self, pipe, index, timestep, tensors):
            assert set(tensors) == {"prompt_embeds"}
            return {}

    inverted(pipe, callback_on_step_end=Callback())


def test_a_callback_may_not_replace_what_it_reads(pipe):
    def callback(pipe, index, timestep, tensors):
        return {"latents": tensors["latents"] * 2}

    with pytest.raises(ValueError, match=r"callback_on_step_end must not replace \['latents'\]"):
        inverted(pipe, callback_on_step_end=callback)

    def scribble(pipe, index, timestep, tensors):
        for tensor in tensors.values():
            tensor.zero_()
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    for state in ("lattice", "float32"):
        scribbled = inverted(
            pipe,
            state=state,
            callback_on_step_end=scribble,
            callback_on_step_end_tensor_inputs=names,
        )
        plain = inverted(pipe, state=state)
        assert scribbled.state.equal(plain.state)
        told = plain.conditioning.tensors
        assert all(torch.equal(v, told[k]) for k, v in scribbled.conditioning.tensors.items())


@pytest.mark.parametrize("solver", ["bdia", "edict", "obelm", "ddim"])
def test_an_interrupted_inversion_is_one_of_the_steps_done(solver, tmp_path):
    pipe = tiny.build("sd")

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 3
        return tensors

    options = {"solver": solver, "num_inference_steps": 8}
    inversion = inverted(pipe, callback_on_step_end=stop, verify=True, **options)
    assert inversion.interrupted and inversion.model_calls == 4
    assert inversion.bits_equal == (solver != "ddim")
    steps = 2 if solver == "edict" else 4
    assert inversion.schedule.num_steps == steps
    whole = inverted(pipe, strength=steps / 8, **options)
    if solver != "edict":
        # EDICT mixes its tracks at the end of a step, after the last model call
        assert torch.equal(inversion.state.sample(), whole.state.sample())
    assert inversion.edit("a dog") is not None
    inversion.save(tmp_path / "part")
    loaded = inversion.load(tmp_path / "part", pipe)
    assert loaded.state.equal(inversion.state)
    assert loaded.reconstruct().bits_equal == inversion.bits_equal


def test_an_interrupted_edit_returns_what_there_is():
    pipe = tiny.build("sd")
    inversion = inverted(pipe, num_inference_steps=6)
    seen = []

    def stop(pipe, index, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = index == 1
        return tensors

    edited = inversion.edit("a dog", callback_on_step_end=stop, output_type="latent").images
    assert len(seen) == 2 and torch.equal(edited, seen[-1])
    # what stopped that run does not stop the next
    seen.clear()
    inversion.edit("a dog", callback_on_step_end=lambda *a: seen.append(a) or {})
    assert len(seen) == inversion.plan.to_image.model_calls


def test_progress_bars_are_configured_on_the_pipeline(capfd):
    pipe = tiny.build("sd")
    inverted(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="mine")
    inverted(pipe)
    printed = capfd.readouterr().err
    assert "mine" in printed and f"{STEPS}/{STEPS}" in printed


def test_safety_checker_sees_edits():
    pipe = tiny.build("sd")
    pipe.run_safety_checker = lambda image, device, dtype: (image, [False, True])
    output = inverted(pipe, tiny.images(2)).edit("a dog", output_type="pt")
    assert output.nsfw_content_detected == [False, True]


def test_lazy_names_of_the_package():
    assert inpo_fast.invert is invert
    assert inpo_fast.Inversion is type(inverted(tiny.build("sd")))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        inpo_fast.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["sd", "sdxl", "offloaded"])
def test_threads_on_one_pipeline(pipe_of, name):
    """The same bytes as one after the other, prompts of different length included."""
    if name == "offloaded":
        pipe = tiny.build("sd")
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            # every call brings the weights in and takes them away again
            cpu_offload(part, torch.device("cpu"), offload_buffers=True)
    else:
        pipe = pipe_of(name)
    jobs = [(tiny.images(seed=k), "a " + "cat " * k, 1.0 + k) for k in range(4)]

    def work(job):
        image, prompt, guidance = job
        inversion = inverted(pipe, image, prompt, guidance_scale=guidance, verify=True)
        return inversion, inversion.edit("a dog", output_type="pt").images

    serial = [work(job) for job in jobs]
    for _ in range(2):
        found = [None] * len(jobs)

        def run(index, found=found):
            found[index] = work(jobs[index])

        threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for (one, image), (other, edited) in zip(serial, found, strict=True):
            assert one.state.equal(other.state) and other.bits_equal
            assert torch.equal(image, edited)
