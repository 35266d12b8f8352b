"""`invert` and `edit` on pipelines that live on a GPU: exact, offloaded or not, captured or not."""

import pytest
import torch

pytest.importorskip("diffusers")

from inpo_fast import Inversion, invert
from tests.gpu.processes import run_anew
from tests.pipelines import tiny
from tests.pipelines.test_untouched import modules, picture, same

pytestmark = pytest.mark.filterwarnings("ignore::inpo_fast.AmplificationWarning")

STEPS = 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
PROMPTS = ["a cat", "a red dog"]


def build(name, dtype, device=None):
    """A pipeline whose heads have 8 and more channels, so that fused attention kernels take them.

    With `device` None it stays on the CPU.
    """
    pipe = tiny.build(name)
    if name in ("sd", "sdxl"):
        wider = {"block_out_channels": (16, 32), "attention_head_dim": 2}
        torch.manual_seed(1)
        unet = type(pipe.unet).from_config({**pipe.unet.config, **wider})
        pipe.register_modules(unet=unet.eval())
    return pipe.to(dtype) if device is None else pipe.to(device, dtype)


def inverted(pipe, count=2, **options):
    given = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "verify": True, **options}
    prompts = PROMPTS[:count]
    return invert(pipe, tiny.images(count, 16, 24), prompts, **given)


def edited(inversion, **options):
    return inversion.edit("a blue bird", output_type="latent", **options).images


def assert_exact(inversion):
    assert inversion.bits_equal and inversion.latent_error == 0
    assert inversion.latents.isfinite().all()


