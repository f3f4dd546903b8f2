"""Whole models, plain and reduced: MACs equal to a count on real execution, peak memory within 2 % of the allocator's."""

import gc
import importlib.util
import warnings
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._pytree import tree_leaves

from downres import Candidate, reduce
from downres.fakes import Fakes
from downres.measuring import fastpath
from downres.measuring.cost import count, measure_cost
from downres.probe import FakeCopy

spec = importlib.util.spec_from_file_location("independent", Path(__file__).parents[2] / "benchmarks" / "independent.py")
independent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(independent)


@contextmanager
def fast_path(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def check(model, side):
    """Ours against the independent counts; returns ours."""
    cost = measure_cost(model, (3, side, side))
    counted = independent.count(model, (1, 3, side, side))
    assert cost.macs == counted.macs, counted.by_kind
    seen = independent.allocated(model, (1, 3, side, side), counted.reads)
    assert cost.peak_activation_bytes == pytest.approx(seen.peak, rel=0.02)
    return cost


def vit(fused=True, **kwargs):
    timm.layers.set_fused_attn(fused)
    try:
        return timm.create_model("vit_tiny_patch16_224", **{"depth": 3, "img_size": 128} | kwargs).eval()
    finally:
        timm.layers.set_fused_attn(True)


@pytest.mark.parametrize(
    ("name", "side", "kwargs"),
    [
        ("resnet18", 96, {}),
        ("mobilenetv3_small_100", 96, {}),
        ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),  # concatenations
        ("pvt_v2_b0", 64, {}),  # convolutions of strided views
        ("swin_tiny_patch4_window7_224", 112, {"img_size": 112, "depths": (1, 2, 1, 1)}),
        ("eva02_tiny_patch14_224", 112, {"img_size": 112, "depth": 2}),
        ("maxvit_rmlp_pico_rw_256", 128, {"img_size": 128}),
        ("sequencer2d_s", 64, {"layers": (1, 1, 1, 1)}),  # LSTMs
    ],
)
def test_timm(name, side, kwargs):
    check(timm.create_model(name, **kwargs).eval(), side)


def test_attention_fused_and_not_in_timm():
    fused, not_fused = check(vit(True), 128), check(vit(False), 128)
    assert fused.macs == not_fused.macs
    large = {"img_size": 256, "num_heads": 6}
    fused, not_fused = (measure_cost(vit(f, **large), (3, 256, 256)).peak_activation_bytes for f in (True, False))
    assert not_fused > fused + 4 * 6 * 257**2  # the matrices of weights of six heads


def test_multi_head_attention_with_its_fast_path_and_without():
    """torchvision's ViT; its fast path holds the matrix of weights, the other way does not."""
    model = torchvision.models.VisionTransformer(256, 16, 2, 8, 64, 128).eval()
    with fast_path(True):
        fast = check(model, 256)
    with fast_path(False):
        plain = check(model, 256)
    assert fast.macs == plain.macs
    assert fast.peak_activation_bytes > plain.peak_activation_bytes + 4 * 8 * 257**2 // 2


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_transformer_encoder(norm_first, fast):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 256, norm_first=norm_first, activation="gelu", batch_first=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no nested tensors with norm_first
                self.embed, self.encoder = nn.Conv2d(3, 32, 8, 8), nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1)

    with fast_path(fast):
        for side in (32, 128):  # the MLP's hidden layer is the largest, then the matrix of weights
            check(Encoder().eval(), side)


def test_torchvision():
    small = {"patch_size": [4, 4], "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    check(torchvision.models.swin_transformer.SwinTransformer(**small).eval(), 64)
    segmenter = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    check(segmenter.eval(), 96)  # resizes of its features and of its output


TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64}
SEGFORMER = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [4, 2], "strides": [4, 2]}
SEGFORMER |= {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "mlp_ratios": [4, 4], "decoder_hidden_size": 32}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViTForImageClassification", TINY | {"patch_size": 4}),
        ("BeitForImageClassification", TINY | {"patch_size": 8, "use_relative_position_bias": True}),
        ("DINOv3ViTModel", TINY | {"patch_size": 8, "num_register_tokens": 4}),
        ("SiglipVisionModel", TINY | {"patch_size": 8}),
        ("SegformerForSemanticSegmentation", SEGFORMER),
    ],
)
def test_transformers(name, config, implementation):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    check(kind._from_config(kind.config_class(**config), attn_implementation=implementation).eval(), 64)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "candidate",
    ["96", "128 patch32", "128 merge8", "128 merge50%-decreasing", "128 prune4", "128 stem×0.5", "96 stem×0.5 merge2"],
)
def test_reduced_vit(candidate, fused):
    candidate = Candidate.parse(candidate)
    model, side = vit(fused, depth=2), candidate.hw[0]
    cost = check(reduce(model, candidate, resize_input=False), side)
    assert cost.macs < measure_cost(model, (3, 128, 128)).macs


