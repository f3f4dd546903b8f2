"""Depth and width of timm's ViTs: the scaled network is the one that timm makes when asked for those numbers."""

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from downres import Candidate, DownresError, reduce

SMALL = {"img_size": 32, "patch_size": 8, "num_classes": 5}


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def runs(model: nn.Module, side: int = 32) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0)))


CHANGED = {
    "qk_norm": True, "init_values": 1e-3, "reg_tokens": 2, "global_pool": "avg", "drop_path_rate": 0.2, "mlp_ratio": 3.0,
    "drop_rate": 0.1, "in_chans": 3, "dynamic_img_size": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "given", "heads", "channels"),
    [
        ("vit_tiny_patch16_224", SMALL, 3, 192),
        ("vit_tiny_patch16_224", SMALL | CHANGED, 3, 192),
        ("deit_tiny_distilled_patch16_224", SMALL, 3, 192),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28}, 6, 384),
        ("vit_base_patch16_siglip_224", SMALL, 12, 768),
        ("vit_tiny_r_s16_p8_224", {"img_size": 128}, 3, 192),
        ("eva02_tiny_patch14_224", {"img_size": 28}, 3, 192),
        ("vit_small_patch16_dinov3", SMALL | {"num_classes": 0}, 6, 384),
        ("vit_small_patch16_rope_mixed_224", SMALL, 6, 384),
    ],
)
def test_scaled_network_is_what_timm_makes_when_asked_for_it(name, given, heads, channels):
    with torch.device("meta"):
        model = timm.create_model(name, **given)
        less = heads // 3
        asked = {"depth": 3, "num_heads": less, "embed_dim": channels // heads * less}
        wanted = timm.create_model(name, **given, **asked)
    scaled = reduce(model, depth=3, width=less / heads, resize_input=False)
    assert type(scaled) is type(wanted) and repr(scaled) == repr(wanted)
    assert shapes(scaled) == shapes(wanted)
    assert scaled.pretrained_cfg == model.pretrained_cfg
    heads_of = [m.num_heads for m in scaled.blocks.modules() if hasattr(m, "num_heads")]
    assert heads_of == [less] * 3
    assert str(scaled.downres.changes[0]).startswith("model scaling")


@pytest.mark.parametrize("depth", [1, 4, 15])
def test_depth_alone_leaves_the_blocks_as_they_are(depth):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    scaled = reduce(model, depth=depth, resize_input=False)
    assert len(scaled.blocks) == depth and shapes(scaled.blocks[0]) == shapes(model.blocks[0])
    assert runs(scaled).shape == (2, 5)
    assert len(model.blocks) == 12


def test_parameters_by_hand():
    channels, hidden, tokens, classes, depth = 64, 256, 17, 5, 7
    norm, block = 2 * channels, 3 * channels * channels + 3 * channels + channels * channels + channels
    block += channels * hidden + hidden + hidden * channels + channels + 2 * norm
    embedding = 3 * 8 * 8 * channels + channels + channels + tokens * channels
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    scaled = reduce(model, depth=depth, width=1 / 3, resize_input=False)
    assert sum(p.numel() for p in scaled.parameters()) == embedding + depth * block + norm + channels * classes + classes


def test_weights_are_new_and_everything_else_stays():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).double().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaled = reduce(model, depth=12, width=2 / 3, resize_input=False)
    assert not scaled.training and next(scaled.parameters()).dtype == torch.float64
    assert reduce(model.train(), depth=2, resize_input=False).training
    same = reduce(model, depth=12, resize_input=False)
    assert shapes(same) == shapes(model) and not torch.equal(same.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_plain_attention_stays_plain():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    assert all(block.attn.fused_attn for block in reduce(model, depth=2, resize_input=False).blocks)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert not any(block.attn.fused_attn for block in reduce(model, depth=2, resize_input=False).blocks)


def test_a_network_that_no_name_stands_for():
    own = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 7,
           "class_token": False, "global_pool": "avg", "qkv_bias": False, "init_values": 0.1}  # fmt: skip
    model = VisionTransformer(depth=5, **own)
    scaled = reduce(model, depth=2, width=2 / 3, input_size=(3, 32, 32), resize_input=False)
    wanted = VisionTransformer(**own | {"depth": 2, "embed_dim": 64, "num_heads": 2})
    assert shapes(scaled) == shapes(wanted) and repr(scaled) == repr(wanted)
    assert runs(scaled).shape == (2, 7)


def test_a_new_head_is_seen():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.reset_classifier(3)
    assert runs(reduce(model, depth=2, width=2 / 3, resize_input=False)).shape == (2, 3)


@pytest.mark.parametrize(("width", "heads"), [(0.67, 4), (0.33, 2), (0.83, 5), (1.17, 7), (0.5, 3), (2 / 3, 4)])
def test_two_decimals_stand_for_whole_heads(width, heads):
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", img_size=32)
    scaled = reduce(model, width=width, resize_input=False)
    assert scaled.embed_dim == 64 * heads and scaled.blocks[0].attn.num_heads == heads
    assert scaled.blocks[0].mlp.fc1.out_features == 4 * 64 * heads


@pytest.mark.parametrize(("width", "nearest"), [(0.55, "0.5 (3 heads)"), (0.6, "0.6667 (4 heads)"), (0.01, "0.1667 (1 head)")])
def test_other_widths_name_the_nearest_that_does(width, nearest):
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", img_size=32)
    with pytest.raises(DownresError) as error:
        reduce(model, width=width, resize_input=False)
    assert str(error.value).endswith(f"give {nearest}.")
    reduce(model, width=float(nearest.split()[0]), resize_input=False)


class Wrapped(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", **SMALL | {"num_classes": classes})
        self.head = nn.Linear(classes or 192, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_inside_a_users_model():
    model = Wrapped(0)
    scaled = reduce(model, depth=2, input_size=(3, 32, 32), resize_input=False)
    assert len(scaled.backbone.blocks) == 2 and runs(scaled).shape == (2, 2)
    assert torch.equal(scaled.head.weight, model.head.weight)
    with pytest.raises(DownresError, match="backbone would hand on 128 channels to a model around it that takes 192"):
        reduce(model, width=2 / 3, input_size=(3, 32, 32), resize_input=False)
    # Where the ViT's own head is in between, nobody sees its width.
    assert runs(reduce(Wrapped(5), width=2 / 3, input_size=(3, 32, 32), resize_input=False)).shape == (2, 2)


def test_parts_of_the_users_own_are_not_lost_in_silence():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.blocks[3].attn.proj = nn.Sequential(nn.Linear(192, 8), nn.Linear(8, 192))
    with pytest.raises(DownresError, match="has parts that timm's constructor does not know of"):
        reduce(model, depth=4, resize_input=False)


@pytest.mark.parametrize(
    ("name", "what"),
    [("vit_base_patch16_sapiens2", "num_kv_heads"), ("vit_base_mci_224", "must match embed dim")],
)
def test_what_timm_cannot_make_says_why(name, what):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(DownresError, match=what):
        reduce(model, width=0.5, resize_input=False)


def test_scaled_network_takes_the_other_reductions_too():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=5)
    small = reduce(model, Candidate(32, merge=2, depth=3, width=2 / 3), resize_input=False)
    assert [change.kind for change in small.downres.changes] == ["model scaling", "input size", "token merging"]
    assert runs(small).shape == (2, 5)


def test_convnets_are_told_what_to_do_instead():
    with pytest.raises(DownresError, match="lower its resolution"):
        reduce(timm.create_model("resnet18"), depth=2)
