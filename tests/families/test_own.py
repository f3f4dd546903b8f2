"""Vision transformers that users write themselves: known by their parts, verified by a run and by numbers."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from downres import DownresError, Merge, measure_cost, reduce, token_map
from downres.families.adapter import packed_attention
from downres.families.find import find_adapter
from downres.reduction import takes_any_size
from downres.reductions.tokens import TokenState

WIDTH, HEADS, SIDE = 32, 2, 48


class Attention(nn.Module):
    """As in DINO and MAE, the products written out."""

    def __init__(self, width=WIDTH, heads=HEADS):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale + self.bias(n)).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(b, n, c)))

    def bias(self, n):
        return 0.0


class RelativeAttention(Attention):
    """A bias for each pair of a fixed number of tokens."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, 37, 37))

    def bias(self, n):
        return self.table


class Block(nn.Module):
    attention: type = Attention

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), self.attention(), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop_path = nn.Identity()

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ScaledBlock(Block):
    def __init__(self):
        super().__init__()
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((WIDTH,), 1e-4)) for _ in range(2))

    def forward(self, x, return_attention=False):
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PostNormBlock(Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class ForgottenScaleBlock(ScaledBlock):
    """Differs from what its parts suggest by a thousandth of what it adds."""

    def forward(self, x):
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + 1.001 * self.gamma_2 * self.mlp(self.norm2(x))


class RelativeBlock(Block):
    attention = RelativeAttention


class Plain(nn.Module):
    """A class token, learned positions for all tokens, a list of blocks."""

    registers = 0

    def __init__(self, block=Block, depth=2, classes=5):
        super().__init__()
        self.img_size, self.patch_size = SIDE, 8
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.num_patches = (SIDE // 8) ** 2
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.make_positions()
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def make_positions(self):
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + self.num_patches, WIDTH))

    def tokens(self, x):
        assert x.shape[-2:] in ((self.img_size, self.img_size), self.img_size), "wrong size"
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def features(self, x):
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return self.head(self.features(x)[:, 0])


class Mae(Plain):
    """timm's parts in a class of one's own; positions that are not learned, and none for the class token."""

    def __init__(self):
        super().__init__(block=lambda: TimmBlock(WIDTH, HEADS, qkv_bias=True, init_values=0.5))
        self.patch_embed = PatchEmbed(SIDE, 8, 3, WIDTH)

    def make_positions(self):
        self.register_buffer("pos_embed", torch.randn(1, self.num_patches, WIDTH))

    def tokens(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x) + self.pos_embed], dim=1)


class Map(Plain):
    """Positions as a map, four registers, a mean at the end."""

    def __init__(self):
        super().__init__()
        self.register_tokens = nn.Parameter(torch.randn(1, 4, WIDTH))
        del self.cls_token

    def make_positions(self):
        self.position_embedding = nn.Parameter(torch.randn(1, WIDTH, 6, 6))

    def tokens(self, x):
        x = (self.patch_embed(x) + self.position_embedding).flatten(2).transpose(1, 2)
        return torch.cat([self.register_tokens.expand(len(x), -1, -1), x], dim=1)

    def forward(self, x):
        return self.head(self.features(x)[:, 4:].mean(dim=1))


class Clip(Plain):
    """Positions that are looked up by their numbers, as in CLIP; the size stands nowhere."""

    def __init__(self):
        super().__init__()
        del self.img_size, self.patch_size, self.num_patches

    def make_positions(self):
        self.position_embedding = nn.Embedding(1 + self.num_patches, WIDTH)
        self.register_buffer("position_ids", torch.arange(1 + self.num_patches)[None], persistent=False)

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.position_embedding(self.position_ids)


class Flat(Plain):
    """Positions without a batch axis."""

    def make_positions(self):
        self.positional_embedding = nn.Parameter(torch.randn(1 + self.num_patches, WIDTH))

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positional_embedding


