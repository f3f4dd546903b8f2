"""Vision transformers of the transformers library: tiny ones with random weights, made from configurations."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_levit
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    HieraConfig,
    HieraForImageClassification,
    LevitConfig,
    LevitForImageClassification,
    MetaClip2VisionConfig,
    MetaClip2VisionModel,
    PvtConfig,
    PvtForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
    Siglip2Config,
    Siglip2ForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    Swin2SRConfig,
    Swin2SRForImageSuperResolution,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMSNConfig,
    ViTMSNForImageClassification,
)

from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.errors import DownresError
from downres.families.adapter import KeepOutput, SetKeyword
from downres.families.find import find_adapter
from downres.measuring.cost import measure_cost
from downres.probe import logits_of
from downres.reduction import reduce, token_map
from downres.reductions.tokens import TokenState, match_unattended

WIDTH, BLOCKS, IMAGE, PATCH, CLASSES = 32, 3, 32, 8, 5
SIZES = {"image_size": IMAGE, "patch_size": PATCH}
VISION = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2, **SIZES}
MLP = {"intermediate_size": 2 * WIDTH}
TEXT = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOWS = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": IMAGE, "patch_size": 4}

PLAIN = ["vit", "deit", "dinov2", "dinov2_with_registers", "siglip", "clip", "dinov3"]
LEARNED = [name for name in PLAIN if name != "dinov3"]  # positions of the grid that are parameters
WINDOWED = ["swin", "swinv2"]
RELATIVE = ["beit", "beit shared"]
ALL = [*PLAIN, *WINDOWED, *RELATIVE, "segformer"]


class WithHead(nn.Module):
    """A user's own module around a transformer of the library."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.head(self.backbone(x).last_hidden_state.mean(dim=1))


def build(name, **other):
    labels = {"num_labels": CLASSES}
    towers = {"text_config": TEXT, "vision_config": {**VISION, **MLP, **other}}
    if name == "vit":
        return ViTForImageClassification(ViTConfig(**VISION, **MLP, **labels, **other))
    if name == "deit":
        return DeiTForImageClassification(DeiTConfig(**VISION, **MLP, **labels))
    if name == "dinov2":
        return Dinov2ForImageClassification(Dinov2Config(**VISION, mlp_ratio=2, **labels))
    if name == "dinov2_with_registers":
        config = Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_register_tokens=2, **labels)
        return Dinov2WithRegistersForImageClassification(config)
    if name == "siglip":
        return SiglipForImageClassification(SiglipConfig(**towers, **labels))
    if name == "clip":
        return CLIPForImageClassification(CLIPConfig(**towers, **labels))
    if name == "dinov3":
        return WithHead(DINOv3ViTModel(DINOv3ViTConfig(**VISION, **MLP, num_register_tokens=2)))
    if name == "swin":
        return SwinForImageClassification(SwinConfig(**{**WINDOWS, **labels, **other}))
    if name == "swinv2":
        return Swinv2ForImageClassification(Swinv2Config(**{**WINDOWS, **labels, **other}))
    if name in RELATIVE:
        bias = "use_shared_relative_position_bias" if name == "beit shared" else "use_relative_position_bias"
        config = BeitConfig(**VISION, **MLP, **labels, **{bias: True}, use_absolute_position_embeddings=True)
        return BeitForImageClassification(config)
    sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}
    return SegformerForImageClassification(SegformerConfig(**sizes, **labels))


@functools.cache
def original(name):
    """Every parameter is random: no table, token or layer scale is left at zero or one. Tests work on copies."""
    torch.manual_seed(0)
    model = build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def photo(height=IMAGE, width=IMAGE, batch=2, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def run(model, x):
    with torch.no_grad():
        return logits_of(model(x))


def fitted(name, image, patch=None):
    model = copy.deepcopy(original(name))
    find_adapter(model).fit(image, patch)
    return model


def transformer(model):
    return find_adapter(model).module


def small(name, **how):
    return reduce(original(name), input_size=(3, IMAGE, IMAGE), **how)


def lengths(model, x):
    """Tokens that each block gets, after what other hooks did to them."""
    adapter, seen = find_adapter(model), []
    hooks = [
        b.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((*args, *kwargs.values())[0].shape[1]), with_kwargs=True
        )
        for b in adapter.blocks()
    ]
    run(model, x)
    for hook in hooks:
        hook.remove()
    return seen


