"""The pipeline comes back as it was: components, hooks, processors, adapters, modes, settings."""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from inpo_fast import Inversion, invert
from inpo_fast.pipelines.fingerprint import _CHUNK, _STEP, _checksum, fingerprint
from tests.pipelines import tiny


def modules(pipe):
    return {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def picture(pipe, weights=True):
    """Everything about a pipeline that a run could disturb."""
    parts = {}
    for name, module in modules(pipe).items():
        for path, part in module.named_modules():
            hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
            parts[name, path] = (
                id(part),
                part.training,
                id(getattr(part, "_hf_hook", None)),
                id(getattr(part, "processor", None)),
                [dict(h) for h in hooks],
                sorted(vars(part)),
            )
        for path, value in [*module.named_parameters(), *module.named_buffers()] * weights:
            state = (value.dtype, value.device, value.requires_grad, value.grad, value._version)
            parts[name, path, "weight"] = (id(value), state)
    scheduler = pipe.scheduler
    attributes = {k: v for k, v in vars(pipe).items() if not k.startswith("__")}
    tables = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(scheduler).items()
    }
    return parts, id(scheduler), copy.deepcopy(dict(scheduler.config)), attributes, tables


def same(before, after):
    *one, tables = before
    *other, now = after
    assert one == other
    assert tables.keys() == now.keys()
    for key, value in tables.items():
        equal = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert equal(value, now[key]), key


def use(pipe, **options):
    """All that a user does with an inversion."""
    inversion = invert(pipe, tiny.images(), "a cat", num_inference_steps=3, verify=True, **options)
    edited = inversion.edit("a dog", output_type="pt").images
    return inversion, edited


def test_group_offloading():
    pipe, plain = tiny.build("sd"), tiny.build("sd")
    for module in (pipe.unet, pipe.vae):
        module.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    (inversion, edited), (expected, image) = use(pipe), use(plain)
    assert inversion.bits_equal and inversion.state.equal(expected.state)
    assert torch.equal(edited, image)


def test_a_compiled_module_is_the_same_model():
    pipe, plain = tiny.build("sd"), tiny.build("sd")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    inversion, expected = use(pipe)[0], use(plain)[0]
    assert inversion.bits_equal and inversion.models == expected.models


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_nothing_changes(name, tmp_path):
    pipe = tiny.build(name)
    for part, encoder in modules(pipe).items():
        if part.startswith("text_encoder"):
            # transformers puts hooks of its own on an encoder when it is first asked for these
            encoder(torch.zeros(1, 4, dtype=torch.int64), output_hidden_states=True)
    options = {"control_image": tiny.images()} if name == "controlnet" else {}
    before = picture(pipe)
    inversion, _ = use(pipe, **options)
    inversion.save(tmp_path / "inversion")
    Inversion.load(tmp_path / "inversion", pipe)
    same(before, picture(pipe))


def test_null_text_leaves_no_gradient(pipe):
    before = picture(pipe)
    use(pipe, solver="null-text", num_inner_steps=2)
    same(before, picture(pipe))


def test_attention_processors_are_used_and_kept():
    pipe = tiny.build("sd")
    calls = []

    class Mine(AttnProcessor):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    pipe.unet.set_attn_processor(Mine())
    before = picture(pipe)
    inversion, _ = use(pipe)
    assert calls and inversion.bits_equal
    same(before, picture(pipe))


def test_lora_adapters_are_used_and_kept():
    pipe = tiny.build("sd")
    plain = use(pipe)[0]
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "mine")
    pipe.unet.eval()
    before = picture(pipe)
    adapted = use(pipe)[0]
    same(before, picture(pipe))
    assert adapted.bits_equal and not adapted.state.equal(plain.state)
    assert adapted.models["unet"] != plain.models["unet"]
    # switched off it is another model again, without a weight having changed
    pipe.unet.disable_adapters()
    off = use(pipe)[0]
    assert off.models["unet"] != adapted.models["unet"]
    assert off.state.equal(plain.state)


