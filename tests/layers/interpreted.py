"""The fused layers in Triton's interpreter, on the CPU, against diffusers' own.

Triton decides at its import whether kernels are interpreted, so these tests have a process of their
own: test_layers.py starts it, with TRITON_INTERPRET=1.
"""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig
from torch import nn
from torch.nn import functional

from inpo_fast.determinism import deterministic_gradients
from inpo_fast.layers import attention, launch
from inpo_fast.layers import modules as layers
from inpo_fast.training import PreferenceTrainer, policy
from tests.training import tiny

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def twins(module):
    """A module with random weights, the same fused, and the same in float64."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(module)
    layers.fuse_layers(fused)
    return module, fused, copy.deepcopy(module).double()


def gradients(module, call, *given):
    """Output, and the gradients of what is given and of the weights."""
    given = [value.detach().requires_grad_() for value in given]
    y = call(module, *given)
    rng = torch.Generator().manual_seed(5)
    (y * torch.randn(y.shape, generator=rng).to(y)).sum().backward()
    return [y.detach(), *(value.grad for value in given), *(p.grad for p in module.parameters())]


def assert_as_good(module, call, *given, classes):
    """The fused module is no further from float64 than a small multiple of the stock one's."""
    stock, fused, exact = twins(module)
    assert {type(part).__qualname__ for part in fused.modules()} >= set(classes)
    oracle = gradients(exact, call, *(value.double() for value in given))
    theirs = gradients(stock, call, *given)
    mine = gradients(fused, call, *given)
    for name, *values in zip(range(len(mine)), oracle, theirs, mine, strict=True):
        truth, their, my = values
        assert my.dtype == their.dtype and my.shape == their.shape, name
        # errors of the same size, of which one is sometimes the smaller by chance
        scale = truth.abs().max()
        allowed = 8 * (their - truth).abs().max() + 2**-20 * scale
        assert (my - truth).abs().max() <= allowed, name


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"),
    [(8, 4, 3, 5), (96, 32, 9, 15), (70, 35, 8, 8), (64, 1, 16, 17)],
)
def test_group_norm(channels, groups, height, width, activated):
    def call(norm, x):
        if isinstance(norm, layers.FusedGroupNorm):
            return norm(x, activated=activated)
        y = norm(x)
        return functional.silu(y) if activated else y

    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    x = image(2, channels, height, width)
    assert_as_good(norm, call, x, classes=["FusedGroupNorm"])
    x = x.to(memory_format=torch.channels_last)
    assert_as_good(norm, call, x, classes=["FusedGroupNorm"])


@pytest.mark.parametrize("activated", [False, True])
def test_group_norm_of_a_shifted_image(activated):
    def call(norm, x, shift):
        if isinstance(norm, layers.FusedGroupNorm):
            return norm(x, activated=activated, shift=shift)
        y = norm(x + shift[:, :, None, None])
        return functional.silu(y) if activated else y

    given = (image(2, 24, 9, 15), 3 * image(2, 24))
    assert_as_good(nn.GroupNorm(4, 24), call, *given, classes=["FusedGroupNorm"])
    # one shift for all samples
    given = (image(2, 24, 9, 15), 3 * image(1, 24))
    assert_as_good(nn.GroupNorm(4, 24), call, *given, classes=["FusedGroupNorm"])


def test_residual_block_in_16_bit():
    """As near to float64 as torch's own, gradients included, whose time embedding is rounded with
    the bias of a convolution here, and with the image there."""
    stock, fused, exact = twins(
        ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=12, groups=8).eval()
    )
    given = (image(2, 16, 5, 6), image(2, 12))

    def call(module, x, time):
        return module(x, time)

    truth = gradients(exact, call, *(x.double() for x in given))
    # not bfloat16, to which the interpreter truncates
    with torch.autocast("cpu", torch.float16):
        mine, theirs = (gradients(module, call, *given) for module in (fused, stock))
    for exact_one, my, their in zip(truth, mine, theirs, strict=True):
        scale = exact_one.abs().max()
        assert (my - exact_one).abs().max() <= 2 * (their - exact_one).abs().max() + 2**-11 * scale
        assert my.dtype == their.dtype


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 7), (2, 8, 2, 3, 5)])
def test_group_norm_of_other_shapes_than_images(shape):
    norm, x = nn.GroupNorm(4, 8), image(*shape)
    assert_as_good(norm, lambda norm, x: norm(x), x, classes=["FusedGroupNorm"])