# --- what is known of each family ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "where", "image", "patch", "prefix", "class_token", "blocks"),
    [
        ("vit", "vit", 32, 8, 1, True, "layers.2"),
        ("deit", "deit", 32, 8, 2, True, "layers.2"),
        ("dinov2", "dinov2", None, 8, 1, True, "encoder.layer.2"),
        ("dinov2_with_registers", "dinov2_with_registers", None, 8, 3, True, "encoder.layer.2"),
        ("siglip", "vision_model", 32, 8, 0, False, "encoder.layers.2"),
        ("clip", "vision_model", 32, 8, 1, True, "encoder.layers.2"),
        ("dinov3", "backbone", None, 8, 3, True, "model.layer.2"),
        ("swin", "swin", 32, 4, 0, False, None),
        ("swinv2", "swinv2", 32, 4, 0, False, None),
        ("beit", "beit", 32, 8, 0, False, None),
        ("segformer", "segformer", None, None, 0, False, None),
    ],
)
def test_adapters(name, where, image, patch, prefix, class_token, blocks):
    found = find_adapter(original(name))
    pair = lambda n: None if n is None else (n, n)  # noqa: E731
    assert (found.name, found.image, found.patch) == (where, pair(image), pair(patch))
    assert (found.prefix, found.class_token) == (prefix, class_token)
    names = found.block_names()
    assert (len(names), names[-1]) == (BLOCKS, blocks) if blocks else names == []
    assert found.resamples_itself == name.startswith("dinov2")
    if names:
        assert lengths(original(name), photo()) == [prefix + 16] * BLOCKS


# --- resolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in ALL if n != "segformer"])
def test_fitting_to_its_own_size_changes_nothing(name):
    torch.testing.assert_close(run(fitted(name, (IMAGE, IMAGE)), photo()), run(original(name), photo()))


def expected_positions(positions, prefix, grid):
    """(1, prefix + 16, C) of a 4×4 grid, resampled by torch alone."""
    patches = positions[:, prefix:].float().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :prefix], patches.to(positions.dtype)], dim=1)


def positions_of(embeddings):
    if hasattr(embeddings, "position_embedding"):
        return embeddings.position_embedding.weight.detach()[None]
    return embeddings.position_embeddings.detach()


@pytest.mark.parametrize("size", [(24, 24), (48, 48), (16, 40), (40, 16)])
@pytest.mark.parametrize("name", [*LEARNED, "beit"])
def test_positions_are_resampled_once(name, size):
    before = copy.deepcopy(original(name).state_dict()), original(name).config.to_json_string()
    model, theirs = fitted(name, size), transformer(original(name)).embeddings
    ours, prefix = transformer(model).embeddings, positions_of(theirs).shape[1] - 16
    grid = size[0] // PATCH, size[1] // PATCH
    expected = expected_positions(positions_of(theirs), prefix, grid)
    torch.testing.assert_close(positions_of(ours), expected)
    x = photo(*size)
    with torch.no_grad():
        convolution = next(m for m in theirs.modules() if isinstance(m, nn.Conv2d))
        tokens = convolution(x).flatten(2).transpose(1, 2) + expected[:, prefix:]
        torch.testing.assert_close(ours(x)[:, -tokens.shape[1] :], tokens)
    assert run(model, x).shape == (2, CLASSES)
    found = find_adapter(model)
    assert (found.image, found.grid(size)) == (size, grid) and transformer(model).config.image_size in (size, size[0])
    after = original(name).state_dict(), original(name).config.to_json_string()
    assert after[1] == before[1] and all(torch.equal(before[0][k], v) for k, v in after[0].items())
    with pytest.raises(DownresError, match=rf"made for images of {size[0]}\w* px, it got 32x32: resize them"):
        run(model, photo())