def test_modules_offloaded_one_by_one():
    """As `enable_model_cpu_offload` hooks them: every module is moved in by its call."""
    pipe, plain = tiny.build("sd"), tiny.build("sd")
    pipe._all_hooks = []
    hook = None
    for name in ("text_encoder", "unet", "vae"):
        _, hook = cpu_offload_with_hook(getattr(pipe, name), "cpu", prev_module_hook=hook)
        pipe._all_hooks.append(hook)
    before = picture(pipe)
    moved = []
    for hook in pipe._all_hooks:
        hook.offload = lambda hook=hook: moved.append(hook)
    (inversion, edited), (expected, image) = use(pipe), use(plain)
    assert moved[: len(pipe._all_hooks)] == pipe._all_hooks, "offloaded again after the run"
    assert inversion.bits_equal and inversion.state.equal(expected.state)
    assert torch.equal(edited, image)
    same(before, picture(pipe))


def test_weights_offloaded_one_by_one(tmp_path):
    """As `enable_sequential_cpu_offload`: between calls the weights are nowhere on a device."""
    pipe, plain = tiny.build("sd"), tiny.build("sd")
    for module in modules(pipe).values():
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    assert next(pipe.unet.parameters()).is_meta
    # every call of such a module makes new parameters of it
    before = picture(pipe, weights=False)
    (inversion, edited), (expected, image) = use(pipe), use(plain)
    assert inversion.bits_equal and inversion.state.equal(expected.state)
    assert torch.equal(edited, image)
    same(before, picture(pipe, weights=False))
    assert next(pipe.unet.parameters()).is_meta
    # the same weights are the same model, wherever they lie
    inversion.save(tmp_path / "inversion")
    assert Inversion.load(tmp_path / "inversion", plain).reconstruct().bits_equal


def test_xl_in_float16_with_offloaded_weights_says_what_to_load():
    pipe = tiny.build("sdxl").to(torch.float16)
    for module in modules(pipe).values():
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(ValueError, match="madebyollin/sdxl-vae-fp16-fix"):
        use(pipe)


def test_fingerprint_is_of_configuration_and_every_bit():
    module, other = tiny.build("sd").unet, tiny.build("sd").unet
    before = fingerprint(module)
    assert fingerprint(other) == before and fingerprint(module) == before
    weight = other.conv_in.weight
    for index in (0, weight.numel() - 1):
        changed = copy.deepcopy(other)
        with torch.no_grad():
            flat = changed.conv_in.weight.view(-1)
            flat[index] = torch.nextafter(flat[index], flat.new_tensor(2.0))
        assert fingerprint(changed) != before
    with torch.no_grad():
        flat = weight.view(-1)
        flat[[0, 1]] = flat[[1, 0]]
    assert fingerprint(other) != before, "order matters, and a change in place is noticed"
    hidden = fingerprint(other)
    next(other.parameters()).data.mul_(2)
    assert fingerprint(other) != hidden, "also one that leaves the version counter as it was"
    next(other.parameters()).data.div_(2)
    with torch.no_grad():
        flat[[0, 1]] = flat[[1, 0]]
    assert fingerprint(other) == before
    assert fingerprint(other.to(memory_format=torch.channels_last)) == before
    assert fingerprint(other.to(torch.bfloat16)) != before
    # FreeU changes what the model returns and no weight of it
    other = tiny.build("sd").unet
    other.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    free = fingerprint(other)
    other.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.4)
    assert before != free != fingerprint(other)
    other.disable_freeu()
    assert fingerprint(other) == before
    # attention in slices rounds in other places
    other.set_attention_slice(1)
    assert fingerprint(other) != before
    resized = tiny._unet(sample_size=16)
    resized.load_state_dict(module.state_dict())
    assert fingerprint(resized) != before


@pytest.mark.parametrize("words", [1, 1000, _CHUNK, 2 * _CHUNK + 3])
def test_checksum_is_its_formula(words):
    generator = torch.Generator().manual_seed(words)
    data = torch.randint(-(2**63), 2**63 - 1, (words,), generator=generator)
    terms = (w * (i * _STEP + 1) for i, w in enumerate(data.tolist()))
    assert _checksum(data) % 2**64 == sum(terms) % 2**64
    # the bytes count, however they are typed, aligned or laid out
    shifted = torch.empty(8 * words + 2, dtype=torch.uint8)[2:].copy_(data.view(torch.uint8))
    assert _checksum(shifted) == _checksum(data) == _checksum(data.view(torch.float16))