def test_a_single_row():
    x = image(8)
    assert_as_good(nn.LayerNorm(8), lambda norm, x: norm(x), x, classes=["FusedLayerNorm"])
    assert_as_good(GEGLU(8, 12), lambda gate, x: gate(x), x, classes=["FusedGEGLU"])


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.GroupNorm(4, 8), (0, 8, 3, 3)), (nn.LayerNorm(8), (2, 0, 8)), (GEGLU(8, 4), (0, 8))],
)
def test_nothing(module, shape):
    layers.fuse_layers(module)
    results = gradients(module, lambda module, x: module(x), torch.empty(shape))
    assert all(not result.any() for result in results)
    assert results[1].shape == shape


def test_blocks_of_nothing():
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=12, groups=4).eval()
    layers.fuse_layers(block)
    results = gradients(
        block, lambda module, *given: module(*given), image(0, 8, 3, 3), image(0, 12)
    )
    assert results[0].shape == (0, 16, 3, 3) and not any(result.any() for result in results)
    transformer = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    layers.fuse_layers(transformer)
    call = lambda module, x, text: module(x, encoder_hidden_states=text)  # noqa: E731
    results = gradients(transformer, call, image(0, 6, 16), image(0, 3, 12))
    assert results[0].shape == (0, 6, 16) and not any(result.any() for result in results)


def test_group_norm_of_a_large_mean():
    norm = nn.GroupNorm(4, 8)
    x = 1000 + image(2, 8, 9, 15)
    assert_as_good(norm, lambda module, x: module(x), x, classes=["FusedGroupNorm"])


@pytest.mark.parametrize("width", [8, 40, 320])
def test_layer_norm(width):
    x = image(3, 7, width)
    assert_as_good(nn.LayerNorm(width), lambda norm, x: norm(x), x, classes=["FusedLayerNorm"])


def test_layer_norm_of_a_sum():
    def call(norm, x, residual):
        if isinstance(norm, layers.FusedLayerNorm):
            total, y = norm.add(x, residual)
        else:
            total = x + residual
            y = norm(total)
        return torch.stack([total, y])

    given = (image(3, 5, 40), 2 * image(3, 5, 40).flip(0))
    assert_as_good(nn.LayerNorm(40), call, *given, classes=["FusedLayerNorm"])


