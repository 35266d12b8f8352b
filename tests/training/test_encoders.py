"""The encoders give what the pipelines' own code gives."""

import json
import shutil

import pytest
import torch

from inpo_fast.training.encoders import Encoders, ModelFiles
from inpo_fast.training.images import to_unit
from inpo_fast.training.pairs import DataError
from tests.training import samples

PIXELS = torch.randint(0, 256, (2, 3, 16, 24), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)


def load(folder, **options):
    return Encoders.load(ModelFiles.find(folder), **options)


def tokens(caption):
    from transformers import CLIPTokenizer

    from inpo_fast.shipped import model_path

    tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer")
    options = {"padding": "max_length", "max_length": 24, "truncation": True}
    return tokenizer([caption], return_tensors="pt", **options).input_ids


def test_posterior(sd):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd / "vae").requires_grad_(False)
    with torch.no_grad():
        moments = vae.encode(to_unit(PIXELS)).latent_dist
    mean, std = load(sd).posterior(PIXELS, 0)
    assert mean.shape == (2, 4, 2, 3)
    assert torch.equal(mean, moments.mean) and torch.equal(std, moments.std)


@pytest.mark.parametrize("caption", ["a red circle", "", "a blue square " * 20])
def test_text_of_stable_diffusion(sd, caption):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(sd / "text_encoder").eval()
    with torch.no_grad():
        expected = encoder(tokens(caption))[0][0]
    got = load(sd).text(caption)
    assert got.keys() == {"prompt_embeds"}
    assert torch.equal(got["prompt_embeds"], expected)