@pytest.mark.parametrize("name", ["vit", "deit", "siglip", "clip"])
def test_asking_for_interpolation_resamples_no_second_time(name):
    model, x = fitted(name, (16, 40)), photo(16, 40)
    with torch.no_grad():
        base = transformer(model)
        torch.testing.assert_close(
            base(x, interpolate_pos_encoding=True).last_hidden_state, base(x).last_hidden_state, rtol=0, atol=0
        )


def test_positions_in_half_precision_are_resampled_in_float32():
    model = copy.deepcopy(original("vit")).to(torch.bfloat16)
    stored = positions_of(model.vit.embeddings)
    find_adapter(model).fit((24, 24), None)
    found = positions_of(model.vit.embeddings)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected_positions(stored, 1, (3, 3)))


def test_fit_starts_from_the_original_however_often():
    model = copy.deepcopy(original("vit"))
    found = find_adapter(model)
    found.fit((16, 16), (4, 4))
    found.fit((48, 48), None if found.patch == (8, 8) else (8, 8))
    again = fitted("vit", (48, 48))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize("name", [n for n in ALL if n != "segformer"])
def test_larger_patches(name):
    """FlexiViT, section 3.4: a kernel enlarged by pseudo-inverse sees in enlarged patches what the original saw."""
    p = find_adapter(original(name)).patch[0]
    x = photo()
    patches = F.unfold(x, p, stride=p).transpose(1, 2).reshape(-1, 3, p, p)
    larger = F.interpolate(patches, size=(2 * p, 2 * p), mode="bicubic", antialias=True)
    larger = F.fold(larger.reshape(2, -1, 3 * 4 * p * p).transpose(1, 2), (2 * IMAGE,) * 2, 2 * p, stride=2 * p)
    model = fitted(name, (2 * IMAGE,) * 2, (2 * p,) * 2)
    torch.testing.assert_close(run(model, larger), run(original(name), x), rtol=1e-3, atol=1e-3)
    assert find_adapter(model).patch == (2 * p, 2 * p)


@pytest.mark.parametrize("name", [n for n in ALL if n != "segformer"])
def test_reduce(name):
    """Resolution and patch through the one way in; what is shorter costs less, and the original stays usable."""
    whole, x = run(original(name), photo()), photo()
    native = measure_cost(original(name), (3, IMAGE, IMAGE)).macs
    for how in ({"resolution": 24}, {"resolution": (24, 16)}, {"patch_size": 2 * find_adapter(original(name)).patch[0]}):
        model = small(name, **how)
        assert run(model, x).shape == (2, CLASSES) and run(copy.deepcopy(model), x).equal(run(model, x))
        assert measure_cost(model, (3, IMAGE, IMAGE)).macs < 0.8 * native
    assert run(original(name), photo()).equal(whole)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_at_a_larger_size(name):
    """What the library itself builds for that size, with the same weights; also after a run at another size."""
    run(original(name), photo())  # Swin turns off the shift of its second stage here, for good
    model = fitted(name, (64, 48))
    theirs = build(name, image_size=[64, 48]).eval()
    theirs.load_state_dict(original(name).state_dict())
    x = photo(64, 48)
    assert run(model, x).equal(run(theirs, x))
    assert [b.shift_size for s in transformer(model).encoder.layers for b in s.blocks] == [0, 2, 0, 2]


def test_windows_of_swinv2_at_a_smaller_size():
    theirs = build("swinv2", image_size=24, pretrained_window_sizes=[4, 4]).eval()
    theirs.load_state_dict(original("swinv2").state_dict())
    x = photo(24, 24)
    assert run(fitted("swinv2", (24, 24)), x).equal(run(theirs, x))


def bias_of(block):
    """(heads, tokens, tokens): what is added to the attention of a window."""
    if hasattr(block.attention, "relative_position_bias"):
        return block.attention.relative_position_bias()[0].detach()
    attention = block.attention.self
    table = attention.continuous_position_bias_mlp(attention.relative_coords_table).flatten(0, 2)
    return 16 * torch.sigmoid(table[attention.relative_position_index]).permute(2, 0, 1).detach()