def test_merged_lengths_block_by_block():
    """r = 8 of 64 patch tokens and a class token, merged between attention and MLP, by hand."""
    d, cost = 192, measure_cost(reduce(vit(), merge=8, resize_input=False), (3, 128, 128))
    expected = 64 * 3 * 256 * d + d * 1000  # patches, head
    tokens = 65
    for _ in range(3):
        expected += tokens * 4 * d * d + 2 * tokens * tokens * d  # attention
        expected += 32 * (tokens // 2) * (d // 3) if tokens % 2 == 0 else 0
        tokens -= 8
        expected += tokens * 8 * d * d  # MLP
    # matching: every other token with every other token, on the mean of the heads' keys
    matching = sum((n // 2) * (n - n // 2) * (d // 3) for n in (64, 56, 48))
    assert cost.macs == expected + matching


@pytest.mark.parametrize("resize_input", [True, False])
def test_reduced_convnet(resize_input):
    """Resizes of the input and after the stem are counted, and what an antialiased resize holds between its passes."""
    candidate = Candidate(64, stem_scale=0.5)
    check(reduce(timm.create_model("resnet18").eval(), candidate, resize_input=resize_input), 96 if resize_input else 64)


# --- what happens inside some operators ---------------------------------------------------------------------------


def macs_and_peak(function, size):
    class Apply(nn.Module):
        def forward(self, x):
            return function(x)

    cost = measure_cost(Apply(), size)
    return cost.macs, cost.peak_activation_bytes


def test_first_pass_of_a_resize_by_hand():
    _, peak = macs_and_peak(lambda x: F.interpolate(x, (8, 4), mode="bilinear", antialias=True), (3, 16, 16))
    assert peak == 4 * 3 * (16 * 16 + 16 * 4 + 8 * 4)  # input, its rows at their new width, output


def test_copies_of_strided_arguments_by_hand():
    def strided(x):
        y = x.sin().transpose(2, 3)  # (1, 3, 16, 8), no longer contiguous
        return F.conv2d(y, kernel)

    kernel = torch.ones(1, 3, 1, 1)
    _, peak = macs_and_peak(strided, (3, 8, 16))
    assert peak == 4 * (3 + 3 + 1) * 8 * 16  # what sin returned, its copy, output; the input is no longer read
    _, peak = macs_and_peak(lambda x: F.layer_norm(x.sin().transpose(2, 3), (8,)), (3, 8, 16))
    assert peak == 4 * (3 + 3 + 3) * 8 * 16 + 2 * 4 * 3 * 16  # and a mean and a deviation for each row


def test_lstm_by_hand():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(16, 10, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.lstm(x[:, 0])[0]  # (1, 12 positions, 16 wide)

    gates = 2 * 4 * 10  # of both directions
    assert measure_cost(Recurrent(), (3, 12, 16)).macs == 12 * gates * ((16 + 10) + (20 + 10))


@pytest.mark.parametrize("need_weights", [True, False])
def test_fast_path_gives_what_the_kernel_gives(need_weights):
    torch.manual_seed(0)
    mha, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 9, 16)
    nn.init.normal_(mha.in_proj_bias)
    padding = torch.arange(9).expand(2, -1) > 6
    for mask, kind in ((None, None), (padding, 1), (torch.ones(9, 9).triu(1).bool(), 0)):
        args = x, x, x, 16, 4, mha.in_proj_weight, mha.in_proj_bias, mha.out_proj.weight, mha.out_proj.bias
        with torch.no_grad():
            theirs = torch._native_multi_head_attention(*args, mask, need_weights, True, kind)
            ours = fastpath.attention(*args, mask, need_weights, True, kind)
        torch.testing.assert_close(ours[0], theirs[0])
        assert ours[1] is None if not need_weights else torch.allclose(ours[1], theirs[1])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_gives_what_the_kernel_gives(norm_first, activation, monkeypatch):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, norm_first=norm_first, activation=activation, batch_first=True).eval()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        theirs = layer(x)
        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", fastpath.encoder_layer)
        torch.testing.assert_close(layer(x), theirs)


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100", "pvt_v2_b0"])
def test_shapes_are_those_of_fake_tensor_mode(name, monkeypatch):
    """Operator by operator; strides in dimensions of size 1 apart, where FakeTensorMode's are not the real ones."""
    direct, compared = Fakes.quick, 0

    def both(self, func, args, kwargs, tensors, key):
        nonlocal compared
        ours = direct(self, func, args, kwargs, tensors, key)
        if func._schema.is_mutable or ours is NotImplemented:
            return ours
        self._is_asked = True
        theirs = func(*args, **kwargs)
        self._is_asked = False
        for a, b in zip(tree_leaves(theirs), tree_leaves(ours), strict=True):
            if isinstance(a, torch.Tensor):
                assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), func
                assert all(s == t for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True) if n > 1), func
                assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes(), func
                compared += 1
        return ours

    monkeypatch.setattr(Fakes, "quick", both)
    measure_cost(timm.create_model(name, **({"depth": 3} if name.startswith("vit") else {})).eval(), (3, 224, 224))
    assert compared > 50