@pytest.mark.parametrize("caption", ["a red circle", ""])
def test_text_of_sdxl(sdxl, caption):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    first = CLIPTextModel.from_pretrained(sdxl / "text_encoder").eval()
    second = CLIPTextModelWithProjection.from_pretrained(sdxl / "text_encoder_2").eval()
    ids = tokens(caption)
    with torch.no_grad():
        states = [encoder(ids, output_hidden_states=True) for encoder in (first, second)]
    got = load(sdxl).text(caption)
    assert got.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    joined = torch.cat([state.hidden_states[-2] for state in states], dim=-1)[0]
    assert torch.equal(got["prompt_embeds"], joined)
    assert torch.equal(got["pooled_prompt_embeds"], states[1].text_embeds[0])


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformer_families(kind, tmp_path):
    """CLIP's and T5's embeddings as the pipelines join them, and a shifted latent space."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel, T5Tokenizer

    folder = samples.save_transformer_pipeline(tmp_path, kind)
    encoders = load(folder)
    got = encoders.text("a red circle")
    assert got.keys() == {"prompt_embeds", "pooled_prompt_embeds"}
    last, length = ("3", 256) if kind == "sd3" else ("2", 512)
    tokenizer = T5Tokenizer.from_pretrained(folder / f"tokenizer_{last}")
    options = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    t5 = T5EncoderModel.from_pretrained(folder / f"text_encoder_{last}").requires_grad_(False)
    states = t5(tokenizer(["a red circle"], **options).input_ids)[0][0]
    ids = tokens("a red circle")
    if kind == "flux":
        clip = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        assert torch.equal(got["prompt_embeds"], states)
        assert torch.equal(got["pooled_prompt_embeds"], clip(ids).pooler_output[0])
    else:
        parts = [
            CLIPTextModelWithProjection.from_pretrained(folder / name).requires_grad_(False)
            for name in ("text_encoder", "text_encoder_2")
        ]
        outputs = [part(ids, output_hidden_states=True) for part in parts]
        joined = torch.cat([output.hidden_states[-2][0] for output in outputs], dim=-1)
        # CLIP's 2·16 channels are padded to the 40 of T5
        assert torch.equal(got["prompt_embeds"][:24, :32], joined)
        assert not got["prompt_embeds"][:24, 32:].any()
        assert torch.equal(got["prompt_embeds"][24:], states)
        pooled = torch.cat([output.text_embeds[0] for output in outputs])
        assert torch.equal(got["pooled_prompt_embeds"], pooled)
    mean, std = encoders.posterior(PIXELS, 0)
    assert mean.shape == (2, 16, 2, 3)
    latents = encoders.scaling.sample(mean, std, torch.zeros_like(mean))
    assert torch.equal(latents, (mean - 0.06) * 1.5)
    assert not encoders.family.time_ids


def test_a_pipeline_without_one_of_its_encoders(sdxl):
    files = ModelFiles.find(sdxl)
    pipeline = Encoders.load(files)._pipeline
    pipeline.text_encoder_2 = None
    with pytest.raises(DataError, match="must have its text_encoder_2, got None"):
        Encoders(pipeline)


def test_no_denoiser_is_loaded(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "model")
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.write_bytes(b"not weights")
    assert load(folder).text("a")["prompt_embeds"].shape == (24, 16)


def test_an_autoencoder_that_overflows_runs_in_float32(tmp_path):
    for upcast, expected in ((True, torch.float32), (False, torch.float16)):
        folder = samples.save_pipeline(tmp_path / str(upcast), force_upcast=upcast)
        encoders = load(folder, dtype=torch.float16)
        assert encoders.vae.dtype == expected
        mean, _ = encoders.posterior(PIXELS, 0)
        assert mean.dtype == torch.float32
        assert encoders.text("a")["prompt_embeds"].dtype == torch.float32


def test_latents_that_are_not_finite_name_the_pair_and_the_remedy(sd):
    encoders = load(sd)
    with torch.no_grad():
        encoders.vae.encoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="pair in row 7 are not finite: the autoencoder's weights"):
        encoders.posterior(PIXELS, 7)
    encoders.vae.to(torch.bfloat16)
    with pytest.raises(DataError, match=r"row 7 are not finite: .*bfloat16: encode in float32"):
        encoders.posterior(PIXELS, 7)


def test_embeddings_that_are_not_finite_name_the_caption(sd):
    encoders = load(sd)
    with torch.no_grad():
        encoders._pipeline.text_encoder.get_input_embeddings().weight.fill_(float("inf"))
    with pytest.raises(DataError, match="embeddings of the caption 'a dog' are not finite"):
        encoders.text("a dog")


def test_another_autoencoder(sd, tmp_path):
    other = samples.save_pipeline(tmp_path, seed=1)
    files = ModelFiles.find(sd, vae=other / "vae")
    mean, _ = Encoders.load(files).posterior(PIXELS, 0)
    assert torch.equal(mean, load(other).posterior(PIXELS, 0)[0])
    one, two = ModelFiles.find(sd).fingerprint(), files.fingerprint()
    assert {name for name in one if one[name] != two[name]} == {"vae"}


def test_the_fingerprint_sees_weights_config_and_vocabulary(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "model")
    before = ModelFiles.find(folder).fingerprint()
    assert before == ModelFiles.find(sd).fingerprint()
    assert set(before) == {"family", "vae", "text_encoder", "tokenizer"}

    def changed():
        now = ModelFiles.find(folder).fingerprint()
        return {name for name in before if now[name] != before[name]}

    # what is not encoded with does not count
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "text_encoder" / "README.md").write_text("read me")
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(b"half")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"the same in another format")
    assert changed() == set()
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert changed() == {"text_encoder"}
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 2.0}))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    assert changed() == {"text_encoder", "vae", "tokenizer"}


def test_a_variant_has_a_fingerprint_of_its_own(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    one = ModelFiles.find(folder).fingerprint()
    two = ModelFiles.find(folder, variant="fp16").fingerprint()
    # parts without the variant are loaded, and counted, as they are
    assert {name for name in one if one[name] != two[name]} == {"vae"}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "none", "must be a folder or a name on the hub, got"),
        (lambda folder: folder, "model_index.json must exist: .* is not in diffusers' format"),
    ],
)
def test_no_model(prepare, message, tmp_path):
    with pytest.raises(DataError, match=message):
        ModelFiles.find(prepare(tmp_path))


def test_a_family_that_is_not_supported(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "model")
    (folder / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(
        DataError, match=r"must be one of StableDiffusionPipeline, .* got Kandinsky"
    ):
        ModelFiles.find(folder)
    with pytest.raises(DataError, match=r"must be one of StableDiffusionPipeline, .* got object"):
        Encoders(object())


def test_weights_that_cannot_be_read(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "model")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"the encoders of .* cannot be loaded"):
        load(folder)