@DTYPES
@pytest.mark.parametrize("solver", ["bdia", "edict", "obelm"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_pictures_come_back_to_the_bit(cuda, name, solver, dtype):
    pipe = build(name, dtype, cuda)
    for part, encoder in modules(pipe).items():
        if part.startswith("text_encoder"):
            # transformers puts hooks of its own on an encoder when it is first asked for these
            ids = torch.zeros(1, 4, dtype=torch.int64, device=cuda)
            encoder(ids, output_hidden_states=True)
    before = picture(pipe)
    inversion = inverted(pipe, solver=solver)
    other = edited(inversion)
    pictures = inversion.edit("a blue bird", output_type="pt").images
    same(before, picture(pipe))
    assert_exact(inversion)
    device = torch.device(cuda).type
    assert inversion.latents.device.type == other.device.type == device
    back = inversion.reconstruct(output_type="latent").latents
    torch.testing.assert_close(back, inversion.image_latents, rtol=0, atol=2**-20)
    assert other.isfinite().all() and not torch.equal(other, back)
    assert torch.equal(edited(inversion), other)
    assert pictures.shape == (2, 3, 16, 24) and 0 <= pictures.min() <= pictures.max() <= 1
    assert inverted(pipe, solver=solver).state.equal(inversion.state)


@pytest.mark.parametrize("name", ["sd2-v", "controlnet", "sd3", "flux"])
def test_every_family_comes_back_to_the_bit(cuda, name):
    pipe = build(name, torch.bfloat16, cuda)
    options = {"control_image": tiny.images(1, 16, 24)} if name == "controlnet" else {}
    inversion = inverted(pipe, **options)
    assert_exact(inversion)
    assert edited(inversion).isfinite().all()


@DTYPES
def test_each_picture_of_a_batch_is_its_own(cuda, dtype):
    """With its own guidance and prompt; another batch size rounds in another way."""
    pipe = build("sd", dtype, cuda)
    both = inverted(pipe, guidance_scale=[1.5, 5.0])
    assert_exact(both)
    one = inverted(pipe, 1, guidance_scale=1.5)
    assert_exact(one)
    wide = build("sd", torch.float32, cuda)
    exact = inverted(wide, guidance_scale=[1.5, 5.0]).latents
    # both are away from float32 by the roundings of the model's dtype
    error = (both.latents[:1] - exact[:1]).norm()
    assert 0 < (one.latents - exact[:1]).norm() <= 4 * error
    assert 4 * error < (exact[0] - exact[1]).norm()


def test_latents_drawn_with_generators(cuda):
    pipe = build("sd", torch.bfloat16, cuda)

    def drawn(*seeds, device):
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        return inverted(pipe, generator=generators)

    for device in {"cpu", cuda}:
        inversion = drawn(1, 2, device=device)
        assert_exact(inversion)
        assert drawn(1, 2, device=device).state.equal(inversion.state)
        assert not torch.equal(drawn(1, 3, device=device).latents[1], inversion.latents[1])


def on_cpu(pipe):
    """Whether no weight is on the GPU; those that come one by one are nowhere in between."""
    parameters = [p for module in modules(pipe).values() for p in module.parameters()]
    return all(p.device.type in ("cpu", "meta") for p in parameters)


@pytest.mark.parametrize(
    ("name", "dtype", "way"),
    [
        ("sd", torch.float16, "model"),
        ("sd", torch.bfloat16, "sequential"),
        ("sdxl", torch.float16, "model"),
        ("sdxl", torch.bfloat16, "sequential"),
    ],
    ids=str,
)
def test_an_offloaded_pipeline_gives_the_same_bits(cuda, tmp_path, name, dtype, way):
    plain, offloaded = build(name, dtype, cuda), build(name, dtype)
    getattr(offloaded, f"enable_{way}_cpu_offload")(device=cuda)
    expected, inversion = inverted(plain), inverted(offloaded)
    assert on_cpu(offloaded), "all models are offloaded again"
    assert_exact(inversion)
    assert inversion.latents.device.type == torch.device(cuda).type
    assert torch.equal(inversion.image_latents, expected.image_latents)
    assert inversion.state.equal(expected.state)
    assert torch.equal(edited(inversion), edited(expected))
    assert on_cpu(offloaded)
    # the same weights are the same model, wherever they lie
    assert inversion.models == expected.models
    inversion.save(tmp_path / "inversion.safetensors")
    loaded = Inversion.load(tmp_path / "inversion.safetensors", plain)
    assert torch.equal(edited(loaded), edited(expected))


@DTYPES
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_file_edits_as_the_inversion_did(cuda, tmp_path, name, dtype):
    path = tmp_path / "inversion.safetensors"
    inversion = inverted(build(name, dtype, cuda), solver="edict", negative_prompt="bad")
    expected = edited(inversion)
    inversion.save(path)
    # an equal pipeline, made anew
    loaded = Inversion.load(path, build(name, dtype, cuda))
    assert loaded.latents.device.type == torch.device(cuda).type
    assert loaded.state.equal(inversion.state)
    assert loaded.reconstruct().bits_equal
    assert torch.equal(edited(loaded), expected)


@DTYPES
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_captured_graphs_give_the_same_bits(cuda, name, dtype):
    pipe = build(name, dtype, cuda)
    plain, captured = inverted(pipe), inverted(pipe, compile="graph")
    assert_exact(captured)
    assert captured.state.equal(plain.state)
    assert torch.equal(edited(captured), edited(plain))
    # each edit has a capture of its own, with its own conditioning
    assert torch.equal(edited(captured, guidance_scale=5.0), edited(plain, guidance_scale=5.0))


@DTYPES
@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("qkv", [False, True])
def test_fused_layers_come_back_to_the_bit(cuda, tmp_path, name, dtype, qkv):
    pytest.importorskip("triton")
    from inpo_fast import fuse_layers

    pipe = build(name, dtype, cuda)
    stock = inverted(pipe)
    if qkv:
        pipe.unet.fuse_qkv_projections()
    assert fuse_layers(pipe.unet) > 10
    plain, captured = inverted(pipe), inverted(pipe, compile="graph")
    assert_exact(captured)
    assert captured.state.equal(plain.state) and not captured.state.equal(stock.state)
    # both round to 16 bits, in other places
    exact = inverted(build(name, torch.float32, cuda)).latents
    assert (captured.latents - exact).norm() <= 4 * (stock.latents - exact).norm()
    captured.save(tmp_path / "inversion.safetensors")
    loaded = Inversion.load(tmp_path / "inversion.safetensors", pipe)
    assert loaded.reconstruct().bits_equal
    assert torch.equal(edited(loaded), edited(captured))


def test_another_process_edits_what_fused_layers_inverted(cuda, tmp_path):
    pytest.importorskip("triton")
    program = """
import sys, torch
from inpo_fast import Inversion, fuse_layers
from tests.gpu.test_pipelines import build, edited, inverted
device, path, before, after = sys.argv[1:]
pipe = build("sdxl", torch.bfloat16, device)
fuse_layers(pipe.unet)
pipe.unet.fuse_qkv_projections()
inversion = inverted(pipe, compile="graph")
if before:
    loaded = Inversion.load(path, pipe)
    assert loaded.state.equal(inversion.state) and loaded.reconstruct().bits_equal
    assert torch.equal(edited(loaded), torch.load(before, device))
else:
    inversion.save(path)
    torch.save(edited(inversion), after)
"""
    path, images = tmp_path / "inversion.safetensors", tmp_path / "edited.pt"
    run_anew(program, cuda, path, "", images, caches=tmp_path / "there")
    run_anew(program, cuda, path, images, "", caches=tmp_path / "back")


def one_resolution(dtype, device):
    """A pipeline of which little is compiled."""
    pipe = build("sd", dtype)
    blocks = {
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    torch.manual_seed(1)
    unet = type(pipe.unet).from_config({**pipe.unet.config, **blocks})
    pipe.register_modules(unet=unet.eval())
    return pipe.to(device, dtype)


def test_a_compiled_model_comes_back_to_the_bit(cuda, tmp_path):
    pipe = one_resolution(torch.bfloat16, cuda)
    plain, compiled = inverted(pipe), inverted(pipe, compile=True)
    assert_exact(compiled)
    # compiled it rounds less often than eager, and both round to bfloat16
    exact = inverted(one_resolution(torch.float32, cuda)).latents
    assert (compiled.latents - exact).norm() <= 4 * (plain.latents - exact).norm()
    compiled.save(tmp_path / "inversion.safetensors")
    loaded = Inversion.load(tmp_path / "inversion.safetensors", pipe)
    assert loaded.reconstruct().bits_equal
    assert torch.equal(edited(loaded), edited(compiled))


def test_null_text_comes_nearer_than_ddim(cuda):
    pipe = build("sd", torch.float32, cuda)
    options = {"guidance_scale": 7.5, "state": "float32"}
    plain = inverted(pipe, solver="ddim", **options)
    before = picture(pipe)
    optimised = inverted(pipe, solver="null-text", num_inner_steps=5, **options)
    same(before, picture(pipe))
    assert 0 < optimised.latent_error < plain.latent_error
    assert edited(optimised).isfinite().all()