@pytest.mark.parametrize("name", WINDOWED)
def test_smaller_windows_keep_the_bias_of_their_offsets(name):
    model = fitted(name, (24, 24))
    stages = transformer(model).encoder.layers
    assert [b.window_size for s in stages for b in s.blocks] == [4, 4, 3, 3]
    assert [b.shift_size for s in stages for b in s.blocks] == [0, 2, 0, 0]
    inner = torch.arange(16).view(4, 4)[:3, :3].flatten()
    for ours, theirs in zip(stages[1].blocks, transformer(original(name)).encoder.layers[1].blocks, strict=True):
        torch.testing.assert_close(bias_of(ours), bias_of(theirs)[:, inner][:, :, inner])
    assert run(model, photo(24, 24)).shape == (2, CLASSES)


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("size", [(24, 24), (48, 16)])
def test_tables_of_relative_positions(name, size):
    def biases(model):
        return [m for m in model.modules() if hasattr(m, "relative_position_bias_table")]

    model, (rows, columns) = fitted(name, size), (size[0] // PATCH, size[1] // PATCH)
    for ours, theirs in zip(biases(model), biases(original(name)), strict=True):
        table = theirs.relative_position_bias_table.detach()
        number = (2 * rows - 1) * (2 * columns - 1) + 3
        expected = resize_rel_pos_bias_table(table, (rows, columns), (number, 2))
        torch.testing.assert_close(ours.relative_position_bias_table.detach(), expected)
        bias = ours((rows, columns))[0].detach()
        # Pairs of patches at the same offset have one bias, the class token has three of its own, untouched.
        patches = bias[:, 1:, 1:].reshape(2, rows, columns, rows, columns)
        assert torch.equal(patches[:, :-1, :, :-1], patches[:, 1:, :, 1:])
        assert torch.equal(patches[:, :, :-1, :, :-1], patches[:, :, 1:, :, 1:])
        offsets = expected[:-3].reshape(2 * rows - 1, 2 * columns - 1, 2)
        assert torch.equal(patches[:, 0, 0, -1, -1], offsets[0, 0]) and torch.equal(patches[:, -1, -1, 0, 0], offsets[-1, -1])
        for place, entry in (((0, 1), -3), ((1, 0), -2), ((0, 0), -1)):
            assert torch.equal(bias[:, place[0], place[1]], table[entry])


@pytest.mark.parametrize("name", [*WINDOWED, *RELATIVE, "segformer"])
def test_resample_after_the_embedding(name):
    """The patches see all pixels; what follows works on a map of half the sides."""
    size = 64 if name == "segformer" else IMAGE
    model = reduce(original(name), stem_scale=0.5, input_size=(3, size, size))
    maps = []
    convolution = model.get_submodule(model.downres.changes[-1].module)
    convolution.register_forward_hook(lambda _m, args, out: maps.append((args[0].shape[-1], out.shape[-1])))
    x = photo(size, size)
    assert run(model, x).shape == (2, CLASSES)
    side = size // 4 if name in (*WINDOWED, "segformer") else size // PATCH
    assert maps == [(size, side // 2)]
    assert measure_cost(model, (3, size, size)).macs < 0.6 * measure_cost(original(name), (3, size, size)).macs


@pytest.mark.parametrize("size", [(64, 64), (40, 72)])
def test_segformer_takes_any_size_as_it_is(size):
    model = small("segformer", resolution=size)
    assert run(model, photo(*size)).equal(run(original("segformer"), photo(*size)))
    assert [c.kind for c in model.downres.changes] == ["input resize"]


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_merging_nothing_changes_nothing(name):
    model = copy.deepcopy(original(name))
    found = find_adapter(model)
    found.merge(TokenState((0,) * BLOCKS, found.prefix, "merge", (4, 4)), found.blocks())
    assert run(model, photo()).equal(run(original(name), photo()))
    assert model.state_dict().keys() == original(name).state_dict().keys()


@pytest.mark.parametrize("merge", ["merge2", "merge50%-decreasing", "prune2"])
@pytest.mark.parametrize("name", PLAIN)
def test_merging(name, merge):
    if name == "siglip" and merge == "prune2":
        with pytest.raises(DownresError, match="Pruning goes by the attention of a class token, SiglipVisionModel has none"):
            small(name, merge=merge)
        return
    model, prefix = small(name, merge=merge), find_adapter(original(name)).prefix
    expected = [16, 12, 9] if merge == "merge50%-decreasing" else [16, 14, 12]
    assert lengths(model, photo()) == [prefix + n for n in expected]
    with torch.no_grad():
        assert transformer(model)(photo()).last_hidden_state.shape[1] == prefix + 16  # every patch has a token again
    fused = run(model, photo())
    assert not torch.allclose(fused, run(original(name), photo()), atol=1e-3)
    transformer(model).set_attn_implementation("eager")
    torch.testing.assert_close(run(model, photo()), fused)
    assert token_map(model, photo()).shape == (2, 4, 4)
    one = run(model, photo()[:1])  # images do not mix
    torch.testing.assert_close(one, fused[:1])


@pytest.mark.parametrize("merge", ["merge5", "prune4"])
@pytest.mark.parametrize("name", LEARNED)  # rotary embeddings turn equal tokens apart
def test_merging_equal_tokens_loses_nothing(name, merge):
    """Proportional attention counts a merged token by its size: one of n equal tokens stands for all of them."""
    if name == "siglip" and merge.startswith("prune"):
        return
    model = copy.deepcopy(original(name))
    positions = positions_of(transformer(model).embeddings)  # shares the parameter's memory
    positions[:, -16:] = positions[:, -1:]
    x = photo(PATCH, PATCH).repeat(1, 1, 4, 4)
    merged = reduce(model, merge=merge, input_size=(3, IMAGE, IMAGE))
    assert lengths(merged, x)[-1] <= find_adapter(model).prefix + 8
    torch.testing.assert_close(run(merged, x), run(model, x), rtol=1e-4, atol=1e-4)


def watched(name, by):
    """The first block's norm output, attention weights (library's own, eager), and the keys and queries it merges by."""
    model = copy.deepcopy(original(name))
    transformer(model).set_attn_implementation("eager")
    found, seen = find_adapter(model), {}
    state = TokenState((3, 0, 0), found.prefix, by, (4, 4))
    found.merge(state, found.blocks())
    block, shrink = found.blocks()[0], state.shrink

    def noting(index, x):
        if index == 0:
            seen.update(keys=state.keys, queries=state.queries)
        return shrink(index, x)

    state.shrink = noting
    attention = block.self_attn if hasattr(block, "self_attn") else block.attention
    norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm))
    norm.register_forward_hook(lambda _m, _args, out: seen.update(normed=out))
    attention.register_forward_hook(lambda _m, _args, out: seen.update(weights=out[1]))
    run(model, photo())
    return attention, seen, found.prefix


@pytest.mark.parametrize("name", PLAIN)
def test_similarity_is_measured_on_the_keys_of_the_attention(name):
    attention, seen, prefix = watched(name, "merge")
    with torch.no_grad():
        keys = attention.k_proj(seen["normed"]).reshape(2, prefix + 16, 2, WIDTH // 2).transpose(1, 2)
    torch.testing.assert_close(seen["keys"], keys)
    assert seen["queries"] is None


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "siglip"])
def test_pruning_goes_by_the_attention_that_the_library_computes(name):
    _, seen, prefix = watched(name, "prune")
    groups = match_unattended(seen["queries"], seen["keys"], 3, prefix)
    fused = torch.cat([groups.stays[:, -1:], groups.goes], dim=1).sort(dim=1).values
    theirs = seen["weights"].mean(dim=1)[:, 0, prefix:].argsort(dim=1)[:, :4] + prefix
    assert torch.equal(fused, theirs.sort(dim=1).values)


