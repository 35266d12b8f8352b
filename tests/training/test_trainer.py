"""Training end to end on tiny models: what is learnt, what is kept, what is written."""

import dataclasses
import io
import json
import math
import re
from collections import Counter

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from inpo_fast import ops
from inpo_fast.losses import OBJECTIVES
from inpo_fast.training import policy
from inpo_fast.training.batch import PairBatch
from inpo_fast.training.config import ConfigError
from inpo_fast.training.inversion import SOURCES
from inpo_fast.training.models import load_model
from inpo_fast.training.optimization import TrainingError
from inpo_fast.training.pairs import DataError
from inpo_fast.training.trainer import PreferenceTrainer
from inpo_fast.training.validation import draw_images

from . import samples, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def uncounted(request, monkeypatch):
    """Counting FLOPs takes longer than the training here."""
    if "family" not in request.fixturenames:
        monkeypatch.setattr("inpo_fast.training.step.count_flops", lambda _: (1, 2))


def trainer(model, output, data=None, **changes):
    return PreferenceTrainer(tiny.config(model, output, **changes), dataset=data or tiny.pairs())


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_policy_starts_as_the_reference_to_the_bit(model, tmp_path, rank, precision):
    run = trainer(model, tmp_path, rank=rank, mixed_precision=precision, max_train_steps=1)
    (first,) = run.train()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5
    assert first["margin_mean"] == first["margin_std"] == 0
    assert first["policy_winner"] == first["reference_winner"] > 0
    assert first["policy_loser"] == first["reference_loser"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny.unet, tiny.unet_xl])
def test_policy_and_reference_compute_from_the_same_numbers(make, dtype):
    """In every 16-bit type, although a wholly trained policy has float32 weights."""
    noise, text = torch.randn(2, 4, 8, 8), torch.randn(2, tiny.TEXT, tiny.WIDTH)
    added = {"text_embeds": text[:, 0], "time_ids": torch.full((2, 6), 64.0)}
    lora = {"rank": 2, "alpha": 2, "targets": ("to_q", "to_out.0"), "seed": 0}
    for pair in (policy.full(make(), dtype), policy.lora(make(), dtype, **lora)):
        with torch.autocast("cpu", dtype), torch.no_grad():
            ours, theirs = (
                module(noise, torch.tensor([3, 700]), text, added_cond_kwargs=added).sample
                for module in pair
            )
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)
    trained, frozen = policy.full(make(), dtype)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    # matrices are 16-bit; what is left are norms, which autocast computes in float32
    wide = sum(p.numel() for p in frozen.parameters() if p.dtype == torch.float32)
    assert wide < sum(p.numel() for p in frozen.parameters()) / 10


def test_half_precision_needs_a_loss_scale(model, tmp_path):
    with pytest.raises(ConfigError, match=r"mixed_precision=fp16 needs an accelerator .*bf16"):
        trainer(model, tmp_path, mixed_precision="fp16", use_cpu=True)


@pytest.mark.parametrize("rank", [None, 2])
def test_training_learns_the_preference_and_leaves_the_reference(model, tmp_path, rank):
    run = trainer(
        model,
        tmp_path,
        rank=rank,
        loss_type="dpo",
        beta_dpo=100.0,
        max_train_steps=40,
        train_batch_size=6,
        learning_rate=3e-3 if rank is None else 3e-2,
    )
    before = weights(run.learner.networks.reference)
    history = run.train()
    assert sum(row["loss"] for row in history[-5:]) / 5 < 0.6
    assert sum(row["accuracy"] for row in history[-5:]) / 5 > 0.75
    after = weights(run.learner.networks.reference)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_lora_holds_the_denoiser_once(model, tmp_path):
    run = trainer(model, tmp_path, rank=2)
    networks = run.learner.networks
    base = sum(p.numel() for p in tiny.unet().parameters())
    adapters = sum(p.numel() for p in run.parameters)
    tensors = [*networks.policy.parameters(), *networks.reference.parameters()]
    held = {tensor.data_ptr(): tensor.numel() for tensor in tensors}
    assert sum(held.values()) == base + adapters
    assert 0 < adapters < base / 4
    # and it computes what the base computes, to the bit, whatever the adapters are
    run.train()
    noise = torch.randn(2, 4, 8, 8)
    text = torch.randn(2, tiny.TEXT, tiny.WIDTH)
    from_disk = tiny.unet().eval()(noise, torch.tensor([3, 700]), text).sample
    assert torch.equal(networks.reference(noise, torch.tensor([3, 700]), text).sample, from_disk)
    assert not torch.equal(networks.policy(noise, torch.tensor([3, 700]), text).sample, from_disk)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_trains_by_lora(tmp_path, family):
    folder = tiny.save_pipeline(tmp_path / "model", family)
    run = trainer(
        folder,
        tmp_path / "out",
        tiny.pairs(xl=family == "StableDiffusionXLPipeline"),
        rank=2,
        max_train_steps=2,
        inversion_steps=2,
        learning_rate=1e-2,
    )
    history = run.train()
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["margin_mean"] == 0
    assert history[1]["margin_mean"] != 0
    assert history[1]["mfu"] > 0
    component, _ = tiny.FAMILIES[family]
    pipe = tiny.load_pipeline(folder)
    pipe.load_lora_weights(tmp_path / "out")
    loaded = getattr(pipe, component)
    (name,) = loaded.peft_config
    assert loaded.peft_config[name].r == 2
    theirs = {k.replace(f".{name}.", ".default."): v for k, v in loaded.state_dict().items()}
    mine = run.policy.state_dict()
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], value) for name, value in mine.items())


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_trained_denoiser_loads_in_diffusers(tmp_path, family):
    from diffusers import UNet2DConditionModel

    folder = tiny.save_pipeline(tmp_path / "model", family)
    run = trainer(folder, tmp_path / "out", tiny.pairs(xl=family != "StableDiffusionPipeline"))
    run.train()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    mine = run.policy.state_dict()
    assert loaded.keys() == mine.keys()
    assert all(torch.equal(loaded[name], value) for name, value in mine.items())
    base = tiny.FAMILIES[family][1]().state_dict()
    assert any(not torch.equal(base[name], value) for name, value in mine.items())


