"""timm's and torchvision's transformers: what `reduce` makes of them, against the libraries' own smaller models."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import apply_rot_embed_cat, resample_abs_pos_embed
from timm.models import swin_transformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import nn
from torchvision.models.vision_transformer import ConvStemConfig
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVit

from downres import Candidate, DownresError, Merge, measure_cost, reduce, token_map
from downres.families import own, unknown
from downres.families.find import find_adapter
from downres.reduction import takes_any_size
from downres.reductions.tokens import TokenState

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
SIDE = 48


def vit(**changes):
    return VisionTransformer(**{**SMALL, **changes})


def eva(**changes):
    return Eva(**{**SMALL, "use_rot_pos_emb": True, **changes})


def torchvision_vit(**changes):
    given = {"image_size": SIDE, "patch_size": 8, "num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return TorchvisionVit(**{**given, "num_classes": 5, **changes})


def conv_stem():
    stages = [ConvStemConfig(16, 3, 2), ConvStemConfig(32, 3, 2), ConvStemConfig(32, 3, 2)]
    return torchvision_vit(conv_stem_configs=stages)


def dinov3(**changes):
    given = {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False, "num_reg_tokens": 4}
    return eva(**{**given, "dynamic_img_size": True, "init_values": 0.1, **changes})


def naflex(**changes):
    given = {**SMALL, "reg_tokens": 2, "class_token": True, "pos_embed": "learned", "pos_embed_grid_size": (6, 6)}
    return NaFlexVit(**{**given, **changes})


SEQUENCES = {
    "vit": vit,
    "qk norm": lambda: vit(qk_norm=True, init_values=0.5, global_pool="avg"),
    "registers": lambda: vit(reg_tokens=4, no_embed_class=True, class_token=True),
    "no class token": lambda: vit(class_token=False, global_pool="avg"),
    "attention pool": lambda: vit(class_token=False, global_pool="map"),
    "no pool": lambda: vit(global_pool=""),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
    "dynamic": lambda: vit(dynamic_img_size=True),
    "post norm": lambda: vit(block_fn=ResPostBlock, init_values=0.5),
    "parallel": lambda: vit(block_fn=ParallelScalingBlock, qkv_bias=False),
    "parallel things": lambda: vit(block_fn=ParallelThingsBlock),
    "eva": lambda: eva(swiglu_mlp=True),
    "eva post norm": lambda: eva(use_post_norm=True, use_rot_pos_emb=False),
    "dinov3": dinov3,
    "rope mixed": lambda: eva(attn_type="rope", rope_type="mixed", use_abs_pos_emb=False, rope_grid_indexing="xy"),
    "naflex": naflex,
    "naflex rope": lambda: naflex(rope_type="axial", qkv_bias=True),
    "torchvision": torchvision_vit,
    "torchvision stem": conv_stem,
}
ROTARY = ("eva", "dinov3", "rope mixed", "naflex rope")


def randomised(model, seed=0):
    """Every parameter and BatchNorm statistic from one generator: heads and position embeddings that are zero matter too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1.0 if "pos" in name else p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (0.7 if "norm" in name and "weight" in name else 0))
    return model.eval()


@pytest.fixture(scope="module", params=SEQUENCES)
def named(request):
    return request.param, randomised(SEQUENCES[request.param]())


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, x):
    return model(x)


def features(model, x):
    """What the last block hands on."""
    adapter = find_adapter(model)
    kept = []
    hook = adapter.blocks()[-1].register_forward_hook(lambda _m, _args, out: kept.append(out))
    run(model, x)
    hook.remove()
    return kept[0]


def merged(model, removals, by="merge", grid=None):
    """A copy whose blocks take out exactly these numbers of tokens."""
    small = copy.deepcopy(model)
    adapter = find_adapter(small)
    adapter.merge(TokenState(tuple(removals), adapter.prefix, by, grid or adapter.grid((SIDE, SIDE))), adapter.blocks())
    return small