class Dino(Plain):
    """Interpolates its positions by itself: takes any size."""

    def tokens(self, x):
        x = self.patch_embed(x)
        grid = tuple(x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return x + self.pos_embed
        whole = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        whole = F.interpolate(whole, grid, mode="bicubic").flatten(2).transpose(1, 2)
        return x + torch.cat([self.pos_embed[:, :1], whole], dim=1)


class Encoder(Plain):
    """torch's own encoder."""

    def __init__(self, norm_first=False, batch_first=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=batch_first, norm_first=norm_first, activation="gelu")
        self.blocks = None
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def features(self, x):
        x = self.tokens(x)
        return self.norm(self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1))


KINDS = {
    "plain": Plain,
    "layer scale": lambda: Plain(ScaledBlock),
    "timm's parts": Mae,
    "map": Map,
    "looked up": Clip,
    "flat": Flat,
    "encoder": Encoder,
    "encoder, norm first": lambda: Encoder(norm_first=True),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def images(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model, x):
    return model(x)


def positions(model):
    """(1, prefix + N, C) whatever the form, and how many of them are of the prefix."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    (value,) = (v for k, v in found.items() if "pos" in k and v.is_floating_point())
    rows = value.flatten(2).transpose(1, 2) if value.ndim == 4 else value.reshape(1, -1, WIDTH)
    return rows, 0 if isinstance(model, (Mae, Map)) else 1


# --- resolution and patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [(32, 32), (24, 40)], ids=str)
def test_positions_follow_the_grid(model, target):
    small = reduce(model, resolution=target)
    before, prefix = positions(model)
    wanted = resample_abs_pos_embed(before, [target[0] // 8, target[1] // 8], old_size=[6, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(positions(small)[0], wanted)
    assert run(small, images(2, 3, SIDE, SIDE)).shape == (2, 5)
    assert list(small.state_dict()) == list(model.state_dict())


def test_equals_the_same_network_made_smaller():
    torch.manual_seed(0)
    model = Plain().eval()
    smaller = Plain().eval()
    state = model.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(model.pos_embed, [4, 4], old_size=[6, 6], num_prefix_tokens=1)
    smaller.img_size, smaller.pos_embed = 32, nn.Parameter(state["pos_embed"])
    smaller.load_state_dict(state)
    x = images(2, 3, 32, 32)
    small = reduce(model, resolution=32)
    torch.testing.assert_close(run(small, x), run(smaller, x))
    assert (small.img_size, small.patch_size, small.num_patches) == (32, 8, 16)
    wide = reduce(model, resolution=(24, 40))
    assert (wide.img_size, wide.num_patches) == ((24, 40), 15)
    assert (model.img_size, model.num_patches) == (48, 36)  # the original is not touched


def test_larger_patches(model):
    small = reduce(model, resolution=48, patch_size=12)
    conv = small.patch_embed.proj if isinstance(model, Mae) else small.patch_embed
    original = model.patch_embed.proj if isinstance(model, Mae) else model.patch_embed
    assert torch.equal(conv.weight, resample_patch_embed(original.weight, [12, 12])) and conv.stride == (12, 12)
    before, prefix = positions(model)
    wanted = resample_abs_pos_embed(before, [4, 4], old_size=[6, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(positions(small)[0], wanted)
    assert run(small, images(2, 3, SIDE, SIDE)).shape == (2, 5)
    if hasattr(model, "patch_size"):
        assert (small.patch_size, small.num_patches) == (12, 16)


def test_a_network_that_takes_any_size_is_left_to_itself():
    torch.manual_seed(0)
    model = Dino().eval()
    assert takes_any_size(model) and not takes_any_size(Plain())
    small, x = reduce(model, resolution=32), images(1, 3, 64, 96)
    assert torch.equal(small.pos_embed, model.pos_embed)
    torch.testing.assert_close(run(small, x), run(model, F.interpolate(x, (32, 48), mode="bilinear", antialias=True)))
    merging = reduce(model, resolution=32, patch_size=4, stem_scale=0.5, merge=1)
    assert run(merging, images(1, 3, 32, 32)).shape == (1, 5) and merging.patch_embed.stride == (4, 4)


class Behind(Plain):
    """The class token comes last."""

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([x, self.cls_token.expand(len(x), -1, -1)], dim=1) + self.pos_embed

    def forward(self, x):
        return self.head(self.features(x)[:, -1])


class Columns(Plain):
    """Patches column by column."""

    def tokens(self, x):
        x = self.patch_embed(x).transpose(2, 3).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed


@pytest.mark.parametrize("given", [{"resolution": 32}, {"merge": 2}, {"stem_scale": 0.5}, {"patch_size": 16}], ids=str)
@pytest.mark.parametrize("build", [Behind, Columns])
def test_patches_elsewhere_than_expected_are_noticed(build, given):
    """Positions would be resampled, and tokens merged, as if the first one were the class token."""
    torch.manual_seed(0)
    model = build().eval()
    assert run(model, images(1, 3, SIDE, SIDE)).shape == (1, 5)
    words = "not its patches row by row behind 1 others.*put class and register tokens in front"
    with pytest.raises(DownresError, match=words):
        reduce(model, **given)


def test_found_inside_another_module():
    inner = Plain(classes=7).eval()
    model = nn.Sequential(nn.BatchNorm2d(3), inner, nn.Linear(7, 2)).eval()
    x = images(2, 3, SIDE, SIDE)
    small = reduce(model, resolution=32, stem_scale=0.5, merge=1)
    assert run(small, x).shape == (2, 2) and small[1].num_patches == 16
    assert [c.module for c in small.downres.changes[2:]] == ["1.blocks.0 (its input)", "1.blocks.0 and on"]


# --- fewer tokens -------------------------------------------------------------------------------------------------


def merged(model, removals):
    small = copy.deepcopy(model)
    adapter = find_adapter(small)
    adapter.merge(TokenState(tuple(removals), adapter.prefix, "merge", (6, 6)), adapter.blocks())
    return small


def test_merging_nothing_changes_nothing(model):
    x = images(2, 3, SIDE, SIDE)
    torch.testing.assert_close(run(merged(model, [0, 0]), x), run(model, x))


def test_merging_equal_tokens_changes_nothing(model):
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "pos" in name:
                value.mul_(0)  # numbers of positions, too: all look up the first
    x = images(2, 3, 6, 3).repeat_interleave(8, dim=2).repeat_interleave(16, dim=3).double()  # every patch twice
    for removals in ([18, 0], [0, 18]):
        small = merged(model, removals)
        torch.testing.assert_close(run(small, x), run(model, x), rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            torch.testing.assert_close(small.features(x), model.features(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("by", ["merge", "prune"])
def test_fewer_tokens_keep_the_shapes(model, by):
    if by == "prune" and isinstance(model, Map):
        with pytest.raises(DownresError, match="Pruning goes by the attention of a class token"):
            reduce(model, merge=Merge(r=2, by=by))
        return
    x = images(2, 3, SIDE, SIDE)
    small = reduce(model, merge=Merge(r=8, by=by))
    assert run(small, x).shape == (2, 5)
    # In double precision: with a layer scale of 1e-4 there is little that merging could change.
    fewer, whole = (run(copy.deepcopy(m).double(), x.double()) for m in (small, model))
    assert not torch.allclose(fewer, whole, rtol=1e-9, atol=0)
    with torch.no_grad():
        assert small.features(x).shape == model.features(x).shape
    assert [len(picture.unique()) for picture in token_map(small, x)] == [20, 20]
    assert measure_cost(small, (3, SIDE, SIDE)).macs < measure_cost(model, (3, SIDE, SIDE)).macs
    assert torch.equal(run(pickle.loads(pickle.dumps(small)), x), run(small, x))
    assert torch.equal(run(copy.deepcopy(small), x), run(small, x))
    assert list(small.state_dict()) == list(model.state_dict())


def test_pooled_tokens_get_their_grid_back(model):
    x = images(2, 3, SIDE, SIDE)
    small, lengths = reduce(model, stem_scale=0.5), []
    prefix = find_adapter(model).prefix
    for block in find_adapter(model).block_names():
        small.get_submodule(block).register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        assert small.features(x).shape == model.features(x).shape
    assert lengths == [9 + prefix] * 2


@pytest.mark.parametrize("training", [False, True])
def test_attention_in_proportion_equals_a_sequence_that_repeats(training):
    """torch's attention over tokens of sizes 1, 2, 3 is attention over these tokens written out once, twice, three times."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double().train(training)
    x, sizes = images(2, 3, WIDTH).double(), torch.tensor([1, 2, 3])
    state = TokenState((1,), 0, "merge")
    state.size = sizes.double().expand(2, 3)
    written_out = x.repeat_interleave(sizes, dim=1)
    wanted = attention(x, written_out, written_out, need_weights=False)[0]
    torch.testing.assert_close(packed_attention(attention, x, state), wanted)
    assert state.keys.shape == (2, HEADS, 3, WIDTH // HEADS)


# --- what does not follow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Plain(PostNormBlock), "blocks of kind PostNormBlock cannot be merged.*does not compute.*result is another"),
        (lambda: Plain(ForgottenScaleBlock), "blocks of kind ForgottenScaleBlock cannot be merged.*result is another"),
        (lambda: Plain(RelativeBlock), "blocks of kind RelativeBlock cannot be merged.*size of tensor"),
        (
            lambda: Plain(lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))),
            "kind Sequential cannot be merged",
        ),
    ],
    ids=["post norm", "a thousandth", "relative", "other"],
)
def test_blocks_that_are_not_what_they_seem_are_not_merged(build, words):
    torch.manual_seed(0)
    model = build().eval()
    with pytest.raises(DownresError, match=words):
        reduce(model, merge=2)
    if "relative" not in words.lower():
        assert run(reduce(model, stem_scale=0.5), images(2, 3, SIDE, SIDE)).shape == (2, 5)