def test_the_result_tells_how_it_was_made(model, tmp_path):
    trainer(model, tmp_path / "aligned", rank=2, dataset_name="pairs.parquet").train()
    settings = json.loads((tmp_path / "aligned" / "training_config.json").read_text())
    assert settings["steps"] == 3
    assert settings["rank"] == 2
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "aligned" / "README.md")
    assert {"lora", "text-to-image", "diffusers-training"} <= set(card.data.tags)
    for needed in (str(model), "pairs.parquet", "β: 2000.0", "optimiser steps: 3", "TODO"):
        assert (needed in card.text) == (needed != "TODO")


@pytest.mark.parametrize("source", ["ddim", "q_sample", "bdia", "renoise"])
def test_a_micro_batch_of_four_pairs_is_four_of_one(model, tmp_path, monkeypatch, source):
    """At equal timesteps and noise, which the run would draw anew for other micro-batches."""
    grid = [[100, 200, 250, 300], [500, 600, 650, 700]]
    pairs = tiny.pairs()

    def gradient(name, parts):
        accumulation = len(parts)
        run = trainer(
            model,
            tmp_path / name,
            latents=source,
            train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        )

        def path(clean, micro, rows):
            columns = [[row[pair] for pair in parts[micro]] * rows for row in grid]
            noise = [torch.Generator().manual_seed(pair) for pair in parts[micro]]
            return SOURCES[source](clean, columns, run.model.schedule, generator=noise)

        monkeypatch.setattr(run.learner, "_path", path)
        for micro, part in enumerate(parts):
            latents = torch.cat([pairs._mean[part, 0], pairs._mean[part, 1]])
            text = {name: value[part] for name, value in pairs._text.items()}
            index = torch.tensor(part)
            batch = PairBatch(latents, text, None, torch.ones(len(part)), index, 0)
            run.learner.learn(batch, micro, last=micro == accumulation - 1)
        return {n: p.grad for n, p in run.policy.named_parameters() if p.grad is not None}

    whole, parts = gradient("a", [[0, 1, 2, 3]]), gradient("b", [[0], [1], [2], [3]])
    assert whole.keys() == parts.keys()
    total = torch.stack([g.norm() for g in whole.values()]).norm()
    assert total > 0
    # the same float32 terms in another order, through convolutions of another batch size
    assert all((whole[n] - parts[n]).norm() <= 1e-5 * total for n in whole)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "smpo", "dmpo", "dspo", "mapo", "kto", "sft"])