def test_cost_of_merging_is_counted_block_by_block():
    model = small("vit", merge=3)
    c, mlp, prefix = WIDTH, 2 * WIDTH, 1
    macs, tokens = 16 * c * 3 * PATCH**2, prefix + 16
    for _ in range(BLOCKS):
        macs += tokens * 4 * c * c + 2 * tokens * tokens * c  # projections, and both products of the attention
        goes = (tokens - 2 + 1) // 2  # every second token, the class token in front left out
        macs += goes * (tokens - prefix - goes) * (c // 2)  # similarity on keys averaged over the two heads
        tokens -= 3
        macs += tokens * 2 * c * mlp
    assert measure_cost(model, (3, IMAGE, IMAGE)).macs == macs + c * CLASSES


@pytest.mark.parametrize("name", PLAIN)
def test_pooling_the_grid(name):
    model, prefix = small(name, stem_scale=0.5), find_adapter(original(name)).prefix
    assert lengths(model, photo()) == [prefix + 4] * BLOCKS
    with torch.no_grad():
        assert transformer(model)(photo()).last_hidden_state.shape[1] == prefix + 16
    later = small(name, stem_scale=0.5, stem=find_adapter(original(name)).inside(find_adapter(original(name)).block_names()[0]))
    assert lengths(later, photo()) == [prefix + 16, prefix + 4, prefix + 4]
    both = small(name, stem_scale=0.75, merge=1)
    assert lengths(both, photo()) == [prefix + 9, prefix + 8, prefix + 7] and run(both, photo()).shape == (2, CLASSES)


def test_rotary_embeddings_of_a_pooled_grid():
    model, seen = small("dinov3", stem_scale=0.5), []
    block = model.backbone.model.layer[1]
    block.attention.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run(model, photo())
    expected = original("dinov3").backbone.rope_embeddings(photo(16, 16))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))