# --- resolution and patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(32, 32), (24, 40), (64, 48)], ids=str)
@pytest.mark.parametrize(
    ("options", "prefix"),
    [({}, 1), ({"reg_tokens": 4}, 5), ({"reg_tokens": 4, "no_embed_class": True}, 0)],
    ids=["class token", "registers", "no embed class"],
)
def test_positions_are_resampled_from_the_original(options, prefix, target):
    model = randomised(vit(**options))
    grid = [target[0] // 8, target[1] // 8]
    small = reduce(model, resolution=target)
    wanted = resample_abs_pos_embed(model.pos_embed, grid, old_size=[6, 6], num_prefix_tokens=prefix)
    assert torch.equal(small.pos_embed, wanted)
    assert torch.equal(small.pos_embed[:, :prefix], model.pos_embed[:, :prefix])
    # The same once more without timm: antialiased bicubic, in float32.
    patches = model.pos_embed[:, prefix:].transpose(1, 2).unflatten(2, (6, 6))
    by_hand = F.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(small.pos_embed[:, prefix:], by_hand)


def test_positions_of_half_precision_are_resampled_in_float32():
    model = randomised(vit()).to(torch.bfloat16)
    small = reduce(model, resolution=32)
    wanted = resample_abs_pos_embed(model.pos_embed.float(), [4, 4], old_size=[6, 6], num_prefix_tokens=1)
    assert torch.equal(small.pos_embed, wanted.to(torch.bfloat16))


def smaller(build, model, positions, **size):
    """The library's own model for another size, with the weights of `model` and these position embeddings."""
    fresh = build(**size).eval()
    fresh.load_state_dict({**model.state_dict(), **positions})
    return fresh


@pytest.mark.parametrize("target", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("name", ["vit", "registers", "no class token", "attention pool", "post norm", "eva", "rope mixed"])
def test_equals_the_librarys_own_smaller_model(name, target):
    model = randomised(SEQUENCES[name]())
    positions = {}
    if getattr(model, "pos_embed", None) is not None:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        grid = [target[0] // 8, target[1] // 8]
        positions["pos_embed"] = resample_abs_pos_embed(model.pos_embed, grid, old_size=[6, 6], num_prefix_tokens=prefix)
    options = {
        "vit": {}, "registers": {"reg_tokens": 4, "no_embed_class": True},
        "no class token": {"class_token": False, "global_pool": "avg"},
        "attention pool": {"class_token": False, "global_pool": "map"},
        "post norm": {"block_fn": ResPostBlock, "init_values": 0.5}, "eva": {"swiglu_mlp": True},
        "rope mixed": {"attn_type": "rope", "rope_type": "mixed", "use_abs_pos_emb": False, "rope_grid_indexing": "xy"},
    }[name]  # fmt: skip
    wanted = smaller(eva if name in ("eva", "rope mixed") else vit, model, positions, img_size=target, **options)
    small, x = reduce(model, resolution=target), images(2, 3, *target)
    torch.testing.assert_close(run(small, x), run(wanted, x))
    assert run(small, images(2, 3, SIDE, SIDE)).shape == (2, 5)  # drop-in
    by_hand = F.interpolate(images(2, 3, SIDE, 50), target, mode="bilinear", antialias=True)
    torch.testing.assert_close(run(small, images(2, 3, SIDE, 50)), run(wanted, by_hand))


def test_torchvision_equals_its_own_smaller_model():
    model = randomised(torchvision_vit())
    positions = resample_abs_pos_embed(model.encoder.pos_embedding, [4, 4], old_size=[6, 6], num_prefix_tokens=1)
    wanted = smaller(torchvision_vit, model, {"encoder.pos_embedding": positions}, image_size=32)
    x = images(2, 3, 32, 32)
    torch.testing.assert_close(run(reduce(model, resolution=32), x), run(wanted, x))


@pytest.mark.parametrize("build", [torchvision_vit, conv_stem])
def test_torchvision_takes_images_that_are_not_square(build):
    model = randomised(build())
    small, x = reduce(model, resolution=(24, 40)), images(2, 3, 24, 40)
    with torch.no_grad():  # its forward written by hand, on a grid of 3×5
        tokens = model.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.class_token.expand(2, -1, -1), tokens], dim=1)
        positions = resample_abs_pos_embed(model.encoder.pos_embedding, [3, 5], old_size=[6, 6], num_prefix_tokens=1)
        wanted = model.heads(model.encoder.ln(model.encoder.layers(tokens + positions))[:, 0])
    torch.testing.assert_close(run(small, x), wanted)
    assert isinstance(small, TorchvisionVit) and small.seq_length == 16


@pytest.mark.parametrize("build", [vit, torchvision_vit, naflex, lambda: naflex(embed_proj_type="conv")])
def test_larger_patches_see_a_larger_image_alike(build):
    """FlexiViT: the kernel resized P → P' on patches resized by P'/P gives the embedding of the original on the original."""
    model = randomised(build())
    x = images(2, 3, SIDE, SIDE)
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8)  # B, C, rows, columns, 8, 8
    large = F.interpolate(patches.flatten(0, 3)[:, None], (12, 12), mode="bicubic", antialias=True)
    large = large.unflatten(0, patches.shape[:4])[..., 0, :, :].permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 72, 72)
    small = reduce(model, resolution=72, patch_size=12)

    def embeddings(net, x):
        kept = []
        names = {TorchvisionVit: "conv_proj", NaFlexVit: "embeds.proj"}
        layer = net.get_submodule(next((v for k, v in names.items() if isinstance(net, k)), "patch_embed.proj"))
        layer.register_forward_hook(lambda _m, _args, out: kept.append(out))
        run(net, x)
        return kept[0]

    torch.testing.assert_close(embeddings(small, large), embeddings(copy.deepcopy(model), x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(small, large), run(model, x), rtol=1e-3, atol=1e-3)


def test_patches_and_resolution_together_resample_from_the_original():
    model = randomised(vit())
    small = reduce(model, resolution=(48, 60), patch_size=12)
    assert torch.equal(small.pos_embed, resample_abs_pos_embed(model.pos_embed, [4, 5], old_size=[6, 6], num_prefix_tokens=1))
    assert tuple(small.patch_embed.proj.weight.shape) == (32, 3, 12, 12)
    with pytest.raises(DownresError, match="was reduced before"):
        reduce(small, resolution=24)  # a chain of resizes would lose more


def test_floor_sees_what_the_convolution_sees():
    model, x = randomised(vit()), images(2, 3, 53, 61)
    small = reduce(model, ragged="floor", resolution=(53, 61))
    kept = []
    small.patch_embed.proj.register_forward_hook(lambda _m, _args, out: kept.append(out))
    run(small, x)
    assert torch.equal(kept[0], run(model.patch_embed.proj, x)) and kept[0].shape[2:] == (6, 7)


@pytest.mark.parametrize("side", [44, 31])
def test_pad_equals_timms_dynamic_padding(side):
    model, x = randomised(vit()), images(2, 3, side, side)
    timms = vit(dynamic_img_size=True, dynamic_img_pad=True).eval()
    timms.load_state_dict(model.state_dict())
    torch.testing.assert_close(run(reduce(model, resolution=side, ragged="pad"), x), run(timms, x))
    # And timm's own padding is left to timm, with tokens merged as well.
    small = reduce(timms, resolution=side, merge=Merge(keep=0.5))
    assert run(small, x).shape == (2, 5)


def test_dynamic_networks_stay_dynamic():
    model = randomised(vit(dynamic_img_size=True))
    small = reduce(model, resolution=32)
    assert takes_any_size(model) and torch.equal(small.pos_embed, model.pos_embed)
    x = images(1, 3, 48, 96)
    torch.testing.assert_close(run(small, x), run(model, F.interpolate(x, (32, 64), mode="bilinear", antialias=True)))
    # Other aspect ratios come to whole patches: 48×64 to 32×43, of which 32×40 is the nearest.
    other = images(1, 3, 48, 64)
    torch.testing.assert_close(run(small, other), run(model, F.interpolate(other, (32, 40), mode="bilinear", antialias=True)))
    assert not takes_any_size(vit())
    for build in (vit, dinov3):
        with pytest.raises(DownresError, match="36x36|36 px is not a multiple of 8"):
            reduce(build(), resolution=36)


def test_hybrids_shrink_with_the_stride_of_both_parts():
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=128, depth=2, num_classes=5).eval()
    small = reduce(model, resolution=(64, 96))
    assert run(small, images(1, 3, 64, 96)).shape == (1, 5) and small.pos_embed.shape[1] == 1 + 2 * 3
    with pytest.raises(DownresError, match="not a multiple of 32"):
        reduce(model, resolution=80)