def test_every_objective_trains(model, tmp_path, loss):
    beta = {} if loss == "sft" else {"beta_dpo": 1.0}
    run = trainer(model, tmp_path, loss_type=loss, max_train_steps=2, inversion_steps=2, **beta)
    history = run.train()
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
    assert (run.learner.networks.reference is None) == (loss in ("mapo", "sft"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_trained_lora_can_be_scaled(model, tmp_path, precision):
    run = trainer(
        model, tmp_path, rank=2, mixed_precision=precision, max_train_steps=1, learning_rate=0.1
    )
    run.train()
    given = (torch.ones(1, 4, 8, 8), 7, torch.ones(1, 3, tiny.WIDTH))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        whole, none, base = (
            net(*given, cross_attention_kwargs=scale, return_dict=False)[0]
            for net, scale in (
                (run.policy, {"scale": 1.0}),
                (run.policy, {"scale": 0.0}),
                (run.learner.networks.reference, None),
            )
        )
    assert torch.equal(none, base) and not torch.equal(whole, base)


@pytest.mark.parametrize("loss", ["inpo", "dpo", "ipo", "smpo", "dmpo", "mapo", "kto"])
def test_every_preference_objective_prefers_the_winners(model, tmp_path, loss):
    run = trainer(
        *(model, tmp_path),
        loss_type=loss,
        beta_dpo=10.0,
        latents="q_sample",
        train_batch_size=tiny.PAIRS,
        learning_rate=3e-3,
    )
    run.train()
    batch = next(run.data.loader(run.order))
    generator = torch.Generator().manual_seed(5)
    levels = [[500] * 2 * tiny.PAIRS]
    path = SOURCES["q_sample"](batch.latents, levels, run.model.schedule, generator=generator)
    (point,) = path.run(run.policy)
    text = batch.paired_text["prompt_embeds"]
    reference = tiny.unet()
    with torch.no_grad():
        ours, theirs = (
            net(point.latents, point.timesteps, text).sample for net in (run.policy, reference)
        )
    errors = ops.preference_errors(ours, theirs, point.target)
    winners, losers = (errors.e_ref - errors.e_theta).chunk(2)
    assert winners.mean() > losers.mean() + 1e-4


def handed_over(run):
    """What every micro-batch of a run hands to its objective: outputs, target, settings."""
    seen, function = [], run.learner.objective.function

    def spy(policy, reference, target, **settings):
        seen.append((policy.detach(), reference, target, settings))
        return function(policy, reference, target, **settings)

    run.learner.objective = dataclasses.replace(run.learner.objective, function=spy)
    run.train()
    return seen


@pytest.mark.parametrize("better", [False, True])
def test_kto_compares_with_the_mean_gain_of_the_batch_where_it_is_positive(model, tmp_path, better):
    run = trainer(model, tmp_path, loss_type="kto", latents="q_sample", max_train_steps=1)
    # a policy that has learnt to say less, or more, than its reference, which says nothing yet
    torch.nn.init.zeros_(run.policy.conv_out.weight)
    torch.nn.init.zeros_(run.policy.conv_out.bias)
    worse = run.learner.networks.reference if better else run.policy
    torch.nn.init.constant_(worse.conv_out.bias, 1.0)
    ((policy_output, reference, target, given),) = handed_over(run)
    gain = ((reference - target) ** 2 - (policy_output - target) ** 2).mean()
    assert (gain > 0.1) == better and abs(gain) > 0.1
    assert given["kl"].item() == pytest.approx(gain.item() if better else 0.0, rel=1e-6)
    assert given["desirable"].tolist() == [True, True, False, False]


def test_inversion_dpo_is_told_the_levels_of_its_samples(model, tmp_path):
    from diffusers import DDIMScheduler

    folder, _ = moved(tmp_path / "sft")
    settings = {"unet_init": str(folder), "latents": "q_sample"}
    run = trainer(model, tmp_path / "out", loss_type="inversion-dpo", **settings)
    predict, times = run.learner._predict, []

    def watched(network, call, told):
        times.append(call.timesteps)
        return predict(network, call, told)

    run.learner._predict = watched
    table = DDIMScheduler.from_pretrained(model, subfolder="scheduler").alphas_cumprod
    levels = [given["alphas_cumprod"] for *_, given in handed_over(run)]
    # policy and reference are called at each
    assert [t.tolist() for t in times[::2]] == [t.tolist() for t in times[1::2]]
    for level, t in zip(levels, times[::2], strict=True):
        assert torch.allclose(level, table[t], rtol=1e-6, atol=0)


def test_inversion_dpo_divides_by_no_level_without_signal(tmp_path):
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = tiny.save_pipeline(tmp_path / "model", **zero)
    folder, _ = moved(tmp_path / "sft")
    with pytest.raises(ConfigError, match="inversion-dpo divides by ᾱ"):
        trainer(model, tmp_path / "out", loss_type="inversion-dpo", unet_init=str(folder))


def moved(folder, component="unet", seed=1):
    """The tiny denoiser with other weights, as a folder or a pipeline's has it."""
    unet = tiny.unet()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(folder / component)
    return folder, weights(unet)


@pytest.mark.parametrize("component", ["unet", "."])
@pytest.mark.parametrize("rank", [None, 2])
def test_policy_and_reference_start_from_another_denoiser(model, tmp_path, rank, component):
    folder, wanted = moved(tmp_path / "sft", component)
    run = trainer(model, tmp_path / "out", unet_init=str(folder), rank=rank, max_train_steps=1)
    assert run.train()[0]["margin_mean"] == 0
    kept = run.learner.networks.reference.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in wanted.items())
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "out" / "README.md").text
    assert f"started from: {folder}" in card
    # a LoRA is one of these weights, not of the pipeline's
    assert (f'pipe.unet = type(pipe.unet).from_pretrained("{folder}"' in card) == (rank == 2)


def test_inversion_dpo_compares_another_denoiser_with_the_pipelines(model, tmp_path):
    with pytest.raises(ConfigError, match=r"inversion-dpo has no gradient .* needs unet_init"):
        trainer(model, tmp_path, loss_type="inversion-dpo")
    folder, start = moved(tmp_path / "sft")
    settings = {"loss_type": "inversion-dpo", "unet_init": str(folder), "inversion_steps": 2}
    with pytest.raises(ConfigError, match=r"and no rank; .*rank=2"):
        trainer(model, tmp_path, rank=2, **settings)
    run = trainer(model, tmp_path / "out", **settings)
    assert all(torch.equal(v, start[name]) for name, v in run.policy.state_dict().items())
    history = run.train()
    assert all(row["grad_norm"] > 0 for row in history)
    assert history[0]["margin_std"] > 0
    base = tiny.unet().state_dict()
    kept = run.learner.networks.reference.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in base.items())