def test_rotary_embeddings_of_a_pooled_grid_take_the_type_of_the_tokens():
    model = small("dinov3", stem_scale=0.5)
    exact = run(model, photo())
    rounded = run(model.to(torch.bfloat16), photo().bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)
    hook = SetKeyword("turns", (turns := torch.tensor([1 / 3]),))
    hook(nn.Identity(), (torch.zeros(1, dtype=torch.bfloat16),), {})
    _, given = hook(nn.Identity(), (torch.zeros(1),), {})
    assert torch.equal(given["turns"][0], turns)  # not what bfloat16 left of it


def test_rotary_embeddings_follow_the_tokens_that_are_left():
    """All tokens kept, in another order: attention that turns each by its own place gives the same, in that order."""
    model = copy.deepcopy(original("dinov3"))
    found = find_adapter(model)
    state = TokenState((0,) * BLOCKS, found.prefix, "merge", (4, 4))
    found.merge(state, found.blocks())
    block = found.blocks()[1]
    turns, x = model.backbone.rope_embeddings(photo()), torch.randn(2, found.prefix + 16, WIDTH)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    shuffled = torch.cat([x[:, : found.prefix], x[:, found.prefix :].gather(1, order[..., None].expand(-1, -1, WIDTH))], dim=1)
    with torch.no_grad():
        plain = block(x, position_embeddings=turns)
        state.place = order
        moved = block(shuffled, position_embeddings=turns)
    expected = plain[:, found.prefix :].gather(1, order[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(moved[:, found.prefix :], expected)


def test_recorded_hidden_states_follow():
    out = small("vit", merge=2)(photo(), output_hidden_states=True, output_attentions=True)
    assert [h.shape[1] for h in out.hidden_states] == [17, 15, 13, 17]
    assert [a.shape[-1] for a in small("vit", merge=2).vit.set_attn_implementation("eager") or []] == []


@pytest.mark.parametrize("name", [*WINDOWED, *RELATIVE, "segformer"])
def test_no_sequence_says_why(name):
    for how in ({"merge": 2}, {"merge": "prune2"}):
        with pytest.raises(
            DownresError, match=r"The tokens of \w+ can be neither merged nor pooled \(its attention .*\): lower"
        ) as e:
            reduce(original(name), **how, input_size=(3, IMAGE, IMAGE))
        assert "\n" not in str(e.value)
    with pytest.raises(DownresError, match="The depth and width of .* cannot be scaled here"):
        reduce(original(name), depth=1)


def test_masks_and_other_attention_kernels_are_refused():
    model = small("vit", merge=2)
    with pytest.raises(DownresError, match="takes no attention mask"):
        model(photo(), attention_mask=torch.ones(2, 17, 17)[:, None].bool())
    other = copy.deepcopy(original("vit"))
    other.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(DownresError, match=r"which 'flash_attention_2' attention does not take: call set_attn_implementation"):
        reduce(other, merge=2)


def test_patches_that_do_not_fit():
    with pytest.raises(DownresError, match="20 px is not a multiple of 8, which the network divides"):
        small("vit", resolution=20)
    with pytest.raises(DownresError, match="A patch of 64 px is larger than the image of 32 px"):
        small("vit", patch_size=64)
    with pytest.raises(DownresError, match="The patch size of SegformerModel cannot change"):
        small("segformer", patch_size=8)
    assert run(small("vit", resolution=20, ragged="pad"), photo()).shape == (2, CLASSES)


# --- depth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_depth(name):
    found = find_adapter(original(name))
    block = sum(p.numel() for p in found.blocks()[0].parameters())
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    for depth in (1, 5):
        model = small(name, depth=depth)
        assert count(model) == count(original(name)) + (depth - BLOCKS) * block
        assert len(find_adapter(model).blocks()) == depth and not model.training and not transformer(model).training
        assert run(model, photo()).shape == (2, CLASSES)
    with pytest.raises(DownresError, match="The width of a .* cannot change without the head behind it"):
        small(name, width=0.5)


# --- export -------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return logits_of(self.model(x))


@pytest.mark.parametrize(
    ("build", "size", "how"),
    [
        # Merged in the first of two blocks, so that the second counts tokens by their sizes.
        (lambda: original("vit"), (24, 40), {"merge": "2-decreasing", "depth": 2}),
        # Windows that are padded and shifted, and then smaller ones.
        (lambda: build("swin", depths=[2, 1]).eval(), (24, 24), {}),
    ],
    ids=["vit", "swin"],
)
def test_onnx(tmp_path, build, size, how):
    small = reduce(build(), resolution=size, resize_input=False, input_size=(3, IMAGE, IMAGE), **how)
    # A bias with gradients would be traced through another attention kernel than it is exported with.
    model = Logits(small).requires_grad_(False)
    file = export_onnx(model, (3, *size), tmp_path / "model.onnx")
    x = photo(*size, batch=3, seed=1)
    np.testing.assert_allclose(OnnxRuntime(file, 1)(x.numpy())[0], run(model, x).numpy(), atol=1e-4)


def test_keys_of_a_linear_layer_are_split_into_heads():
    state = TokenState((1,), 0, "merge")
    KeepOutput(state, "keys", 2)(nn.Identity(), (), torch.arange(12.0).reshape(1, 3, 4))
    assert torch.equal(state.keys[0, 1], torch.tensor([[2.0, 3.0], [6.0, 7.0], [10.0, 11.0]]))


# --- whatever else the library builds for one size --------------------------------------------------------------------

STAGES = {"num_attention_heads": [1, 1, 1], "depths": [1, 1, 1]}
BUILT = {
    "hiera": (HieraForImageClassification, HieraConfig, {
        "image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "num_query_pool": 2,
        "masked_unit_attention": [True, True, False],
    }),
    "levit": (LevitForImageClassification, LevitConfig, {
        "image_size": 128, "hidden_sizes": [16, 24, 32], "key_dim": [4, 4, 4], **STAGES,
        "down_ops": [["Subsample", 4, 2, 4, 2, 2], ["Subsample", 4, 2, 4, 2, 2]],
    }),
    "pvt": (PvtForImageClassification, PvtConfig, {
        "image_size": 64, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2],
    }),
}  # fmt: skip


def of_the_library(name, side):
    kind, config, given = BUILT[name]
    size = [side, side] if isinstance(given["image_size"], list) else side
    torch.manual_seed(0)
    model = kind(config(**{**given, "image_size": size}, num_labels=CLASSES)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def followed(key, before, after):
    """A table of positions at another size, by timm's functions."""
    if "attention_biases" in key:
        return resize_rel_pos_bias_table_levit(before.T, after.shape[::-1]).T
    prefix = min(n for n in range(2) if (before.shape[1] - n) ** 0.5 % 1 == 0 == (after.shape[1] - n) ** 0.5 % 1)
    grids = [[round((t.shape[1] - prefix) ** 0.5)] * 2 for t in (before, after)]
    return resample_abs_pos_embed(before, grids[1], old_size=grids[0], num_prefix_tokens=prefix)


@pytest.mark.parametrize("name", BUILT)
def test_built_for_one_size_is_rebuilt(name):
    """As the library builds it for the other size, with the same weights, and its tables of positions resampled."""
    side = BUILT[name][2]["image_size"]
    side = side[0] if isinstance(side, list) else side
    model, wanted = of_the_library(name, side), of_the_library(name, side // 2)
    before = model.state_dict()
    state = {
        key: before[key] if before[key].shape == t.shape else followed(key, before[key], t)
        for key, t in wanted.state_dict().items()
    }
    assert any(before[key].shape != t.shape for key, t in state.items())
    wanted.load_state_dict(state)
    with torch.no_grad():
        x, images = torch.randn(2, 3, side // 2, side // 2), torch.randn(2, 3, side, side)
        model(images)  # LeViT keeps its biases from one run to the next
        small = reduce(model, resolution=side // 2)
        torch.testing.assert_close(small(x).logits, wanted(x).logits, rtol=1e-4, atol=1e-5)
        assert small(images).logits.shape == (2, CLASSES)
    assert measure_cost(small, (3, side, side)).macs < measure_cost(model, (3, side, side)).macs
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert model.config.image_size != small.config.image_size


@pytest.mark.parametrize("side", [32, 40])
def test_positions_that_are_looked_up(side):
    """MetaCLIP 2's image tower is CLIP's under another name, which an adapter of its own makes for another size."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower |= {"image_size": 64, "patch_size": 8, "hidden_act": "gelu"}
    model, clip = MetaClip2VisionModel(MetaClip2VisionConfig(**tower)).eval(), CLIPVisionModel(CLIPVisionConfig(**tower)).eval()
    clip.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, wanted = (
            reduce(one, resolution=side, input_size=(3, 64, 64), resize_input=False)(photo(side, side)).last_hidden_state
            for one in (model, clip)
        )
    assert found.shape[1] == 1 + (side // 8) ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(DownresError, match="cannot be made for 40x56 px .*it is built for squares"):
        reduce(model, resolution=(40, 56), input_size=(3, 64, 64), resize_input=False)


def test_positions_of_a_grid_that_is_no_square():
    config = ViTMSNConfig(**{**VISION, "image_size": (48, 32)}, **MLP, num_labels=CLASSES)
    model = ViTMSNForImageClassification(config).eval()
    table = nn.init.normal_(model.vit.embeddings.position_embeddings)
    small = reduce(model, resolution=(24, 16))
    wanted = resample_abs_pos_embed(table.detach(), [3, 2], old_size=[6, 4], num_prefix_tokens=1)
    torch.testing.assert_close(small.vit.embeddings.position_embeddings.detach(), wanted)
    with pytest.raises(DownresError, match="20x16 px is not a multiple of 8"):
        reduce(model, resolution=(20, 16))


def test_what_takes_no_images_is_told_so():
    """SigLIP 2 takes patches that were cut before."""
    towers = {
        "vision_config": {**MLP, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        "text_config": TEXT,
    }
    model = Siglip2ForImageClassification(Siglip2Config(**towers)).eval()
    with pytest.raises(
        DownresError, match="does not run on an image of 3x224x224 .*cannot be tried.*a network that takes images"
    ):
        reduce(model, resolution=128)


def test_a_size_that_it_cannot_be_built_for():
    with pytest.raises(DownresError, match="HieraForImageClassification cannot be made for 40 px .*: give another resolution"):
        reduce(of_the_library("hiera", 64), resolution=40)


def test_super_resolution_keeps_its_size():
    config = Swin2SRConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=4)
    model, x = Swin2SRForImageSuperResolution(config).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        small = reduce(model, resolution=16)
        assert small(x).reconstruction.shape == model(x).reconstruction.shape == (1, 3, 64, 64)