def test_layer_norm_with_more_rows_than_programs_have_tiles(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    monkeypatch.setattr(launch, "TILE", 16)
    x = image(11, 8)
    assert_as_good(nn.LayerNorm(8), lambda norm, x: norm(x), x, classes=["FusedLayerNorm"])


def test_layer_norm_without_eps():
    # rows that are no multiple of a tile's: those beyond the end have no deviation
    x = image(3, 8)
    assert_as_good(nn.LayerNorm(8, eps=0.0), lambda norm, x: norm(x), x, classes=["FusedLayerNorm"])


def test_geglu():
    x = 2 * image(3, 5, 16)
    assert_as_good(GEGLU(16, 24), lambda gate, x: gate(x), x, classes=["FusedGEGLU"])


@pytest.mark.parametrize("out", [16, 32])
def test_resnet_block(out):
    block = ResnetBlock2D(in_channels=16, out_channels=out, temb_channels=12, groups=8).eval()
    assert_as_good(
        *(block, lambda module, x, t: module(x, t), image(2, 16, 5, 6), image(2, 12)),
        classes=["FusedResnetBlock", "FusedGroupNorm"],
    )


def test_free_u_writes_into_what_a_block_returns():
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    text = image(2, 3, unet.config.cross_attention_dim)

    def call(module, x, text):
        return module(x, torch.tensor([3, 700]), text, return_dict=False)[0]

    layers.fuse_layers(fused := copy.deepcopy(unet))
    found = gradients(fused, call, image(2, 4, 8, 8), text)
    expected = gradients(unet, call, image(2, 4, 8, 8), text)
    # float32 in other orders of summation
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_deterministic_attention(monkeypatch):
    """In the mode of a training, self and cross attention, against float64."""
    launched = []
    own = attention.kernels.backward
    monkeypatch.setattr(
        attention.kernels, "backward", lambda *given: launched.append(1) or own(*given)
    )
    torch.manual_seed(0)
    stock = Attention(16, 12, heads=2, dim_head=8, out_bias=True)
    layers.fuse_layers(fused := copy.deepcopy(stock))
    assert type(fused) is layers.FusedAttention
    exact = copy.deepcopy(stock).double()
    given = (image(3, 70, 16), image(3, 7, 12))

    def call(module, x, text):
        return module(x, text)

    truth = gradients(exact, call, *(x.double() for x in given))
    # not bfloat16, to which the interpreter truncates
    with torch.autocast("cpu", torch.float16):
        with deterministic_gradients():
            mine, again = (gradients(copy.deepcopy(fused), call, *given) for _ in range(2))
        assert launched == [1, 1]
        theirs = gradients(stock, call, *given)
    assert all(map(torch.equal, mine, again))
    for exact_one, my, their in zip(truth, mine, theirs, strict=True):
        # rounded at the same places, in sums of another order
        scale = exact_one.abs().max()
        assert (my - exact_one).abs().max() <= 2 * (their - exact_one).abs().max() + 2**-11 * scale
        assert my.dtype == their.dtype


@pytest.mark.parametrize("first", ["layers", "projections"])
def test_fused_projections_are_the_same_attention(monkeypatch, first):
    """In either order, and by the fused layers: diffusers' own way divides by 1, a whole pass."""
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    given = (image(2, 4, 8, 8), 7, image(2, 3, unet.config.cross_attention_dim))

    @torch.no_grad()
    def output():
        return unet(*given, return_dict=False)[0]

    if first == "layers":
        layers.fuse_layers(unet)
        expected = output()
    unet.fuse_qkv_projections()
    if first == "projections":
        expected = output()
        layers.fuse_layers(unet)
    with monkeypatch.context() as patched:
        patched.setattr(Attention, "forward", None)
        found = output()
    # float32 in other orders of summation
    bound = 2**-16 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    if first == "layers":
        unet.unfuse_qkv_projections()
        assert torch.equal(output(), expected)


def test_adapters_of_fused_projections_are_used():
    """diffusers' processor leaves them out, as it reads copies of the weights below them."""
    torch.manual_seed(0)
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    given = (image(2, 4, 8, 8), 7, image(2, 3, unet.config.cross_attention_dim))
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.no_grad():
        unet.fuse_qkv_projections()
        unet.add_adapter(config)
        unet.eval()
        layers.fuse_layers(unet)
        found = unet(*given, return_dict=False)[0]
        unet.unfuse_qkv_projections()
        assert torch.equal(found, unet(*given, return_dict=False)[0])
        unet.disable_adapters()
        assert not torch.allclose(found, unet(*given, return_dict=False)[0])


def test_checkpointed_activations_give_the_same_gradients():
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    layers.fuse_layers(unet)
    given = (image(2, 4, 8, 8), 7, image(2, 3, unet.config.cross_attention_dim))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
            unet.train()
        unet.zero_grad()
        # not bfloat16, to which the interpreter truncates
        with torch.autocast("cpu", torch.float16):
            y = unet(*given, return_dict=False)[0]
        y.float().square().sum().backward()
        found.append([parameter.grad.clone() for parameter in unet.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("linear", [False, True])
def test_transformer(linear):
    block = Transformer2DModel(
        *(2, 8, 16),
        cross_attention_dim=12,
        norm_num_groups=8,
        use_linear_projection=linear,
    ).eval()
    assert_as_good(
        *(block, lambda module, x, text: module(x, text, return_dict=False)[0]),
        *(image(2, 16, 4, 6), image(2, 3, 12)),
        classes=["FusedTransformer", "FusedTransformerBlock", "FusedAttention", "FusedGEGLU"],
    )


def test_a_mask_hides_text():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    hidden = torch.tensor([[0.0, 0.0, -1e4], [0.0, -1e4, -1e4]])[:, None]

    def call(module, x, text):
        return module(x, encoder_hidden_states=text, encoder_attention_mask=hidden.to(x))

    given = (image(2, 6, 16), image(2, 3, 12))
    classes = ["FusedTransformerBlock", "FusedAttention", "FusedLayerNorm"]
    assert_as_good(block, call, *given, classes=classes)


def test_what_is_given_beside_is_read():
    """Arguments that the fused blocks have no use for go to diffusers' own."""
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    layers.fuse_layers(block)
    x, text = image(2, 6, 16), image(2, 3, 12)
    expected = block(x, encoder_hidden_states=text)
    block.set_chunk_feed_forward(3, dim=1)
    torch.testing.assert_close(block(x, encoder_hidden_states=text), expected)
    block.attn1.set_processor(lambda attention, x, *_, **__: torch.zeros_like(x))
    assert not torch.allclose(block(x, encoder_hidden_states=text), expected)
    resnet = ResnetBlock2D(in_channels=16, temb_channels=12, groups=8).eval()
    layers.fuse_layers(resnet)
    with pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
        resnet(image(2, 16, 5, 6), image(2, 12), scale=0.5)


def test_a_hook_of_a_convolution_is_called():
    block = ResnetBlock2D(in_channels=16, out_channels=32, temb_channels=12, groups=8).eval()
    layers.fuse_layers(block)
    given = (image(2, 16, 5, 6), image(2, 12))
    expected, called = block(*given), []
    for conv in (block.conv1, block.conv2, block.conv_shortcut):
        conv.register_forward_hook(lambda module, *_: called.append(module))
    torch.testing.assert_close(block(*given), expected)
    assert called == [block.conv1, block.conv2, block.conv_shortcut]


def test_a_hook_of_a_norm_is_called():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    layers.fuse_layers(block)
    x, text = image(2, 6, 16), image(2, 3, 12)
    expected, called = block(x, encoder_hidden_states=text), []
    norms = [block.norm1, block.norm2, block.norm3]
    for norm in norms:
        norm.register_forward_hook(lambda module, *_: called.append(module))
    torch.testing.assert_close(block(x, encoder_hidden_states=text), expected)
    assert called == norms


def test_weights_can_be_offloaded():
    """As `enable_sequential_cpu_offload` of a pipeline does it: every module's, between calls."""
    from accelerate import cpu_offload

    unet = tiny.with_trained_norms(tiny.unet()).eval()
    layers.fuse_layers(unet)
    given = (image(2, 4, 8, 8), 7, image(2, 3, unet.config.cross_attention_dim))
    with torch.no_grad():
        expected = unet(*given, return_dict=False)[0]
        cpu_offload(unet, torch.device("cpu"))
        # the convolutions, which have hooks now, add their own biases: float32 in another order
        torch.testing.assert_close(unet(*given, return_dict=False)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4)])
def test_weights_elsewhere_are_not_read(norm):
    """A kernel that was launched before takes any address; torch compares devices, and says so."""
    layers.fuse_layers(norm)
    with pytest.raises(RuntimeError, match="device"):
        norm.to("meta")(image(2, 4))


def test_a_compiler_sees_torchs_own_layers():
    """It fuses by itself, and cannot look into these kernels."""
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    layers.fuse_layers(unet)
    given = (image(2, 4, 8, 8), 7, image(2, 3, unet.config.cross_attention_dim))
    results = []
    for model in (unet, torch.compile(unet, backend="eager", fullgraph=True)):
        unet.zero_grad()
        y = model(*given, return_dict=False)[0]
        y.square().mean().backward()
        results.append([y.detach(), unet.conv_in.weight.grad])
    # float32 in other orders of summation
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_gradients_of_convolutions_lie_as_their_weights_do():
    """DDP warns where they do not, and copies."""
    block = Transformer2DModel(2, 8, 16, cross_attention_dim=12, norm_num_groups=8)
    layers.fuse_layers(block)
    block(image(2, 16, 4, 6), image(2, 3, 12), return_dict=False)[0].sum().backward()
    for conv in (block.proj_in, block.proj_out):
        assert conv.weight.grad.stride() == conv.weight.stride()


def test_one_time_serves_a_batch():
    block = ResnetBlock2D(in_channels=16, temb_channels=12, groups=8).eval()
    call = lambda module, x, t: module(x, t)  # noqa: E731
    assert_as_good(block, call, image(3, 16, 5, 6), image(1, 12), classes=["FusedResnetBlock"])


def test_sums_of_different_shapes_are_refused():
    """The kernels would read beyond the end of the smaller one."""
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    layers.fuse_layers(block)
    with pytest.raises(ValueError, match=r"shape \(1, 6, 16\) .* got \(2, 6, 16\)"):
        block(image(1, 6, 16), encoder_hidden_states=image(2, 3, 12))
    resnet = ResnetBlock2D(
        in_channels=16, out_channels=32, temb_channels=12, groups=8, use_in_shortcut=False
    )
    layers.fuse_layers(resnet)
    with pytest.raises(ValueError, match=r"shape \(2, 16, 5, 6\) .* got \(2, 32, 5, 6\)"):
        resnet(image(2, 16, 5, 6), image(2, 12))


def test_the_norm_of_a_sum_of_two_dtypes_has_the_wider_one():
    norm = nn.LayerNorm(8)
    layers.fuse_layers(norm)
    for given in ((image(2, 8).half(), image(2, 8)), (image(2, 8), image(2, 8).half())):
        total, y = norm.add(*given)
        assert total.dtype == y.dtype == torch.float32
        torch.testing.assert_close(y, norm(total), rtol=0, atol=0)


def test_a_reference_beside_adapters_of_convolutions_computes_the_same_bits():
    unet = tiny.with_trained_norms(tiny.unet()).eval()
    targets = ["to_q", "proj_in", "conv1", "conv2", "conv_shortcut"]
    pair = policy.lora(unet, torch.float32, rank=2, alpha=2, targets=targets, seed=0)
    given = (image(2, 4, 8, 8), 7, image(2, 3, unet.config.cross_attention_dim))
    for model in pair:
        layers.fuse_layers(model)
    assert torch.equal(*(model(*given, return_dict=False)[0] for model in pair))


def test_a_reference_in_16_bit_computes_the_same_bits():
    policy = tiny.with_trained_norms(tiny.unet())
    for name, parameter in policy.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    reference = copy.deepcopy(policy)
    for module in reference.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.half()
    x, text = image(2, policy.config.in_channels, 8, 8), image(2, 3, 16)
    given = (x, torch.tensor([3, 700]), text[..., : policy.config.cross_attention_dim])
    outputs = []
    for module in (policy, reference):
        layers.fuse_layers(module)
        # not bfloat16, to which the interpreter truncates
        with torch.autocast("cpu", torch.float16):
            outputs.append(module(*given, return_dict=False)[0])
    assert torch.equal(*outputs)


def test_what_is_not_plain_stays():
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, down=True)
    norms = [nn.GroupNorm(2, 4, affine=False), nn.GroupNorm(2, 4)]
    norms[1].bias = None  # as torch 2.13 can make it
    for module in (block, *norms, nn.LayerNorm((2, 3)), nn.LayerNorm(4, bias=False)):
        layers.fuse_layers(module)
        assert not type(module).__qualname__.startswith("Fused")


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({}, ["FusedResnetBlock", "FusedTransformer"]),
        # group norms of tokens, [N, C, L]
        (
            {
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            },
            ["FusedResnetBlock"],
        ),
        # residual blocks that use the time in another way
        ({"resnet_time_scale_shift": "scale_shift"}, ["ResnetBlock2D", "FusedTransformer"]),
    ],
)
def test_a_unet_computes_the_same(options, classes):
    unet = tiny.unet(**options)
    text = image(2, 3, unet.config.cross_attention_dim)
    x = image(2, unet.config.in_channels, 8, 8)

    def call(module, x, text):
        return module(x, torch.tensor([3, 700]), text, return_dict=False)[0]

    assert_as_good(unet.eval(), call, x, text, classes=classes)