class Middle(Encoder):
    """torch's own encoder as it comes: tokens first; a table of positions of the user's own name, as long."""

    def __init__(self):
        super().__init__(batch_first=False)

    def make_positions(self):
        self.where = nn.Parameter(torch.randn(1 + self.num_patches, 1, WIDTH))

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).permute(2, 0, 1)
        return torch.cat([self.cls_token.expand(-1, x.shape[1], -1), x]) + self.where

    def features(self, x):
        return self.norm(self.encoder(self.tokens(x))).transpose(0, 1)


class Cutting(nn.Module):
    """(B, C, H, W) → (B, N, C·8·8) as einops' Rearrange writes it."""

    def forward(self, x):
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)


class Linear(Plain):
    """Patches by a linear layer (vit-pytorch), of one channel or three; a table of any name, a mean at the end."""

    def __init__(self, channels=3):
        super().__init__()
        del self.cls_token
        self.patch_embed = nn.Sequential(Cutting(), nn.LayerNorm(64 * channels), nn.Linear(64 * channels, WIDTH))

    def make_positions(self):
        self.register_buffer("table", torch.randn(self.num_patches, WIDTH))

    def tokens(self, x):
        return self.patch_embed(x) + self.table

    def forward(self, x):
        return self.head(self.features(x).mean(dim=1))