class Alike(nn.Module):
    """Calls that look the same and are not: numbers of other types, views in one storage, a tensor written into itself."""

    def forward(self, x):
        whole = x.to(torch.int64)
        doubled = whole * 2, whole * 2.0, whole * True
        assert [d.dtype for d in doubled] == [torch.int64, torch.float32, torch.int64]
        first, second = x + 1, x + 1
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        assert first.relu_() is first
        assert first[:, :1].untyped_storage()._cdata == first.untyped_storage()._cdata
        parts = torch.complex(first, second).conj()
        assert parts.is_conj()
        assert not (parts * 1).is_conj()
        assert (x.mT * 1).stride() != (x * 1).stride()
        return first


def test_only_what_is_alike_is_taken_from_what_was_seen_before():
    copy = FakeCopy(Alike().eval(), again=True)
    first = count(copy, (1, 3, 8, 8))
    assert first == count(copy, (1, 3, 8, 8)) == measure_cost(Alike(), (3, 8, 8))


# --- a copy that is run at many sizes -----------------------------------------------------------------------------


class Changing(nn.Module):
    """Counts its runs where `hidden` says, and computes by that."""

    def __init__(self, hidden):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.hidden, self.partial = hidden, partial(dict, runs=hidden)

    def forward(self, x):
        runs = self.partial.keywords["runs"]
        if isinstance(runs, dict):
            runs["n"]["runs"] += 1
        else:
            runs.append(0)
        for _ in range(runs["n"]["runs"] if isinstance(runs, dict) else len(runs)):
            x = self.conv(x)
        return x


@pytest.mark.parametrize("hidden", [{"n": {"runs": 0}}, [], deque()], ids=["dict", "list", "deque"])
def test_a_network_that_changes_as_it_runs_is_copied_anew_for_every_size(hidden):
    copy = FakeCopy(Changing(hidden).eval(), again=True)
    assert [count(copy, (1, 3, side, side)).macs for side in (4, 8, 8)] == [9 * side**2 for side in (4, 8, 8)]


# --- nothing stays behind -----------------------------------------------------------------------------------------


def test_no_fake_tensor_stays_in_a_cache():
    """transformers keeps tables of positions in caches of functions, which all models of the process share."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(**TINY | {"patch_size": 8})
    model, x = transformers.DINOv3ViTModel._from_config(config).eval(), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x).last_hidden_state
        cold = measure_cost(model, (3, 64, 64))
        assert cold == measure_cost(model, (3, 64, 64))
        after = model(x).last_hidden_state
    assert type(after) is torch.Tensor and torch.equal(before, after)


def test_a_network_without_numbers_costs_the_same():
    with torch.device("meta"):
        hollow = vit()
    for candidate in (Candidate(), Candidate(96), Candidate(merge=8)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of changing nothing
            pair = [reduce(m, candidate, resize_input=False, input_size=(3, 128, 128)) for m in (hollow, vit())]
        size = (3, *(candidate.hw or (128, 128)))
        assert measure_cost(pair[0], size) == measure_cost(pair[1], size)


def test_the_collector_is_as_it_was():
    for enabled in (False, True):
        (gc.enable if enabled else gc.disable)()
        try:
            measure_cost(nn.Conv2d(3, 3, 1), (3, 8, 8))
            assert gc.isenabled() == enabled
        finally:
            gc.enable()