def test_the_last_norm_rounds_after_its_activation():
    unet = tiny.with_trained_norms(tiny.unet())
    x = 3 * image(2, 8, 16, 16)
    stock = unet.conv_act(unet.conv_norm_out(x)).half()
    names = list(unet.state_dict())
    layers.fuse_layers(unet)
    assert list(unet.state_dict()) == names
    # not bfloat16, to which the interpreter truncates
    with torch.autocast("cpu", torch.float16):
        fused = unet.conv_act(unet.conv_norm_out(x))
    assert fused.dtype == torch.float16
    # float32 errors of order 2^-24 seldom cross a border between two values of float16
    assert (fused != stock).float().mean() < 0.01


def test_frozen_weights_get_no_gradient():
    norm = nn.GroupNorm(2, 4).requires_grad_(False)
    layers.fuse_layers(norm)
    x = image(1, 4, 3, 3).requires_grad_()
    norm(x).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4)])
def test_a_bias_alone_can_be_trained(norm):
    layers.fuse_layers(norm)
    norm.weight.requires_grad_(False)
    norm(image(1, 4, 4, 4)).sum().backward()
    assert norm.weight.grad is None
    assert torch.equal(norm.bias.grad, torch.full((4,), 16.0))


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4)])
def test_weights_are_not_read_beyond_their_end(norm):
    layers.fuse_layers(norm)
    with pytest.raises(ValueError, match="input must have 4 channels, got 6"):
        norm(image(1, 6, 6, 6))