class Unfolded(Linear):
    """Patches by nn.Unfold, whose rows hold the channels outermost."""

    def __init__(self):
        super().__init__()
        self.unfold, self.patch_embed = nn.Unfold(8, stride=8), nn.Linear(192, WIDTH)

    def tokens(self, x):
        return self.patch_embed(self.unfold(x).transpose(1, 2)) + self.table


class Named(Plain):
    """No sign of attention or positions in any name; positions looked up by numbers of any name."""

    def make_positions(self):
        self.lookup = nn.Embedding(1 + self.num_patches, WIDTH)
        self.register_buffer("numbers", torch.arange(1 + self.num_patches), persistent=False)

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.lookup(self.numbers)


class Codes(Named):
    """Beside its positions a code book that has as many rows, by chance."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(1 + self.num_patches, WIDTH))
        self.pos_embed = nn.Parameter(self.lookup.weight.detach()[None])
        del self.lookup

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed + self.codes[:1]


class Shared(Plain):
    """One block, three times over."""

    def __init__(self, block=Block):
        super().__init__()
        self.blocks = nn.ModuleList([block()] * 3)


class Looped(Plain):
    """The same without a list."""

    def __init__(self):
        super().__init__()
        del self.blocks
        self.body = Block()

    def features(self, x):
        x = self.tokens(x)
        for _ in range(3):
            x = self.body(x)
        return self.norm(x)


OTHERS = {
    "tokens first": (Middle, "where", 1, "its sequence is .tokens, images, channels."),
    "linear": (Linear, "table", 0, ""),
    "one channel": (lambda: Linear(1), "table", 0, ""),
    "unfolded": (Unfolded, "table", 0, ""),
    "looked up": (Named, "lookup.weight", 1, ""),
    "code book": (Codes, "pos_embed", 1, ""),
    "shared": (Shared, "pos_embed", 1, "runs the same block several times"),
    "looped": (Looped, "pos_embed", 1, "has no list of like blocks"),
}


@pytest.mark.parametrize("target", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_to_write_one(name, target):
    """Their tables follow the grid; whatever else has their shape stays; tokens are merged, or the reason is true."""
    build, table, prefix, why = OTHERS[name]
    torch.manual_seed(0)
    model = build().eval()
    channels = 1 if name == "one channel" else 3
    x = images(2, channels, SIDE, SIDE)
    small = reduce(model, resolution=target, input_size=(channels, SIDE, SIDE))
    assert run(small, x).shape == (2, 5)
    grid = [target[0] // 8, target[1] // 8]
    before, after = model.state_dict()[table].reshape(1, -1, WIDTH), small.state_dict()[table].reshape(1, -1, WIDTH)
    wanted = resample_abs_pos_embed(before, grid, old_size=[6, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(after, wanted)
    assert after.shape == (1, prefix + math.prod(grid), WIDTH)
    changed = [k for k, v in small.state_dict().items() if v.shape != model.state_dict()[k].shape]
    assert changed == [table]
    if target != (32, 32):  # what follows is of the network alone
        return
    for given in ({"merge": 2}, {"stem_scale": 0.5}):
        if why:
            with pytest.raises(DownresError, match=why):
                reduce(model, input_size=(channels, SIDE, SIDE), **given)
        else:
            fewer = reduce(model, input_size=(channels, SIDE, SIDE), **given)
            assert run(fewer, x).shape == (2, 5) and not torch.equal(run(fewer, x), run(model, x))
    if "patch_embed.weight" not in model.state_dict() or build is Unfolded:
        with pytest.raises(DownresError, match="knows no patch embedding in it that can be resampled"):
            reduce(model, patch_size=16, input_size=(channels, SIDE, SIDE))


def test_relative_tables_do_not_follow():
    with pytest.raises(DownresError, match="Plain cannot be made for 32 px .*size of tensor.*give another resolution"):
        reduce(Plain(RelativeBlock), resolution=32)


def test_a_size_that_is_written_in_the_code_does_not_follow():
    class Stubborn(Plain):
        def tokens(self, x):
            return super().tokens(x.reshape(-1, 3, 48, 48))

    with pytest.raises(DownresError, match="Stubborn cannot be made for 32 px .*shape"):
        reduce(Stubborn(), resolution=32)


def test_merged_blocks_take_no_other_arguments():
    model = reduce(Plain(ScaledBlock), merge=2)
    x = torch.randn(1, 37, WIDTH)
    model.blocks[0](x, return_attention=False)
    with pytest.raises(DownresError, match="takes no attention mask"):
        model.blocks[0](x, return_attention=True)


def test_training_goes_on():
    model = reduce(Plain(ScaledBlock), resolution=32, patch_size=4, merge=4).train()
    model(images(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
