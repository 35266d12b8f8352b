"""Null-text inversion: against a plain loop over images, and against DDIM."""

import pytest
import torch
from tqdm import tqdm

from inpo_fast import NoiseSchedule, Sampler, ddim, invert
from inpo_fast.pipelines.adapter import Conditioning
from inpo_fast.pipelines.null_text import null_text_embeddings
from tests.pipelines import tiny

GUIDANCE, STEPS, INNER, RATE, STOP = 7.5, 4, 3, 1e-2, 1e-5


def inverted(pipe, count=2, **options):
    given = {"num_inner_steps": INNER, **options}
    return invert(
        pipe,
        tiny.images(count, 16, 24),
        ["a cat", "a red dog"][:count],
        solver="null-text",
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        state="float32",
        **given,
    )


def plain_loop(pipe, index, early_stop=STOP):
    """The paper's algorithm for one image, with torch's Adam and steps of diffusers' formula."""
    schedule = NoiseSchedule.from_diffusers(pipe.scheduler, STEPS)
    image = tiny.images(2, 16, 24)[index : index + 1] * 2 - 1
    prompt = ["a cat", "a red dog"][index]
    with torch.no_grad():
        z = pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor
        text, null = pipe.encode_prompt(prompt, "cpu", 1, True)

    def call(z, node, embedding):
        t = int(schedule.timesteps[node])
        return pipe.unet(z, t, encoder_hidden_states=embedding, return_dict=False)[0]

    def move(z, m, source, target, node):
        """One DDIM step with the output m of node `node`, for either prediction type."""
        a, s = schedule.alpha, schedule.sigma
        if pipe.scheduler.config.prediction_type == "epsilon":
            x, e = (z - s[node] * m) / a[node], m
        else:
            x, e = a[node] * z - s[node] * m, s[node] * z + a[node] * m
        return a[target] * x + s[target] * e

    trajectory = [z.double()]
    with torch.no_grad():
        for i in range(STEPS):
            m = call(trajectory[-1].float(), i, text).double()
            trajectory.append(move(trajectory[-1], m, i, i + 1, i))
    z, found, losses = trajectory[-1].float(), [], []
    for step in range(STEPS):
        i, done = STEPS - step, step / STEPS
        with torch.no_grad():
            conditional = call(z, i, text)
        null = null.clone().requires_grad_()
        adam = torch.optim.Adam([null], lr=RATE * (1 - done / 2))
        for _ in range(INNER):
            m = call(z, i, null)
            after = move(z, m + GUIDANCE * (conditional - m), i, i - 1, i)
            loss = (after - trajectory[i - 1].float()).square().mean()
            if loss < early_stop * (1 + 100 * done):
                break
            losses.append(float(loss.detach()))
            (null.grad,) = torch.autograd.grad(loss, null)
            adam.step()
        null = null.detach()
        found.append(null)
        with torch.no_grad():
            m = call(z, i, null)
            z = move(z, m + GUIDANCE * (conditional - m), i, i - 1, i)
    return torch.stack(found), losses


@pytest.mark.parametrize("name", ["sd", "sd2-v"])
def test_equals_a_plain_loop_over_the_images(pipe_of, name):
    pipe = pipe_of(name)
    vectorised = inverted(pipe, learning_rate=RATE, early_stop=STOP).null_embeddings
    assert vectorised.shape[:2] == (STEPS, 2)
    for index in range(2):
        expected, losses = plain_loop(pipe, index)
        assert len(losses) == STEPS * INNER, "no step was good enough at once"
        assert (expected - expected[0]).abs().max() > RATE / 2, "the embeddings move"
        close(vectorised[:, index], expected[:, 0])


def close(found, expected):
    """Adam divides by the gradient's size: rounding turns where a gradient is nearly 0, so a few
    elements may differ by some steps and the mean may not."""
    assert (found - expected).abs().mean() < 1e-2 * RATE