@pytest.mark.parametrize("module", [nn.GroupNorm(2, 4), nn.LayerNorm(4), GEGLU(4, 2)])
def test_second_derivatives_are_refused(module):
    layers.fuse_layers(module)
    x = image(3, 4).requires_grad_()
    (first,) = torch.autograd.grad((module(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_blocks_of_other_norms_stay():
    class Norm(nn.GroupNorm):
        pass

    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4)
    block.norm1 = Norm(4, 8)
    layers.fuse_layers(block)
    assert type(block) is ResnetBlock2D and type(block.norm1) is Norm


@pytest.mark.parametrize("rank", [None, 2])
def test_a_training_begins_as_its_reference_and_goes_as_without(rank, tmp_path, monkeypatch):
    monkeypatch.setattr("inpo_fast.training.step.count_flops", lambda _: (1, 2))
    model = tiny.save_pipeline(tmp_path / "model")
    logged = []
    for name, fused in (("plain", False), ("fused", True)):
        changes = {"rank": rank, "inversion_steps": 1, "max_train_steps": 1}
        config = tiny.config(model, tmp_path / name, fused_layers=fused, **changes)
        run = PreferenceTrainer(config, dataset=tiny.pairs())
        logged.append(run.train())
        assert any(isinstance(m, layers.FusedResnetBlock) for m in run.policy.modules()) is fused
    plain, fused = logged
    assert fused[0]["policy_winner"] == fused[0]["reference_winner"]
    assert fused[0]["loss"] == plain[0]["loss"]
    assert fused[0]["margin_mean"] == 0.0
    # float32 errors of order 1, in other orders of summation
    assert fused[0]["policy_winner"] == pytest.approx(plain[0]["policy_winner"], rel=1e-5)
    assert fused[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4)