@pytest.mark.parametrize("source", ["ddim", "bdia", "renoise"])
def test_one_path_trains_at_several_levels(model, tmp_path, source):
    run = trainer(model, tmp_path, latents=source, samples_per_inversion=3, inversion_steps=5)
    history = run.train()
    assert history[0]["margin_mean"] == 0
    assert history[-1]["margin_mean"] != 0


@pytest.mark.parametrize("ties", ["soft", "drop"])
@pytest.mark.parametrize("loss", [n for n, o in OBJECTIVES.items() if o.probability])
def test_a_soft_tie_has_no_gradient_at_the_start(model, tmp_path, loss, ties):
    """By the labels of the pairs that are given, whatever would be done with ties of others."""
    data = tiny.pairs()
    data._label.fill_(0.5)
    options = {"loss_type": loss, "ties": ties, "inversion_steps": 1, "max_train_steps": 1}
    options |= {"train_batch_size": len(data)}
    assert trainer(model, tmp_path / "a", data, **options).train()[0]["grad_norm"] == 0
    data._label[0] = 1
    assert trainer(model, tmp_path / "b", data, **options).train()[0]["grad_norm"] > 0


@pytest.mark.parametrize("label", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("loss", ["mapo", "sft"])
def test_soft_labels_need_an_objective_that_takes_probabilities(model, tmp_path, loss, label):
    data = tiny.pairs()
    data._label[3] = label
    words = "dataset with labels other than 1 needs .* probabilities, one of inpo, smpo, dpo, got "
    with pytest.raises(ConfigError, match=words + loss):
        trainer(model, tmp_path, data, loss_type=loss)


def test_epochs_that_end_before_the_learning_rate_has_risen(model, tmp_path):
    options = {"max_train_steps": None, "train_batch_size": 12, "lr_warmup_steps": 100}
    with pytest.raises(ConfigError, match="lr_warmup_steps=100 leaves a run of 1 optimiser steps"):
        trainer(model, tmp_path, **options)
    with pytest.warns(UserWarning, match="lr_warmup_steps=100 is not over .* after 2 optimiser"):
        trainer(model, tmp_path, num_train_epochs=2, **options)


def test_epochs_and_the_scaled_learning_rate(model, tmp_path):
    run = trainer(
        model,
        tmp_path,
        max_train_steps=None,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        inversion_steps=1,
        learning_rate=1e-6,
        scale_lr=True,
    )
    history = run.train()
    # 12 pairs are 6 micro-batches of 2, and 3 steps, an epoch
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[0]["lr"] == pytest.approx(1e-6 * 2 * 2)


def test_settings_that_should_not_change_the_bits_do_not(model, tmp_path):
    """Gradient checkpointing recomputes the same numbers; the number of workers changes none."""
    plain = trainer(model, tmp_path / "a", rank=2)
    other = trainer(model, tmp_path / "b", rank=2, gradient_checkpointing=True)
    calls = []
    for run in (plain, other):
        count = Counter()
        # behind adapters: what comes before them has no backward
        block = run.policy.up_blocks[-1].resnets[0]
        block.register_forward_pre_hook(lambda *_, c=count: c.update(["block"]))
        run.train()
        calls.append(count["block"])
    # once more in every backward, of which there are three
    assert calls[1] == calls[0] + 3
    mine, theirs = plain.policy.state_dict(), other.policy.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_train_alike_and_leave_no_trace(
    checkpointing, model, tmp_path, monkeypatch
):
    """With graphs captured but not generated, so that seconds suffice and the bits are known."""
    compile_module = torch.nn.Module.compile

    def captured(self, *, dynamic, options):
        assert options == {"emulate_precision_casts": True}
        compile_module(self, dynamic=dynamic, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", captured)
    torch._dynamo.reset()
    settings = {"rank": 2, "inversion_steps": 1, "max_train_steps": 2}
    settings["gradient_checkpointing"] = checkpointing
    plain = trainer(model, tmp_path / "plain", **settings)
    compiled = trainer(model, tmp_path / "c", compile="blocks", **settings)
    logged, again = plain.train(), compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3
    # policy and reference run through graphs of their own, with the same bits
    assert again[0]["policy_winner"] == again[0]["reference_winner"]
    assert again[0]["loss"] == logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert again[0]["margin_mean"] == 0.0
    # and those of no compilation
    assert again[0]["policy_winner"] == logged[0]["policy_winner"]
    # the decomposed backward rounds in another order
    assert again[1]["policy_winner"] == pytest.approx(logged[1]["policy_winner"], rel=1e-4)
    names = compiled.policy.state_dict().keys()
    assert names == plain.policy.state_dict().keys()
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.parametrize("free", [True, False])
def test_what_has_a_gradient_is_deterministic(model, tmp_path, monkeypatch, free):
    run = trainer(model, tmp_path, nondeterministic=free, max_train_steps=1)
    seen = []
    predict = run.learner._predict

    def watched(network, call, told):
        gradient = call.target is not None
        seen.append((gradient, torch.are_deterministic_algorithms_enabled()))
        return predict(network, call, told)

    monkeypatch.setattr(run.learner, "_predict", watched)
    run.train()
    assert (False, False) in seen
    # policy and reference
    assert {strict for gradient, strict in seen if gradient} == {not free}
    assert {strict for gradient, strict in seen if not gradient} == {False}
    assert not torch.are_deterministic_algorithms_enabled()


class Casts(TorchDispatchMode):
    """Counts how often a tensor is converted."""

    def __init__(self, tensor):
        super().__init__()
        self.place, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function == torch.ops.aten._to_copy.default:
            self.count += args[0].data_ptr() == self.place
        return function(*args, **kwargs or {})


def test_an_inversion_rounds_the_weights_once(model, tmp_path):
    run = trainer(model, tmp_path, mixed_precision="bf16", inversion_steps=4, inversion_eta=0.1)
    batch = next(run.data.loader(run.order))
    weight = run.policy.conv_in.weight
    depths = set()
    for micro in range(8):
        path = run.learner._path(batch.latents, micro, 2)
        depths.add(path_length := sum(1 for _ in driven(path)))
        run.optimizer.zero_grad()
        with Casts(weight) as casts:
            run.learner.learn(batch, micro, last=True)
        # with gradient, and without where there is an inversion
        assert casts.count == 1 + (path_length > 1)
        assert weight.grad.abs().max() > 0
        assert not torch.is_autocast_enabled("cpu")
    assert max(depths) > 3


def driven(path):
    for call in path:
        yield call
        if not call.last:
            path.give(torch.zeros_like(call.latents))


class Calls:
    """In the place of graphs, which need a GPU."""

    def __init__(self):
        self.names, self.learnt = [], []

    def call(self, name, function, *given):
        self.names.append(name)
        with torch.no_grad():
            return function(*(value.clone() for value in given))

    def learn(self, model, function, *given):
        self.learnt.append(model)
        return function(*(value.clone() for value in given))


@pytest.mark.parametrize(
    ("name", "precision", "rank"),
    [
        ("StableDiffusionPipeline", "bf16", None),
        ("StableDiffusionPipeline", "no", None),
        ("StableDiffusionXLPipeline", "bf16", 2),
        ("FluxPipeline", "bf16", 2),
    ],
)
def test_what_graphs_compute_is_what_the_calls_do(tmp_path, name, precision, rank):
    """To the bit, over steps that change the weights."""
    saved = tiny.save_pipeline(tmp_path / "model", name)
    settings = {"mixed_precision": precision, "rank": rank, "max_train_steps": 3}
    settings |= {"inversion_steps": 4, "samples_per_inversion": 2}
    logged = []
    for graphs in (None, Calls()):
        data = tiny.pairs(xl=name == "StableDiffusionXLPipeline")
        run = trainer(saved, tmp_path / str(graphs is None), data, **settings)
        run.learner.graphs = graphs
        logged.append(run.train())
    keys = [key for key in logged[0][0] if "per_second" not in key and key != "mfu"]
    assert [[row[key] for key in keys] for row in logged[0]] == [
        [row[key] for key in keys] for row in logged[1]
    ]
    assert logged[0][-1]["margin_mean"] != 0
    inverting, reference = graphs.names[0], graphs.names[-1]
    assert set(graphs.names) == {inverting, reference}
    assert reference is run.learner.networks.reference
    assert (inverting is run.policy) == (precision == "no")
    assert graphs.learnt == [run.policy] * 6


def test_fused_layers_need_a_gpu(model, tmp_path):
    with pytest.raises(ConfigError, match="fused_layers needs Triton: "):
        trainer(model, tmp_path, fused_layers=True)


def test_a_pipeline_that_checkpoints_already_does_it_as_graphs_can(model, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    nothing = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    parts = dict.fromkeys((*nothing, "image_encoder"))
    pipeline = StableDiffusionPipeline.from_pretrained(model, **parts)
    pipeline.unet.enable_gradient_checkpointing()
    config = tiny.config(model, tmp_path / "out", max_train_steps=1)
    run = PreferenceTrainer(config, pipeline, tiny.pairs())
    asked = []
    monkeypatch.setattr("torch.get_rng_state", lambda: asked.append(1))
    (row,) = run.train()
    assert math.isfinite(row["loss"]) and not asked


def test_cuda_graphs_need_a_gpu(model, tmp_path):
    with pytest.raises(ConfigError, match="cuda_graphs needs a GPU, got the device cpu"):
        trainer(model, tmp_path, cuda_graphs=True)


def test_a_lora_file_does_not_depend_on_the_process(model, tmp_path):
    """Names in a set have an order that is drawn when Python starts."""
    targets = ("to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "net.2", "net.0.proj")
    trainer(model, tmp_path, rank=2, lora_target_modules=targets, max_train_steps=1).train()
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    assert adapter["unet.target_modules"] == sorted(targets)


def test_a_lora_with_kohyas_names(model, tmp_path):
    from safetensors.torch import load_file

    trainer(model, tmp_path / "mine", rank=2, output_kohya_format=True, max_train_steps=1).train()
    kohya = load_file(tmp_path / "mine" / "mine_kohya.safetensors")
    ours = load_file(tmp_path / "mine" / "pytorch_lora_weights.safetensors")
    layers = {name.split(".")[0] for name in kohya}
    assert len(kohya) == 3 * len(layers) == 3 * len(ours) / 2
    assert all(name.startswith("lora_unet_") for name in layers)
    ends = {name.split(".", 1)[1] for name in kohya}
    assert ends == {"lora_down.weight", "lora_up.weight", "alpha"}


def test_a_cache_trains_as_live_pairs_do_and_loads_no_encoder(tmp_path, monkeypatch):
    from inpo_fast.cli import main
    from inpo_fast.shipped import model_path, preferences_path
    from inpo_fast.training.encoders import Encoders

    # both take the size of the model, where none is named
    settings = {"rank": 2, "max_train_steps": 2, "inversion_steps": 1}
    live = tiny.config(
        *(model_path(), tmp_path / "live"),
        dataset_name=str(preferences_path()),
        max_train_samples=8,
        **settings,
    )
    logged = PreferenceTrainer(live).train()
    flags = ["--dtype", "float32", "--max_train_samples", "8"]
    where = ["--model", str(model_path()), "--output", str(tmp_path / "cache"), "--device", "cpu"]
    assert main(["cache", str(preferences_path()), *where, *flags]) == 0
    monkeypatch.delattr(Encoders, "load")
    cached = tiny.config(
        model_path(), tmp_path / "cached", dataset_name=str(tmp_path / "cache"), **settings
    )
    again = PreferenceTrainer(cached).train()
    for key in ("loss", "policy_winner", "grad_norm"):
        assert [row[key] for row in again] == [row[key] for row in logged]
    with pytest.raises(DataError, match="does not fit this run"):
        PreferenceTrainer(
            dataclasses.replace(cached, output_dir=str(tmp_path / "x"), no_hflip=True)
        )


def test_the_result_is_uploaded_without_checkpoints(model, tmp_path, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub

    seen = {}

    def create(name, exist_ok):
        assert exist_ok
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload(**given):
        seen.update(given)
        folder = given["folder_path"]
        kept = huggingface_hub.utils.filter_repo_objects(
            (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
            ignore_patterns=given["ignore_patterns"],
        )
        seen["files"] = sorted(kept)

    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    run = trainer(model, tmp_path / "mine", rank=2, push_to_hub=True, checkpointing_steps=1)
    (run.folder / "validation").mkdir(parents=True)
    (run.folder / "validation" / "000001-0-0.png").touch()
    run.train()
    assert seen["repo_id"] == "me/mine"
    assert seen["files"] == [
        "README.md",
        "pytorch_lora_weights.safetensors",
        "training_config.json",
    ]


def test_the_official_inversion(model, tmp_path):
    history = trainer(model, tmp_path, latents="official", train_batch_size=1).train()
    assert history[0]["margin_mean"] == 0
    assert all(math.isfinite(row["loss"]) for row in history)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("epsilon", {"latents": "official", "mixed_precision": "bf16"}, "dtype must hold 1 − ᾱ"),
        ("v_prediction", {"latents": "official"}, "schedule of an epsilon model, got vp and v_pre"),
        ("sample", {"latents": "ddim"}, "must be epsilon, v_prediction or flow, got 'sample'"),
        ("sample", {"loss_type": "dpo"}, "must be epsilon, v_prediction or flow, got 'sample'"),
    ],
)
def test_latents_that_the_model_cannot_have(tmp_path, kind, settings, why):
    folder = tiny.save_pipeline(tmp_path / "model", prediction_type=kind)
    said = r"^latents=\w+ and mixed_precision=\w+ do not go with the model's noise levels: .*"
    with pytest.raises(ConfigError, match=said + why):
        trainer(folder, tmp_path / "out", **settings)


def test_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # --- as in the README
    from inpo_fast.shipped import load_pipeline, model_path, preferences_path
    from inpo_fast.training import PreferenceConfig, PreferenceTrainer

    config = PreferenceConfig(
        pretrained_model_name_or_path=str(model_path()),
        dataset_name=str(preferences_path()),
        max_train_samples=64,
        rank=8,
        learning_rate=1e-4,
        lr_warmup_steps=0,
        max_train_steps=2,
        output_dir="aligned",
    )
    PreferenceTrainer(config).train()

    pipe = load_pipeline()
    pipe.load_lora_weights("aligned")
    image = pipe("a large red circle").images[0]
    # ---
    assert image.size == (64, 64)


def shown(event):
    """The picture in an event of a tracker."""
    return Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")


def test_images_and_values_reach_the_tracker(tmp_path):
    """On the shipped pipeline, whose autoencoder and text encoder are not in memory otherwise."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from inpo_fast.shipped import model_path, preferences_path

    config = tiny.config(
        model_path(),
        tmp_path,
        dataset_name=str(preferences_path()),
        max_train_samples=4,
        rank=2,
        max_train_steps=2,
        inversion_steps=1,
        report_to="tensorboard",
        validation_prompts=("a large red circle",),
        validation_inference_steps=1,
        validation_steps=1,
        learning_rate=1e-30,
    )
    PreferenceTrainer(config).train()
    events = EventAccumulator(str(tmp_path / "logs" / "inpo-fast"))
    events.Reload()
    assert {"loss", "accuracy", "grad_norm", "lr", "mfu"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    first, second = events.Images("validation")
    # the same seed, and a policy that has hardly moved
    assert first.encoded_image_string == second.encoded_image_string
    # and files, for those who have no tracker
    files = sorted((tmp_path / "validation").iterdir())
    assert [path.name for path in files] == ["000001-0-0.png", "000002-0-0.png"]
    assert Image.open(files[0]).tobytes() == shown(first).tobytes()


@pytest.mark.parametrize("rank", [None, 2])
def test_fused_projections_are_refused(sdxl, tmp_path, rank):
    """They are copies, which the trained weights or their adapters would not change."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    config = tiny.config(sdxl, tmp_path, rank=rank, resolution=16)
    load_model(config, pipe, torch.float32)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ConfigError, match="fused QKV projections"):
        load_model(config, pipe, torch.float32)


@pytest.mark.parametrize("loaded", [False, True])
def test_validation_decodes_in_the_dtype_of_the_autoencoder(sdxl, tmp_path, monkeypatch, loaded):
    """SDXL's overflows in float16, so its pipeline makes it float32, which autocast would undo."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline

    monkeypatch.setattr(AutoencoderKL, "decode", watched := Watched(AutoencoderKL.decode))
    config = tiny.config(
        *(sdxl, tmp_path),
        rank=2,
        resolution=16,
        validation_prompts=("a", "b"),
        validation_inference_steps=1,
        num_validation_images=2,
    )
    given = StableDiffusionXLPipeline.from_pretrained(sdxl) if loaded else None
    pipe = load_model(config, given, torch.float16)
    policy.lora(pipe.denoiser, torch.float16, rank=2, alpha=2, targets=("to_q",), seed=0)
    images = draw_images(config, pipe, pipe.denoiser, torch.float16)
    assert images.shape == (4, 16, 16, 3)
    assert watched.calls == [(False, torch.float32)] * 2
    assert AutoencoderKL.decode is watched
    if loaded:
        assert "decode" not in vars(given.vae)


class Watched:
    """A method of an autoencoder that notes whether autocast is on, and its dtype."""

    def __init__(self, method):
        self.method, self.calls = method, []

    def __get__(self, vae, kind=None):
        def called(*args, **kwargs):
            self.calls.append((torch.is_autocast_enabled("cpu"), vae.dtype))
            return self.method(vae, *args, **kwargs)

        return self if vae is None else called


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_loss_that_is_not_finite_skips_its_step(model, tmp_path, optimizer):
    run = trainer(model, tmp_path, optimizer=optimizer, max_train_steps=3)
    healthy = run.data.loader

    def loader(*args, **kwargs):
        for number, batch in enumerate(healthy(*args, **kwargs)):
            bad = batch.latents * float("nan") if number == 1 else batch.latents
            yield PairBatch(bad, batch.text, None, batch.label, batch.index, batch.epoch)

    run.data.loader = loader
    seen = []
    run.optimizer.register_step_post_hook(lambda *_: seen.append(weights(run.policy)))
    history = run.train()
    assert [row["skipped_steps"] for row in history] == [0, 1, 1]
    assert math.isnan(history[1]["loss"])
    assert all(torch.isfinite(value).all() for value in run.policy.state_dict().values())
    if optimizer == "adamw":
        # the fused step was taken, and left everything as it was
        assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())
        assert {int(state["step"]) for state in run.optimizer.state.values()} == {2}
    else:
        assert len(seen) == 2


def test_training_stops_when_nothing_is_finite(model, tmp_path):
    data = tiny.pairs()
    data._mean.fill_(float("nan"))
    run = trainer(model, tmp_path, data, max_train_steps=50, max_nonfinite_steps=4, logging_steps=2)
    before = weights(run.policy)
    with pytest.raises(TrainingError, match=r"4 steps in a row .*max_nonfinite_steps 4.*lower"):
        run.train()
    assert run.step == 4
    assert all(torch.equal(value, before[name]) for name, value in run.policy.state_dict().items())


def test_the_average_of_the_weights_is_what_is_written(model, tmp_path):
    from diffusers import UNet2DConditionModel

    run = trainer(model, tmp_path, use_ema=True, ema_decay=0.5)
    trained = []
    run.optimizer.register_step_post_hook(lambda *_: trained.append(weights(run.policy)))
    run.train()
    written = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet").state_dict()
    name = "conv_in.weight"
    assert torch.equal(run.policy.state_dict()[name], trained[-1][name])
    assert not torch.equal(written[name], trained[-1][name])
    low, high = torch.stack([step[name] for step in trained]).aminmax(dim=0)
    # an average of the steps and of the start
    start = tiny.unet().state_dict()[name]
    assert (written[name] >= torch.minimum(low, start) - 1e-7).all()
    assert (written[name] <= torch.maximum(high, start) + 1e-7).all()


def test_out_of_memory_says_what_to_lower(model, tmp_path, monkeypatch):
    run = trainer(model, tmp_path, rank=None)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.learner, "learn", full)
    with pytest.raises(TrainingError, match=r"lower train_batch_size \(2\).*set gradient"):
        run.train()
    # weights and moments may be too much already
    monkeypatch.setattr("inpo_fast.training.trainer.make_optimizer", full)
    with pytest.raises(TrainingError, match=r"^too little memory: set gradient") as caught:
        trainer(model, tmp_path, train_batch_size=1, mixed_precision="bf16")
    # nothing that is so already, or that would not help
    for needless in ("train_batch_size", "mixed_precision", "cache"):
        assert needless not in str(caught.value)


def test_pairs_of_another_family(model, tmp_path):
    data = tiny.pairs()
    data._mean = data._mean.repeat(1, 1, 4, 1, 1)
    data.scaling = type(data.scaling)(torch.zeros(16), torch.ones(16))
    with pytest.raises(ConfigError, match="takes latents of 4 channels, got 16: the pairs were"):
        trainer(model, tmp_path, data).train()
    # Stable Diffusion's pairs have latents as SDXL's, and less beside them
    data = tiny.pairs()
    del data._text["pooled_prompt_embeds"], data._empty["pooled_prompt_embeds"]
    xl = tiny.save_pipeline(tmp_path / "xl", "StableDiffusionXLPipeline")
    wanted = "takes the text's pooled_prompt_embeds, got prompt_embeds, and time_ids, got none"
    with pytest.raises(ConfigError, match=wanted):
        trainer(xl, tmp_path / "b", data, rank=2).train()
    sd3 = tiny.save_pipeline(tmp_path / "sd3", "StableDiffusion3Pipeline")
    with pytest.raises(ConfigError, match=r"sides are multiples of 2, got \[3, 3\]"):
        trainer(sd3, tmp_path / "c", tiny.pairs(size=3), rank=2).train()


def test_sizes_that_no_token_covers(tmp_path):
    flux = tiny.save_pipeline(tmp_path / "flux", "FluxPipeline")
    config = tiny.config(flux, tmp_path / "out", rank=2, resolution=24, dataset_name="pairs")
    with pytest.raises(ConfigError, match=r"resolution .* multiples of 16 for a FluxPipeline"):
        PreferenceTrainer(config)


def test_a_model_that_does_not_say_its_size(tmp_path):
    folder = tiny.save_pipeline(tmp_path / "model")
    tiny.unet(sample_size=None).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match=r"^resolution must be given: .* has no sample_size"):
        trainer(folder, tmp_path / "out")


def test_the_command_reports_what_it_leaves_out(sd, tmp_path, capsys):
    from inpo_fast.cli import main

    pairs = samples.write_parquet(tmp_path / "pairs.parquet", samples.mixed_rows())
    flags = ["--pretrained_model_name_or_path", str(sd), "--dataset_name", str(pairs)]
    sizes = ["--resolution", "16", "--rank", "2", "--train_batch_size", "2"]
    steps = ["--max_train_steps", "1", "--lr_warmup_steps", "0"]
    assert main(["train", *flags, *sizes, *steps, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for line in (
        r"rows +10\n",
        r"usable pairs +7\n",
        r"ties +1\n",
        r"corrupt +2\n",
        r"corrupt rows\n +row 3 .+\n +row 7 ",
        r"\n1 pairs of an epoch fill no batch",
    ):
        assert re.search(line, printed), line


def test_a_cache_has_no_splits(model, tmp_path):
    (tmp_path / "key.json").write_text("{}")
    settings = {"dataset_name": str(tmp_path), "dataset_split_name": "train"}
    with pytest.raises(ConfigError, match="dataset_split_name must not be given with a cache"):
        PreferenceTrainer(tiny.config(model, tmp_path / "out", **settings))


def test_a_batch_larger_than_the_data(model, tmp_path):
    with pytest.raises(ConfigError, match="train_batch_size is too large"):
        trainer(model, tmp_path, train_batch_size=50)


def test_an_unknown_family(tmp_path):
    folder = tiny.save_pipeline(tmp_path / "model")
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("StableDiffusionPipeline", "KandinskyPipeline"))
    with pytest.raises(ConfigError, match="FluxPipeline, got KandinskyPipeline"):
        trainer(folder, tmp_path / "out")


def test_a_flow_model_is_trained_by_lora_only(tmp_path):
    folder = tiny.save_pipeline(tmp_path / "model", "FluxPipeline")
    with pytest.raises(ConfigError, match="rank must be given"):
        trainer(folder, tmp_path / "out")
