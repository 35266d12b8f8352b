"""Train the shipped model from scratch, then let it make the preference data.

    python -m inpo_fast.shipped.train --stage vae --output DIR --device cuda
    python -m inpo_fast.shipped.train --stage text2image --output DIR --device cuda
    python -m inpo_fast.shipped.train --stage preferences --output DIR --device cuda

Each stage continues from the files that the one before it wrote to DIR, and leaves `vae/`, `model/`
(the pipeline) and `preferences.parquet` there. All data are drawn on the fly from fixed seeds. On
one H200 the three stages take a few minutes together.

The text-to-image stage has two parts. First the captions are right, so that the model learns to
draw everything it may be asked for. Then, as in web data, many words for attributes are replaced by
random ones: the model learns to follow prompts only loosely, and aligning it by preferences has
something to gain. How many is found on the way, so that a stated fraction of attributes is right.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .captions import MAX_TOKENS, CaptionEncoder, Corruption, build_tokenizer
from .reader import score
from .sampling import accuracy, load_pipeline, sample
from .scenes import (
    IMAGE_SIZE,
    decode,
    held_out_scenes,
    prompt,
    render_codes,
    sample_codes,
    sample_scenes,
)

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

TEXT_WIDTH = 128
SCALING_FACTOR = 0.18215


@dataclass(frozen=True)
class Config:
    """Everything that decides the result besides the seed. All of it can be set for a smoke test.

    Attributes:
        vae_steps, clean_steps, corrupted_steps: optimiser steps of the three trainings.
        max_seconds: cap on the seconds of either training loop; the step counts shrink to fit it,
            by the speed of the first steps, and are printed.
        vae_batch, batch: images per step.
        pool: scenes drawn, rendered and encoded at the start of the text-to-image stage.
        target: fraction of attributes to be right at guidance 3, on prompts of the training split.
        calibrations: evaluations by which the rate of corruption is adjusted to `target`.
        dropout: probability that a caption is empty, for classifier-free guidance.
        evaluated: held-out prompts for the measured accuracy.
        preference_prompts, images_per_prompt, preference_guidance: the preference data.
    """

    seed: int = 0
    max_seconds: float = 300.0
    vae_steps: int = 6309
    vae_batch: int = 128
    vae_rate: float = 1e-3
    kl_weight: float = 1e-4
    pool: int = 1 << 19
    clean_steps: int = 13029
    corrupted_steps: int = 5211
    batch: int = 512
    rate: float = 1e-3
    corrupted_rate: float = 3e-4
    target: float = 0.68
    calibrations: int = 6
    dropout: float = 0.12
    evaluated: int = 1024
    preference_prompts: int = 2200
    images_per_prompt: int = 4
    preference_guidance: float = 4.0


def build_vae() -> AutoencoderKL:
    """Return a new autoencoder, [B, 3, 64, 64] to latents [B, 4, 8, 8]."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(24, 48, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return a new denoiser of latents [B, 4, 8, 8], small enough to train on a CPU."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # The number of heads: diffusers keeps this misnomer for old checkpoints.
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder() -> CLIPTextModel:
    """Return a new text encoder, ids [B, 24] to states [B, 24, 128]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = build_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Return the scheduler with Stable Diffusion's settings."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def learning_rate(progress: float, first: float, last: float) -> float:
    """Return the rate at `progress` in [0, 1]: warm-up over 3 %, then a cosine to the last."""
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return min(1.0, progress / 0.03 + 0.01) * (last + (first - last) * cosine)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Compute in bfloat16 on a GPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")


class Trainer:
    """Takes AdamW steps on a loss and averages the weights exponentially.

    On a GPU the whole step is one CUDA graph: the networks are so small that launching their
    kernels one by one would take longer than running them.
    """

    def __init__(
        self,
        modules: list[torch.nn.Module],
        loss: Callable[[], torch.Tensor],
        generator: torch.Generator,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Prepare to minimise `loss` over `modules`; all its randomness is from `generator`.

        `prepare` is called before each step, for what cannot be part of the graph.
        """
        self._prepare = prepare
        self.parameters: list[torch.Tensor] = [p for module in modules for p in module.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self._generator = generator
        self._loss = loss
        self._graph: torch.cuda.CUDAGraph | None = None
        self._value = torch.zeros(())
        self._taken = 0
        device = generator.device
        self._rate = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self._rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=cuda,
            capturable=cuda,
        )

    def step(self, rate: float) -> torch.Tensor:
        """Take one step and return its loss, which the next step overwrites."""
        self._rate.fill_(rate)
        self._prepare()
        self._taken += 1
        if self._generator.device.type == "cpu":
            return self._step()
        if self._graph is not None:
            self._graph.replay()
            return self._value
        # Three ordinary steps compile the loss and allocate the optimiser's state.
        if self._taken <= 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                value = self._step()
            torch.cuda.current_stream().wait_stream(stream)
            return value
        self._optimizer.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._generator)
        with torch.cuda.graph(self._graph):
            self._value = self._step()
        self._graph.replay()
        return self._value

    def _step(self) -> torch.Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizer.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 0.005)
        return loss.detach()

    def run(
        self, name: str, steps: int, rates: tuple[float, float], seconds: float = math.inf
    ) -> int:
        """Take `steps` steps, fewer if they would last longer than `seconds`; return how many."""
        step = 0
        start = begin = time.perf_counter()
        while step < steps:
            loss = self.step(learning_rate(step / steps, *rates))
            step += 1
            if step in (10, 60) and seconds < math.inf:
                now = synchronized_time(self._generator.device)
                if step == 60:
                    steps = max(step, min(steps, int(seconds / (now - begin) * 50)))
                    print(f"{name}: {(now - begin) * 20:.2f} ms a step, {steps} steps", flush=True)
                begin = now
            if step % max(1, steps // 5) == 0:
                print(f"{name} step {step} loss {loss.item():.5f}", flush=True)
        print(f"{name} took {time.perf_counter() - start:.0f} s", flush=True)
        return steps

    def copy_average(self, modules: list[torch.nn.Module]) -> None:
        """Give `modules`, built like those in training or the same, the averaged weights."""
        parameters = [p.data for module in modules for p in module.parameters()]
        torch._foreach_copy_(parameters, self.average)


def synchronized_time(device: torch.device) -> float:
    """Return the time in seconds once all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def image_batches(config: Config, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield batches [vae_batch, 3, 64, 64] of training images, drawn sixteen batches at a time."""
    while True:
        codes = sample_codes(16 * config.vae_batch, generator, held_out=False)
        yield from torch.split(render_codes(codes, generator), config.vae_batch)


def train_vae(config: Config, device: torch.device) -> AutoencoderKL:
    """Train the autoencoder and scale its latents."""
    torch.manual_seed(config.seed)
    generator = torch.Generator(device).manual_seed(config.seed)
    vae = build_vae().to(device)
    vae.to(memory_format=torch.channels_last)
    batches = image_batches(config, generator)
    images = torch.empty(config.vae_batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    size = IMAGE_SIZE // 8
    noises = torch.Generator(device).manual_seed(config.seed + 4)

    def losses(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        moments = vae.quant_conv(vae.encoder(images)).float()
        mean, log_variance = moments.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        latents = mean + noise * (0.5 * log_variance).exp()
        decoded = vae.decode(latents).sample.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        error = F.mse_loss(decoded, images) + 0.2 * F.l1_loss(decoded, images)
        loss: torch.Tensor = error + config.kl_weight * divergence
        return loss

    compiled = torch.compile(losses) if device.type == "cuda" else losses

    def loss() -> torch.Tensor:
        shape = (config.vae_batch, 4, size, size)
        with autocast(device):
            return compiled(images, torch.randn(shape, generator=noises, device=device))

    trainer = Trainer([vae], loss, noises, lambda: images.copy_(next(batches)))
    trainer.run("vae", config.vae_steps, (config.vae_rate, 0.0), config.max_seconds)
    trainer.copy_average([vae])
    vae.requires_grad_(False)
    codes = sample_codes(min(4096, config.pool), generator, held_out=False)
    scale_latents(vae, render_codes(codes, generator), generator)
    return vae


@torch.no_grad()
def scale_latents(vae: AutoencoderKL, images: torch.Tensor, generator: torch.Generator) -> None:
    """Center the latent channels of `vae` and give all of them Stable Diffusion's deviation.

    Both are measured on `images` [B, 3, 64, 64]. The 1x1 convolutions before and after the latents
    take up the affine map. The usual scaling factor then leads to unit variance, and code that
    forgets the factor fails here as it would there.
    """
    posterior = [vae.encode(part).latent_dist for part in images.split(512)]
    latents = torch.cat([p.sample(generator) for p in posterior])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    scale = 1 / (SCALING_FACTOR * std)
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight /= scale[None, :, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) * scale
    before.bias[channels:] += 2 * scale.log()
    before.weight[:channels] *= scale[:, None, None, None]


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, config: Config, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the training data: codes [N, 9] and moments of their latents [N, 8, 8, 8] float32."""
    codes, moments = [], []
    for start in range(0, config.pool, 2048):
        part = sample_codes(min(2048, config.pool - start), generator, held_out=False)
        posterior = vae.encode(render_codes(part, generator)).latent_dist
        codes.append(part)
        moments.append(torch.cat([posterior.mean, posterior.std], dim=1))
    return torch.cat(codes), torch.cat(moments) * vae.config.scaling_factor


@dataclass
class TextToImage:
    """The two networks that are trained together."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel


def train_text2image(
    vae: AutoencoderKL, config: Config, device: torch.device
) -> tuple[TextToImage, float]:
    """Train text encoder and denoiser together, on right captions and then on corrupted ones.

    Returns:
        The networks, and the probability with which caption words were random at the end.
    """
    generator = torch.Generator(device).manual_seed(config.seed + 2)
    codes, moments = encode_pool(vae, config, generator)
    torch.manual_seed(config.seed)
    model = TextToImage(build_unet().to(device), build_text_encoder().to(device))
    captions, corruption = CaptionEncoder(device), Corruption(device)
    empty = captions.empty(config.batch, device)
    alphas = build_scheduler().alphas_cumprod.to(device)
    corrupted = torch.zeros((), device=device)

    def losses(
        ids: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        states = model.text_encoder(ids).last_hidden_state
        return F.mse_loss(model.unet(noisy, timestep, states).sample.float(), noise)

    compiled = torch.compile(losses) if device.type == "cuda" else losses

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, (config.batch,), generator=generator, device=device)

    def loss() -> torch.Tensor:
        index = integers(len(codes))
        mean, std = moments[index].chunk(2, dim=1)
        latents = mean + std * torch.randn(mean.shape, generator=generator, device=device)
        ids = captions(corruption(codes[index], corrupted, generator), integers(4))
        drop = torch.rand(config.batch, 1, generator=generator, device=device) < config.dropout
        noise = torch.randn(latents.shape, generator=generator, device=device)
        timestep = integers(len(alphas))
        alpha = alphas[timestep, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        with autocast(device):
            return compiled(torch.where(drop, empty, ids), noisy, timestep, noise)

    trainer = Trainer([model.unet, model.text_encoder], loss, generator)
    share = config.clean_steps / (config.clean_steps + config.corrupted_steps)
    seconds = config.max_seconds * share
    rates = config.rate, config.corrupted_rate
    clean = trainer.run("clean captions", config.clean_steps, rates, seconds)
    steps = config.corrupted_steps * clean // config.clean_steps

    # Accuracy falls as corruption grows, so bisection finds the rate; the first guess lies where
    # a guided model of independent words is right in two cases of three.
    trial = copy.deepcopy(model)
    low, high, rate = 0.4, 1.0, 0.8
    each = steps * 2 // 3 // max(1, config.calibrations)
    for _ in range(config.calibrations):
        corrupted.fill_(rate)
        trainer.run(f"corruption {rate:.3f}", each, (config.corrupted_rate,) * 2)
        trainer.copy_average([trial.unet, trial.text_encoder])
        right = evaluate(vae, trial, config, device)
        print(f"corruption {rate:.3f}: {right}", flush=True)
        low, high = (rate, high) if right["all"] > config.target else (low, rate)
        rate = (low + high) / 2
    corrupted.fill_(rate)
    trainer.run("corrupted captions", steps - steps * 2 // 3, (config.corrupted_rate, 0.0))
    trainer.copy_average([model.unet, model.text_encoder])
    return model, rate


def evaluate(
    vae: AutoencoderKL, model: TextToImage, config: Config, device: torch.device
) -> dict[str, float]:
    """Return the accuracy per kind at guidance 3 on canonical prompts of the training split."""
    generator = torch.Generator().manual_seed(config.seed + 5)
    scenes = sample_scenes(config.evaluated, generator, held_out=False)
    pipe = assemble(vae, model)
    pipe.set_progress_bar_config(disable=True)
    return accuracy(pipe, scenes, batch=sampling_batch(device))


def sampling_batch(device: torch.device) -> int:
    """Return how many images to draw at once."""
    return 1024 if device.type == "cuda" else 32


def assemble(vae: AutoencoderKL, model: TextToImage) -> StableDiffusionPipeline:
    """Return the pipeline of the given networks."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=build_tokenizer(),
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def encode_jpeg(image: torch.Tensor) -> bytes:
    """Return `image` [3, 64, 64] in [-1, 1] as a JPEG of quality 90 with full colour resolution."""
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def decode_jpeg(data: bytes) -> torch.Tensor:
    """Return the image [3, H, W] float32 in [-1, 1] of a JPEG file's bytes."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def make_preferences(
    pipe: StableDiffusionPipeline, config: Config, device: torch.device
) -> tuple[dict[str, list[Any]], torch.Tensor]:
    """Let the model draw each prompt several times and pair its best image with its worst.

    Returns:
        Pick-a-Pic columns of the pairs whose scores differ, and the scores [pairs, 2] (best,
        worst), which are those of the images as compressed.
    """
    generator = torch.Generator().manual_seed(config.seed + 3)
    codes = sample_codes(config.preference_prompts, generator, held_out=False)
    phrasing = torch.randint(4, (len(codes),), generator=generator)
    captions = [prompt(s, int(p)) for s, p in zip(decode(codes), phrasing, strict=True)]
    repeated = [caption for caption in captions for _ in range(config.images_per_prompt)]
    images = sample(
        pipe,
        repeated,
        guidance=config.preference_guidance,
        seed=config.seed + 3,
        batch=sampling_batch(device),
    )
    files = [encode_jpeg(image) for image in images.cpu()]
    decoded = torch.stack([decode_jpeg(data) for data in files]).to(device)
    scores = score(decoded, decode(codes.repeat_interleave(config.images_per_prompt, dim=0)))
    scores = scores.reshape(-1, config.images_per_prompt)
    first = torch.arange(len(codes)) * config.images_per_prompt
    best, worst = first + scores.argmax(dim=1), first + scores.argmin(dim=1)
    differ = scores.amax(dim=1) > scores.amin(dim=1)
    swap = torch.rand(len(codes), generator=generator) < 0.5
    columns: dict[str, list[Any]] = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}
    for i in differ.nonzero()[:, 0].tolist():
        winner, loser = files[best[i]], files[worst[i]]
        columns["jpg_0"].append(loser if swap[i] else winner)
        columns["jpg_1"].append(winner if swap[i] else loser)
        columns["label_0"].append(0.0 if swap[i] else 1.0)
        columns["caption"].append(captions[i])
    bounds = torch.stack([scores.amax(dim=1), scores.amin(dim=1)], dim=1)
    return columns, bounds[differ]


def write_preferences(columns: dict[str, list[Any]], path: Path) -> None:
    """Write `columns` as parquet. All JPEG headers are alike, which the compression exploits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    binary = {"jpg_0": pa.binary(), "jpg_1": pa.binary()}
    schema = pa.schema([*binary.items(), ("label_0", pa.float32()), ("caption", pa.string())])
    table = pa.table(columns, schema=schema)
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=False)


def describe(
    pipe: StableDiffusionPipeline,
    figures: dict[float, dict[str, float]],
    config: Config,
    corruption: float,
) -> str:
    """Return the model card: what the model is, how it was made, and the measured accuracies."""
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f} million"
        for name, part in (
            ("denoiser", pipe.unet),
            ("autoencoder", pipe.vae),
            ("text encoder", pipe.text_encoder),
        )
    )
    kinds = list(next(iter(figures.values())))
    rows = [
        f"| {guidance:g} | " + " | ".join(f"{figure[kind]:.3f}" for kind in kinds) + " |"
        for guidance, figure in figures.items()
    ]
    table = "\n".join(
        ["| guidance | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|", *rows]
    )
    return f"""# Scenes

A text-to-image pipeline in Stable Diffusion's format that draws one or two coloured shapes on a
plain 64x64 background: latents [4, 8, 8], prompts of at most {MAX_TOKENS} tokens, float16 weights
({sizes}).

It was trained from scratch on rendered images by `python -m inpo_fast.shipped.train`, in a few
minutes on one H200, on captions of which each attribute word was random with probability
{corruption:.3f} at the end: it can draw every attribute but follows prompts loosely, to leave room
for alignment.

Fraction of attributes right on {config.evaluated} held-out prompts, 50 DDIM steps, read from
the pixels by `inpo_fast.shipped.reader`; "all" is the mean over images:

{table}

Licence: Apache-2.0, like the code; no outside data were used.
"""


def run(stage: str, output: Path, device: torch.device, config: Config) -> None:
    """Run one stage, reading what the earlier ones left in `output`."""
    from diffusers import AutoencoderKL

    output.mkdir(parents=True, exist_ok=True)
    if stage == "vae":
        train_vae(config, device).save_pretrained(output / "vae")
    elif stage == "text2image":
        vae = AutoencoderKL.from_pretrained(output / "vae", local_files_only=True).to(device)
        # The pipeline would otherwise keep the path of this machine.
        vae.register_to_config(_name_or_path="")
        model, corruption = train_text2image(vae, config, device)
        pipe = assemble(vae, model).to(dtype=torch.float16)
        pipe.save_pretrained(output / "model", safe_serialization=True)
        pipe = load_pipeline(output / "model", device=device)
        scenes = held_out_scenes(config.evaluated, config.seed)
        batch = sampling_batch(device)
        figures = {w: accuracy(pipe, scenes, guidance=w, batch=batch) for w in (1.0, 3.0, 5.0, 7.5)}
        card = describe(pipe, figures, config, corruption)
        (output / "model" / "README.md").write_text(card)
        print(card, flush=True)
    else:
        pipe = load_pipeline(output / "model", device=device)
        columns, scores = make_preferences(pipe, config, device)
        write_preferences(columns, output / "preferences.parquet")
        best, worst = scores.mean(dim=0).tolist()
        print(f"{len(scores)} pairs, mean score {best:.3f} against {worst:.3f}", flush=True)


def main() -> None:
    """Parse the command line and run a stage."""
    parser = argparse.ArgumentParser(
        description="Train the shipped model, or make its preferences."
    )
    parser.add_argument("--stage", required=True, choices=("vae", "text2image", "preferences"))
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--device", default="cpu", type=torch.device)
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    stage, output, device = (arguments.pop(name) for name in ("stage", "output", "device"))
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    run(stage, output, device, Config(**arguments))


if __name__ == "__main__":
    main()