@pytest.mark.filterwarnings("ignore")  # timm's own loading
def test_swin_equals_timms_own_smaller_model():
    sizes = {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "num_classes": 5}
    model = randomised(SwinTransformer(img_size=64, **sizes))
    # Windows keep their share of the grid: 4 of 16 become 2 of 8 and 3 of 12; timm resizes their tables when it loads.
    wanted = SwinTransformer(img_size=(32, 48), **{**sizes, "window_size": (2, 3)}).eval()
    wanted.load_state_dict(swin_transformer.checkpoint_filter_fn(model.state_dict(), wanted))
    x = images(2, 3, 32, 48)
    torch.testing.assert_close(run(reduce(model, resolution=(32, 48)), x), run(wanted, x))
    pooled = reduce(model, stem_scale=0.5)
    seen = []
    pooled.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1:3]))
    assert run(pooled, images(2, 3, 64, 64)).shape == (2, 5) and seen == [(8, 8)]
    with pytest.raises(DownresError, match="SwinTransformer can be neither merged nor pooled .its attention needs the grid"):
        reduce(model, merge=4)


def test_torchvisions_swin_takes_any_size_and_other_patches():
    model = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [1, 2], [4, 4], num_classes=5)
    randomised(model)
    assert takes_any_size(model)
    x = images(1, 3, 50, 70)
    wanted = run(model, F.interpolate(x, (40, 56), mode="bilinear", antialias=True))
    torch.testing.assert_close(run(reduce(model, resolution=40), x), wanted)
    seen = []
    half = reduce(model, stem_scale=0.5)
    half.features[0][2].register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape[1:3])))
    assert run(half, images(1, 3, 64, 64)).shape == (1, 5) and seen == [(8, 8)]
    large = reduce(model, resolution=48, patch_size=6)
    assert run(large, images(1, 3, 48, 48)).shape == (1, 5) and large.features[0][0].kernel_size == (6, 6)
    with pytest.raises(DownresError, match="windows.*lower its resolution"):
        reduce(model, merge=4)


def test_windows_that_cannot_follow_say_so():
    model = torchvision.models.maxvit.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 8, 0.0, num_classes=5).eval()
    assert run(model, images(1, 3, 64, 64)).shape == (1, 5) and not takes_any_size(model)
    for given in ({"resolution": 32}, {"stem_scale": 0.5}):
        with pytest.raises(DownresError, match="windows of .* cannot follow an image of 32 px.*2x2.*64 px"):
            reduce(model, **given)
    timms = timm.create_model("maxvit_rmlp_pico_rw_256", num_classes=5)
    with pytest.raises(DownresError, match="100 px is not a multiple of 32"):
        reduce(timms, resolution=100)


# --- fewer tokens -------------------------------------------------------------------------------------------------


def test_merging_nothing_changes_nothing(named):
    _, model = named
    x = images(2, 3, SIDE, SIDE)
    torch.testing.assert_close(run(merged(model, [0, 0, 0]), x), run(model, x))


@pytest.mark.parametrize("by", ["merge", "prune"])
def test_fewer_tokens_keep_the_shapes(named, by):
    name, model = named
    if by == "prune" and not find_adapter(model).class_token:
        with pytest.raises(DownresError, match="Pruning goes by the attention of a class token.*merge instead"):
            reduce(model, input_size=(3, SIDE, SIDE), merge=Merge(r=2, by=by))
        return
    x = images(2, 3, SIDE, SIDE)
    small = reduce(model, input_size=(3, SIDE, SIDE), merge=Merge(r=8, by=by))
    assert run(small, x).shape == run(model, x).shape and not torch.allclose(run(small, x), run(model, x))
    shortened = features(small, x)
    assert shortened.shape == features(model, x).shape  # every patch has its token back
    found = token_map(small, x)
    assert found.shape == (2, 6, 6)
    assert [len(picture.unique()) for picture in found] == [36 - 24] * 2
    prefix = find_adapter(model).prefix
    for tokens, groups in zip(shortened[:, prefix:], found.flatten(1), strict=True):
        for group in groups.unique():  # the patches of a group share one token
            assert (tokens[groups == group] == tokens[groups == group][0]).all()