def test_early_stop_masks_each_image_by_itself(pipe):
    """A threshold between their losses stops one image at its first step and not the other."""
    first = [plain_loop(pipe, index)[1][0] for index in range(2)]
    stop = sum(first) / 2
    embeddings = inverted(pipe, learning_rate=RATE, early_stop=stop).null_embeddings
    counts = []
    for index in range(2):
        expected, losses = plain_loop(pipe, index, early_stop=stop)
        counts.append(len(losses))
        close(embeddings[:, index], expected[:, 0])
    assert counts[0] != counts[1]
    still = first.index(min(first))
    start = inverted(pipe).conditioning.tensors["negative_prompt_embeds"]
    assert torch.equal(embeddings[0, still], start[still])
    assert not torch.equal(embeddings[0, 1 - still], start[1 - still])


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_comes_nearer_than_ddim_under_guidance(pipe_of, name):
    pipe = pipe_of(name)
    needed = {}
    if name == "flux":
        needed = {"true_cfg_scale": GUIDANCE, "negative_prompt": ""}
    elif name == "controlnet":
        needed = {"control_image": tiny.images(2, 16, 24, seed=9)}
    optimised = inverted(pipe, num_inner_steps=10, learning_rate=3e-2, **needed)
    optimised.reconstruct(output_type="latent")
    plain = invert(
        pipe,
        tiny.images(2, 16, 24),
        ["a cat", "a red dog"],
        solver="ddim",
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        state="float32",
        verify=True,
        **needed,
    )
    assert not optimised.bits_equal and not optimised.report["reversible"]
    assert optimised.latent_error < plain.latent_error
    # and than the embeddings that it starts from
    start = inverted(pipe, num_inner_steps=1, early_stop=1e9, **needed)
    start.reconstruct(output_type="latent")
    assert optimised.latent_error < start.latent_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guidance", [GUIDANCE, (2.0, 7.5)])
def test_the_optimised_path_is_that_of_the_way_back(pipe, guidance, dtype):
    """To the bit, with a model whose bits do not depend on the size of its batch."""

    def bind(told):
        level = told.tensors["prompt_embeds"].float().mean(dim=(1, 2))[:, None, None, None]
        return lambda sample, timestep: torch.tanh(sample * level.to(sample.dtype))

    generator = torch.Generator().manual_seed(0)
    text, null = torch.randn(2, 2, 3, 5, generator=generator)
    told = Conditioning({"prompt_embeds": text.to(dtype), "negative_prompt_embeds": null.to(dtype)})
    schedule = NoiseSchedule.from_diffusers(pipe.scheduler, STEPS)
    program = ddim(schedule, direction="sample")
    trajectory = [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(STEPS + 1)]
    path = []

    class Recorded:
        stopped = False
        progress = staticmethod(lambda total, name: tqdm(total=total, disable=True))

        @staticmethod
        def done(timestep, sample):
            path.append(sample())
            return True

    embeddings, _ = null_text_embeddings(
        bind, told, program, guidance, trajectory, Recorded, dtype=dtype, early_stop=0.0
    )
    assert embeddings.dtype == dtype and not torch.equal(embeddings[0], embeddings[1])
    step = iter(embeddings)

    def guided(sample, timestep):
        halves = sample.chunk(2)
        both = [bind(Conditioning({"prompt_embeds": e})) for e in (next(step), text.to(dtype))]
        return torch.cat([model(z, timestep) for model, z in zip(both, halves, strict=True)])

    states = []
    sampler = Sampler(guided, program, guidance_scale=guidance, state="float32", model_dtype=dtype)
    sampler.run(trajectory[-1], callback=lambda i, u, state: states.append(state.sample().clone()))
    assert len(path) == len(states) == STEPS
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(path, states, strict=True))


def test_calls_and_report(pipe):
    inversion = inverted(pipe)
    assert inversion.model_calls == STEPS + STEPS * (INNER + 2)
    assert inversion.report["solver"] == "null-text"
    # the inversion itself goes without guidance
    plain = invert(
        pipe,
        tiny.images(2, 16, 24),
        ["a cat", "a red dog"],
        solver="ddim",
        guidance_scale=1.0,
        num_inference_steps=STEPS,
        state="float32",
    )
    assert torch.equal(inversion.state.sample(), plain.state.sample())


def test_edit_and_file_use_the_embeddings(pipe, tmp_path):
    inversion = inverted(pipe)
    back = inversion.reconstruct(output_type="latent").latents
    same = inversion.edit(["a cat", "a red dog"], output_type="latent").images
    assert torch.equal(same, back)
    edited = inversion.edit("a bird", output_type="latent").images
    assert not torch.equal(edited, back)
    inversion.save(tmp_path / "null")
    loaded = inversion.load(tmp_path / "null", pipe)
    assert torch.equal(loaded.edit("a bird", output_type="latent").images, edited)
    with pytest.raises(ValueError, match="negative_prompt must be left out"):
        inversion.edit("a bird", negative_prompt="bad")


@pytest.mark.parametrize("stop_at", [1, STEPS + 1])
def test_interrupted(stop_at):
    """In the inversion and in the optimisation; what is there can be used."""
    pipe = tiny.build("sd")

    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == stop_at
        return tensors

    inversion = inverted(pipe, callback_on_step_end=stop)
    steps = 2 if stop_at == 1 else STEPS
    assert inversion.interrupted and inversion.schedule.num_steps == steps
    assert len(inversion.null_embeddings) == steps
    assert torch.isfinite(inversion.reconstruct(output_type="latent").latents).all()