@pytest.mark.parametrize("name", [n for n in SEQUENCES if n not in (*ROTARY, "torchvision stem")])  # these tokens know places
def test_merging_equal_tokens_changes_nothing(name):
    """Attention in proportion to size, means of groups and unmerging together: tokens that are alike may be one."""
    model = randomised(SEQUENCES[name]()).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "pos" in key:
                parameter.zero_()
    # Every patch twice, side by side: neighbours are on different sides of the matching, as the grid is even.
    x = images(2, 3, 6, 3).repeat_interleave(8, dim=2).repeat_interleave(16, dim=3).double()
    torch.testing.assert_close(features(merged(model, [18, 0, 0]), x), features(model, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(merged(model, [0, 18, 0]), x), run(model, x), rtol=1e-9, atol=1e-9)


def test_prefix_tokens_are_left_alone(named):
    _, model = named
    prefix = find_adapter(model).prefix
    x = images(2, 3, SIDE, SIDE)
    one = merged(model, [0, 0, 9])  # whatever merges behind the last attention reaches no other token
    torch.testing.assert_close(features(one, x)[:, :prefix], features(model, x)[:, :prefix])
    rest = (features(one, x) - features(model, x))[:, prefix:].abs().amax(dim=-1)
    assert ((rest > 1e-4).sum(dim=1) >= 9).all()


@pytest.mark.parametrize("build", [lambda: vit(global_pool="avg", class_token=False), lambda: naflex(global_pool="avg")])
def test_a_mean_over_patches_weighs_by_size(build):
    model, x = randomised(build()), images(1, 3, SIDE, SIDE)
    small = reduce(model, input_size=(3, SIDE, SIDE), merge=8)
    prefix, groups = find_adapter(model).prefix, token_map(small, x).flatten()
    with torch.no_grad():
        tokens = small.norm(features(small, x))[0, prefix:]
        counts = torch.stack([(groups == g).sum() for g in groups.unique()])
        each = torch.stack([tokens[groups == g][0] for g in groups.unique()])
        mean = (each * counts[:, None]).sum(dim=0) / counts.sum()
        wanted = small.head(small.fc_norm(mean))
    torch.testing.assert_close(run(small, x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_pooled_tokens_are_resampled_and_get_their_grid_back(named):
    _, model = named
    x, prefix = images(2, 3, SIDE, SIDE), find_adapter(model).prefix
    first = find_adapter(model).block_names()[0]

    def sequences(net):
        """What comes into each block."""
        net, seen = copy.deepcopy(net), []
        for block in find_adapter(net).blocks():
            block.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        run(net, x)
        return seen

    whole = sequences(model)
    for at, stem in ((0, None), (1, first)):
        small = reduce(model, input_size=(3, SIDE, SIDE), stem_scale=0.5, stem=stem)
        assert run(small, x).shape == run(model, x).shape and features(small, x).shape == features(model, x).shape
        found = sequences(small)
        assert [tokens.shape[1] - prefix for tokens in found] == [36] * at + [9] * (3 - at)
        grid = whole[at][:, prefix:].transpose(1, 2).unflatten(2, (6, 6))
        wanted = F.interpolate(grid, (3, 3), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found[at][:, prefix:], wanted)
        assert torch.equal(found[at][:, :prefix], whole[at][:, :prefix])


@pytest.mark.parametrize("name", ROTARY)
def test_rotations_follow_the_pooled_grid(name):
    """A pooled sequence turns like the sequence of an image that has the smaller grid from the start."""
    model = randomised(SEQUENCES[name]())
    pooled, lower = (
        reduce(model, input_size=(3, SIDE, SIDE), stem_scale=0.5),
        reduce(model, input_size=(3, SIDE, SIDE), resolution=24),
    )
    turns = {}
    for key, net, x in (("pooled", pooled, images(1, 3, SIDE, SIDE)), ("lower", lower, images(1, 3, 24, 24))):
        block = find_adapter(net).blocks()[2]
        block.attn.register_forward_pre_hook(
            lambda _m, _args, kwargs, key=key: turns.update({key: kwargs["rope"]}), with_kwargs=True
        )
        run(net, x)
    torch.testing.assert_close(turns["pooled"], turns["lower"])


def test_everything_together(named):
    name, model = named
    given = {"ragged": "pad"} if name == "torchvision stem" else {"patch_size": 6}
    small = reduce(model, input_size=(3, SIDE, SIDE), resolution=(36, 48), stem_scale=0.75, merge="2-decreasing", **given)
    x = images(2, 3, SIDE, SIDE)
    assert run(small, x).shape == run(model, x).shape  # tokens that are handed out get the original's grid
    assert measure_cost(small, (3, 36, 48)).macs < measure_cost(model, (3, SIDE, SIDE)).macs


def test_a_reduced_model_is_a_model(named):
    """On another device too, also what belongs to no module, as rotations on the pooled grid: the one without numbers shows it
    anywhere.
    """
    name, model = named
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    x = images(2, 3, SIDE, SIDE)
    small = reduce(model, input_size=(3, SIDE, SIDE), resolution=32, stem_scale=0.8, merge=1)
    assert list(small.state_dict()) == list(before)
    assert [type(m) for m in model.modules()] == classes and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wanted = run(small, x)
    assert torch.equal(run(copy.deepcopy(small), x), wanted)
    assert torch.equal(run(pickle.loads(pickle.dumps(small)), x), wanted)
    fresh = reduce(randomised(SEQUENCES[name](), seed=1), resolution=32, stem_scale=0.8, merge=1)
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(run(fresh, x), wanted)
    assert run(small.to("meta"), torch.empty(2, 3, SIDE, SIDE, device="meta")).device.type == "meta"


def test_inputs_with_too_few_tokens_get_their_sentence():
    model, x = randomised(vit(dynamic_img_size=True)), images(1, 3, 24, 24)
    for merge, words in (
        ("merge8", "Block 0 was to merge 8 tokens, and this input has 9"),
        ("prune8", "prune 8 tokens.* has 9"),
    ):
        small = reduce(model, input_size=(3, SIDE, SIDE), merge=merge)
        with pytest.raises(DownresError, match=f"{words}.*reduce it with their resolution"):
            small(x)
        assert run(small, images(1, 3, SIDE, 64)).shape == (1, 5)  # more than enough
    with pytest.raises(DownresError, match="made for images of 48x48 px, it got 24x24"):
        reduce(model, input_size=(3, SIDE, SIDE), stem_scale=0.5)(x)


def test_several_attentions_in_a_block_are_matched_by_all_their_keys():
    model = merged(randomised(SEQUENCES["parallel things"]()), [4, 0, 0])
    seen = []
    find_adapter(model).blocks()[0].ffns[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    block = find_adapter(model).blocks()[0]
    keys = []
    for branch in block.attns:
        branch.attn.k_norm.register_forward_hook(lambda _m, _args, out: keys.append(out.shape))
        branch.attn.k_norm.register_forward_hook(lambda _m, _args, out: keys.append(block.tokens.keys.shape))
    run(model, images(2, 3, SIDE, SIDE))
    assert keys == [(2, 2, 37, 16), (2, 2, 37, 16), (2, 2, 37, 16), (2, 4, 37, 16)] and seen == [33]


def test_merged_blocks_take_no_mask():
    model = reduce(randomised(vit()), merge=2)
    with pytest.raises(DownresError, match="takes no attention mask"):
        model.forward_features(images(1, 3, SIDE, SIDE), attn_mask=torch.zeros(37, 37))
    with pytest.raises(DownresError, match="takes no attention mask"):
        model.forward_features(images(1, 3, SIDE, SIDE), is_causal=True)


# --- inside a user's own module -----------------------------------------------------------------------------------


class Around(nn.Module):
    """What users put around a library's transformer."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.backbone((x - 0.5) / 0.2))


@pytest.mark.parametrize("name", ["vit", "dinov3", "torchvision"])
def test_a_library_transformer_is_found_inside(name):
    inner = randomised(SEQUENCES[name]())
    model, x = Around(inner).eval(), images(2, 3, SIDE, SIDE)
    small = reduce(model, Candidate(32, 0.5, merge=Merge(r=1)))
    assert all("backbone" in change.module for change in small.downres.changes if change.kind != "input resize")
    candidate = Candidate(32, 0.5, merge=Merge(r=1))
    normalised = (F.interpolate(x, (32, 32), mode="bilinear", antialias=True) - 0.5) / 0.2
    wanted = run(model.head, run(reduce(inner, candidate, resize_input=False), normalised))
    torch.testing.assert_close(run(small, x), wanted)


class Between(nn.Module):
    """Reads the tokens of a block in the middle without asking timm for them."""

    def __init__(self):
        super().__init__()
        self.backbone = vit()

    def forward(self, x):
        return self.backbone.blocks[1](self.backbone.blocks[0](self.backbone._pos_embed(self.backbone.patch_embed(x))))


def test_tokens_that_are_read_between_blocks_are_noticed():
    """timm's way to feature maps takes them from blocks in the middle: these have no grid once tokens are merged."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, features_only=True, out_indices=(1, 2)).eval()
    assert [tuple(f.shape[2:]) for f in run(reduce(model, resolution=32), images(1, 3, 64, 64))] == [(4, 4)] * 2
    for given in ({"merge": 2}, {"stem_scale": 0.5}):
        with pytest.raises(
            DownresError, match="Block 1 of this reduced VisionTransformer .*take the last block's.*lower the res"
        ):
            reduce(model, input_size=(3, 64, 64), **given)
        with pytest.raises(DownresError, match="Between takes tokens out of backbone between its blocks.*lower the res"):
            reduce(Between().eval(), **given)
    last = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, features_only=True, out_indices=(2,)).eval()
    (found,) = run(reduce(last, input_size=(3, 64, 64), stem_scale=0.5, merge=1), images(1, 3, 64, 64))
    assert found.shape[2:] == (4, 4)


@pytest.mark.parametrize("given", [{"merge": 4}, {"stem_scale": 0.5}, {"stem_scale": 0.5, "merge": 2}], ids=str)
@pytest.mark.parametrize("name", ["vit", "eva", "naflex"])
def test_maps_between_blocks_are_refused(name, given):
    """timm reshapes what any block returns to the whole grid, and would mix tokens with channels."""
    model, x = randomised(SEQUENCES[name]()), images(2, 3, SIDE, SIDE)
    reduced = reduce(model, input_size=(3, SIDE, SIDE), **given)
    for small in (reduced, copy.deepcopy(reduced), pickle.loads(pickle.dumps(reduced))):
        words = "returns fewer tokens than its grid has.*take the last block's"
        with pytest.raises(DownresError, match=words):
            small.forward_intermediates(x)
        with pytest.raises(DownresError, match=words):
            small.forward_intermediates(x, indices=[-2], intermediates_only=True)
        if name == "vit":
            with pytest.raises(DownresError, match=words):
                small.get_intermediate_layers(x, n=[0], reshape=True)
        with torch.no_grad():
            (last,) = small.forward_intermediates(x, indices=1, intermediates_only=True)
            assert last.shape == (2, 32, 6, 6)
            torch.testing.assert_close(last.flatten(2).transpose(1, 2), features(small, x)[:, small.num_prefix_tokens :])
    assert reduced.state_dict().keys() == model.state_dict().keys()


def test_blocks_before_the_pooling_keep_their_maps():
    model, x = randomised(vit()), images(1, 3, SIDE, SIDE)
    small = reduce(model, stem_scale=0.5, stem="blocks.0", input_size=(3, SIDE, SIDE))
    with torch.no_grad():
        given = {"indices": [0], "intermediates_only": True}
        torch.testing.assert_close(small.forward_intermediates(x, **given), model.forward_intermediates(x, **given))


class MeanOfMaps(nn.Module):
    """Two numbers an image, from the map of a block in the middle: no shape tells that the map is scrambled."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = vit(), nn.Linear(32, 2)

    def forward(self, x):
        (last,) = self.backbone.forward_intermediates(x, indices=[1], intermediates_only=True)
        return self.head(last.mean(dim=(2, 3)))


def test_a_mean_of_maps_between_blocks_is_noticed():
    with pytest.raises(DownresError, match="^Block 1 of this reduced VisionTransformer returns fewer tokens"):
        reduce(MeanOfMaps().eval(), merge=2)
    assert run(reduce(MeanOfMaps().eval(), resolution=32), images(1, 3, SIDE, SIDE)).shape == (1, 2)


@pytest.mark.parametrize(
    ("build", "stem"),
    [
        (vit, "patch_embed.proj"),
        (torchvision_vit, "conv_proj"),
        (lambda: SwinTransformer(img_size=64, patch_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 1)), "layers.0"),
        (lambda: SwinTransformer(img_size=64, embed_dim=12, depths=(1, 1), num_heads=(1, 1), num_classes=0), "norm"),
        (lambda: torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [1, 1], [4, 4]), "features.1"),
    ],
    ids=["timm", "torchvision", "swin", "swin without a head", "torchvision swin"],
)
def test_a_stem_that_the_rest_cannot_follow_is_noticed(build, stem):
    """Positions for the whole grid, or maps whose last axis is the channels."""
    with pytest.raises(DownresError, match="name another module with stem=") as said:
        reduce(build().eval(), stem_scale=0.5, stem=stem)
    assert "\n" not in str(said.value)


class Two(nn.Module):
    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        return self.one(x) + self.other(x)


def test_two_transformers_in_a_module():
    for given in ({"resolution": 32}, {"patch_size": 16}):
        with pytest.raises(DownresError, match="holds two transformers, one and other, and only the first"):
            reduce(Two(vit(), torchvision_vit()).eval(), **given)
    x, free = images(1, 3, SIDE, SIDE), Two(vit(), vit(dynamic_img_size=True)).eval()
    small = reduce(free, resolution=32)
    assert run(small, x).shape == (1, 5) and small.one.patch_embed.img_size == (32, 32)


class OwnGrid(nn.Module):
    """A dense head that took down the grid when it was made."""

    def __init__(self):
        super().__init__()
        self.backbone, self.grid = vit(global_pool="", num_classes=0), (6, 6)

    def forward(self, x):
        return self.backbone(x)[:, 1:].transpose(1, 2).unflatten(2, self.grid)


class TwoInputs(OwnGrid):
    def forward(self, x, y):
        return self.backbone(x).mean(dim=1) + y


@pytest.mark.parametrize("given", [{"resolution": 32}, {"patch_size": 16}], ids=str)
def test_a_head_for_the_old_grid_is_noticed(given):
    model = OwnGrid().eval()
    assert run(model, images(1, 3, SIDE, SIDE)).shape == (1, 32, 6, 6)
    with pytest.raises(DownresError, match="OwnGrid cannot be made for .*unflatten.*reduce less"):
        reduce(model, **given)


def test_a_wrapper_that_takes_more_than_an_image_is_left_untried():
    small = reduce(TwoInputs().eval(), resolution=32)
    with torch.no_grad():
        assert small(images(1, 3, SIDE, SIDE), 1.0).shape == (1, 32)


def test_checkpointing_that_is_turned_off_is_said():
    model = vit()
    assert not any(c.kind == "gradient checkpointing" for c in reduce(model, merge=2).downres.changes)
    model.set_grad_checkpointing()
    small = reduce(model, merge=2)
    assert [c.kind for c in small.downres.changes] == ["token merging", "gradient checkpointing"]
    assert model.grad_checkpointing and not small.grad_checkpointing
    assert small.train()(images(1, 3, SIDE, SIDE)).requires_grad


def test_a_resizable_transformer_is_found_inside():
    inner = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 1), num_heads=(1, 1))
    inner.reset_classifier(5)
    small = reduce(Around(inner).eval(), resolution=32)
    assert run(small, images(1, 3, 64, 64)).shape == (1, 3) and small.backbone.patch_embed.img_size == (32, 32)


# --- what timm builds for one size alone --------------------------------------------------------------------------

REBUILT = {
    "cait_xxs24_224": {"depth": 2, "img_size": 64},
    "pit_ti_224": {"depth": (1, 1, 1), "img_size": 96},
    "tnt_s_patch16_224": {"depth": 1, "img_size": 64},
    "volo_d1_224": {"img_size": 64},
    "visformer_tiny": {"depth": (1, 1, 1), "img_size": 64},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "img_size": 128},
}


def by_hand(tensor, like, old, new):
    """Position embeddings of any of their layouts resampled once more, without downres."""
    if tensor.ndim == 3:
        grid = {n * m: (n, m) for n, m in (old, new)}
        prefix = 0 if tensor.shape[1] in grid else 1
        return resample_abs_pos_embed(tensor, list(new), old_size=list(old), num_prefix_tokens=prefix)
    first = tensor if tensor.shape[1] == like.shape[1] else tensor.permute(0, 3, 1, 2)
    size = like.shape[2:] if first is tensor else like.shape[1:3]
    found = F.interpolate(first, tuple(size), mode="bicubic", antialias=True)
    return found if first is tensor else found.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", REBUILT)
def test_networks_that_timm_cannot_resize_equal_what_it_builds(name):
    given = REBUILT[name]
    side = given["img_size"]
    target = (side // 2, side // 2) if name != "pit_ti_224" else (64, 64)
    model = randomised(timm.create_model(name, num_classes=5, **given))
    wanted = timm.create_model(name, num_classes=5, **{**given, "img_size": target}).eval()
    state = model.state_dict()
    units = {"hiera_tiny_224": 4}
    unit = units.get(name, 16)
    old, new = (side // unit,) * 2, (target[0] // unit, target[1] // unit)
    changed = {}
    for key, like in wanted.state_dict().items():
        if like.shape != state[key].shape:
            changed[key] = by_hand(state[key], like, old, new)
    assert changed, "a network without positions shows nothing here"
    wanted.load_state_dict({**state, **changed})
    small, x = reduce(model, resolution=target), images(1, 3, *target)
    torch.testing.assert_close(run(small, x), run(wanted, x), rtol=1e-4, atol=1e-4)
    assert list(small.state_dict()) == list(state) and run(model, images(1, 3, side, side)).shape == (1, 5)
    assert torch.equal(run(pickle.loads(pickle.dumps(small)), x), run(small, x))


def test_a_users_head_and_hooks_survive_the_rebuilding():
    model = timm.create_model("cait_xxs24_224", depth=1, img_size=64).double().eval()
    model.head, calls = nn.Linear(192, 7).double(), []
    model.blocks[0].register_forward_hook(lambda _m, _args, out: calls.append(out.shape[1]))
    model.norm.weight.requires_grad_(False)
    chance = torch.get_rng_state()
    small = reduce(model, resolution=32)
    assert torch.equal(torch.get_rng_state(), chance)  # what timm builds beside it takes no random numbers away
    assert run(small, images(1, 3, 64, 64).double()).shape == (1, 7) and calls[-1] == 4
    assert small.head.weight.dtype == torch.float64 and not small.norm.weight.requires_grad
    assert torch.equal(small.head.weight, model.head.weight) and small.head.weight is not model.head.weight


def test_tables_of_relative_positions_keep_their_middle():
    """A table that is the distance itself stays a distance: nothing in the middle, and as much to either side."""
    model = timm.create_model("mvitv2_tiny", img_size=64, num_classes=5).eval()
    with torch.no_grad():
        for key, table in model.named_parameters():
            if "rel_pos" in key:
                middle = (table.shape[0] - 1) / 2
                table.copy_((torch.arange(table.shape[0]) - middle)[:, None].expand_as(table))
    small = reduce(model, resolution=32)
    tables = {key: table for key, table in small.named_parameters() if "rel_pos" in key}
    shrunk = [key for key, table in tables.items() if table.shape != model.get_parameter(key).shape]
    assert len(shrunk) >= 6
    for key in shrunk:
        table = tables[key][:, 0]
        torch.testing.assert_close(table, -table.flip(0), rtol=1e-4, atol=1e-4)
        inner = table[2:-2].diff()
        torch.testing.assert_close(
            inner, torch.full_like(inner, model.get_parameter(key).shape[0] / len(table)), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize(("name", "tables_at_least"), [("levit_128s", 6), ("efficientformer_l1", 1)])
def test_tables_by_distance_equal_timms(name, tables_at_least):
    from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_levit

    model = randomised(timm.create_model(name, num_classes=5))
    small = reduce(model, resolution=160)
    tables = [key for key in model.state_dict() if key.endswith("attention_biases")]
    for key in tables:
        old, new = model.get_parameter(key), small.get_parameter(key)
        torch.testing.assert_close(new, resize_rel_pos_bias_table_levit(old.T, new.shape[::-1]).T, rtol=1e-4, atol=1e-5)
    assert len(tables) >= tables_at_least and run(small, images(1, 3, 160, 160)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "given", "resolution", "words"),
    [
        ("mixer_s32_224", {}, 128, "mlp_tokens.* holds a weight for each token.*leave its resolution"),
        ("gmlp_ti16_224", {}, 128, "gate.proj.weight holds a weight for each token.*leave its resolution"),
        ("resmlp_12_224", {}, 128, "linear_tokens.* holds a weight for each token.*leave its resolution"),
        ("convit_tiny", {"depth": 2}, (96, 128), "ConVit cannot be made for 96x128 px"),
        ("nest_tiny", {}, (96, 128), "Nest cannot be made for 96x128 px .*square"),
        ("crossvit_tiny_240", {}, 128, "CrossVit cannot be made for 128 px .*no grid"),
        ("halonet26t", {}, 128, "cannot be made for '128' .*block_size == 0"),
    ],
    ids=lambda v: v if isinstance(v, str) and "_" in v else "",
)
def test_what_cannot_shrink_says_why(name, given, resolution, words):
    with torch.device("meta"):  # its numbers say nothing here, and take a second to draw
        model = timm.create_model(name, num_classes=5, **given).eval()
    with pytest.raises(DownresError, match=words) as caught:
        reduce(model, resolution=resolution)
    assert str(caught.value).count("\n") == 0 and not str(caught.value).startswith("<")


# --- convnets, and networks that nobody knows ---------------------------------------------------------------------


def test_convnets_cost_no_run(monkeypatch):
    def no_run(*_args):
        raise AssertionError("a plain convnet is run for nothing")

    monkeypatch.setattr(unknown, "fake_run", no_run)
    monkeypatch.setattr(own, "fake_run", no_run)
    with torch.device("meta"):
        models = (timm.create_model("resnet18"), timm.create_model("convnext_atto"), torchvision.models.mobilenet_v2())
    for model in models:
        assert find_adapter(model) is None and takes_any_size(model)
        reduce(model, resolution=64)


def test_a_convnet_asked_for_tokens_says_what_it_can():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    for given in ({"merge": 4}, {"merge": "prune4"}, {"patch_size": 20}):
        with pytest.raises(DownresError, match="needs a vision transformer with patches, ResNet has none.*stem_scale"):
            reduce(model, **given)


class FixedAttention(nn.Module):
    """Attention over a fixed number of places, as nobody else writes it."""

    def __init__(self):
        super().__init__()
        self.stem, self.positions = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(64, 8))
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)
        self.pretrained_cfg = {"input_size": (3, 32, 32)}

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.mix(x, x, x)[0].mean(1))


class FreeAttention(FixedAttention):
    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(x, x, x)[0].mean(1))


def test_an_unknown_network_of_fixed_size_is_noticed():
    assert run(FixedAttention().eval(), images(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(DownresError, match="FixedAttention runs at its own size alone.*16 px"):
        reduce(FixedAttention(), resolution=16)
    with pytest.raises(DownresError, match="FixedAttention cannot be made for 'as is stem×0.5'.*64.*name another module"):
        reduce(FixedAttention(), stem_scale=0.5)
    free = FreeAttention().eval()
    assert takes_any_size(free) and not takes_any_size(FixedAttention())
    x = images(1, 3, 32, 64)
    torch.testing.assert_close(
        run(reduce(free, resolution=16), x), run(free, F.interpolate(x, (16, 32), mode="bilinear", antialias=True))
    )


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"patch_size": 64}, "A patch of 64 px is larger than the image of 48 px: give a smaller patch or a higher resolution"),
        ({"resolution": 24, "patch_size": 32}, "A patch of 32 px is larger than the image of 24 px"),
        ({"merge": 12}, "merge12 would take 36 tokens out of 36 in 3 blocks: give at most 11 a block"),
        ({"resolution": 16, "merge": 2}, "merge2 would take 6 tokens out of 4 in 3 blocks: give at most 1 a block"),
        ({"merge": 0.05}, "cannot be reached: merging at most halves"),
        ({"resolution": 44}, "44 px is not a multiple of 8.*floor.*pad"),
        ({"patch_size": 9}, "48 px is not a multiple of 9"),
        ({"resolution": 6, "ragged": "floor"}, "Nothing is left of 6 px in steps of 8"),
        ({"stem_scale": 0.5, "stem": "blocks.2"}, "blocks.2 is the last block"),
        ({"stem_scale": 0.5, "stem": "block.1"}, "no module 'block.1': did you mean blocks.1"),
    ],
    ids=str,
)
def test_bad_input_gets_its_sentence(given, words):
    with pytest.raises(DownresError, match=words):
        reduce(vit(), **given)


def test_blocks_of_an_unknown_kind_can_be_pooled_and_not_merged():
    class Other(timm.models.vision_transformer.Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x, attn_mask) * 0.9

    model = randomised(vit(block_fn=Other))
    assert run(reduce(model, stem_scale=0.5), images(1, 3, SIDE, SIDE)).shape == (1, 5)
    with pytest.raises(DownresError, match="blocks of kind Other cannot be merged .known kinds: Block.*stem_scale"):
        reduce(model, merge=2)


def test_pruning_goes_by_the_keys_as_the_class_token_meets_them_rotated():
    torch.manual_seed(0)
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=2, num_classes=3).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        # The class token's attention in the first block, by hand.
        tokens, rope = model._pos_embed(model.patch_embed(x))
        a, normed = model.blocks[0].attn, model.blocks[0].norm1(tokens)
        bias = torch.cat([a.q_bias, a.k_bias, a.v_bias])
        q, k, _ = F.linear(normed, a.qkv.weight, bias).reshape(2, 17, 3, a.num_heads, -1).permute(2, 0, 3, 1, 4)
        k = torch.cat([k[:, :, :1], apply_rot_embed_cat(k[:, :, 1:], rope, half=a.rotate_half)], dim=2)
        attention = ((q[:, :, :1] @ k.transpose(-1, -2)) * a.scale).softmax(-1).mean(1)[:, 0, 1:]
        reduced = reduce(model, merge="prune3")
        groups = token_map(reduced, x).flatten(1)
    for b in range(2):
        least = set(attention[b].argsort()[:4].tolist())  # the four that the first block fuses into one
        together = {frozenset((groups[b] == g).nonzero()[:, 0].tolist()) for g in groups[b].unique()}
        assert any(least <= group for group in together)
        assert len(together) == 16 - 2 * 3
