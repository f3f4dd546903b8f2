"""Merging, pruning and pooling of tokens against plain loops written from the papers' equations."""

import copy
import pickle
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import erf
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from downres.engines.onnxruntime import OnnxRuntime, export_onnx
from downres.errors import DownresError
from downres.records import Merge
from downres.reduction import reduce, token_map
from downres.reductions import tokens as module
from downres.reductions.tokens import (
    PoolTokens,
    TokenState,
    UnpoolTokens,
    apply_groups,
    follow,
    match_similar,
    match_unattended,
    pool_grid,
)
from downres.techniques.tokens import removals

# --- the papers, one sequence at a time ---------------------------------------------------------------------------
# A grouping is a list over the places of the shorter sequence: the tokens of the longer one that are averaged there, the
# one that stood there before first.


def merged_by_loops(metric: np.ndarray, r: int, prefix: int) -> list[list[int]]:
    """ToMe, sec. 3: (tokens, D) → grouping.

    Sets A and B alternate over the sequence; from each token of A an edge to its most similar of B; the r most similar edges
    stay; what they connect is merged; A and B are put together again.
    """
    a = [i for i in range(len(metric)) if i % 2 == 0 and i >= prefix]
    b = [i for i in range(len(metric)) if i % 2 == 1 and i >= prefix]
    edges = []
    for i in a:
        similar = [float(metric[i] @ metric[j] / np.sqrt(metric[i] @ metric[i]) / np.sqrt(metric[j] @ metric[j])) for j in b]
        edges.append((max(similar), i, b[int(np.argmax(similar))]))
    edges.sort(reverse=True)
    left = [i for _, i, _ in edges[r:]]
    groups = {j: [j] for j in b}
    for _, i, j in edges[:r]:
        groups[j].append(i)
    return [[i] for i in range(prefix)] + [[i] for i in (sorted(left) if prefix else left)] + [groups[j] for j in b]


def attention_of_the_class_token(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(heads, tokens, D) of both → (tokens,): softmax(q_class · K / √D), mean over the heads (EViT, eq. 2 and sec. 3.2)."""
    found = []
    for q, k in zip(queries, keys, strict=True):
        powers = [np.exp(float(q[0] @ one) / np.sqrt(len(one))) for one in k]
        found.append([p / sum(powers) for p in powers])
    return np.mean(found, axis=0)


def pruned_by_loops(attention: np.ndarray, r: int, prefix: int) -> list[list[int]]:
    """EViT, sec. 3.2: the attentive tokens stay in order, the r + 1 inattentive ones become one behind them."""
    by_attention = sorted(range(prefix, len(attention)), key=lambda i: -attention[i])
    kept = len(by_attention) - r - 1
    return [[i] for i in range(prefix)] + [[i] for i in sorted(by_attention[:kept])] + [by_attention[kept:]]


def averaged_by_loops(x: np.ndarray, share: np.ndarray, grouping: list[list[int]]) -> np.ndarray:
    return np.stack([sum(share[i] * x[i] for i in group) / sum(share[i] for i in group) for group in grouping])


def summed_by_loops(size: np.ndarray, grouping: list[list[int]]) -> np.ndarray:
    return np.array([sum(size[i] for i in group) for group in grouping])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def counts(*shape: int) -> torch.Tensor:
    return torch.randint(1, 6, shape, generator=torch.Generator().manual_seed(1)).double()


def check(groups: module.Groups, groupings: list[list[list[int]]], share: torch.Tensor, size: torch.Tensor) -> None:
    """Merged tokens, their order, their sizes and where each token went, for every sequence of a batch."""
    x = normal(*size.shape, 7, seed=2)
    merged, new_size = apply_groups(x, size, groups)
    places = follow(groups)
    for b, grouping in enumerate(groupings):
        assert [group[0] for group in grouping] == groups.stays[b].tolist()
        np.testing.assert_allclose(merged[b], averaged_by_loops(x[b].numpy(), share[b].numpy(), grouping), rtol=1e-12)
        assert new_size[b].tolist() == summed_by_loops(size[b].numpy(), grouping).tolist()
        assert {i: place for place, group in enumerate(grouping) for i in group} == dict(enumerate(places[b].tolist()))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(("patches", "r"), [(2, 1), (9, 1), (9, 4), (16, 3), (16, 8), (25, 12), (49, 13)])
def test_merging_is_bipartite_soft_matching(prefix, patches, r):
    metric, size = normal(3, prefix + patches, 6), counts(3, prefix + patches)
    groups = match_similar(metric, r, prefix)
    groupings = [merged_by_loops(m, r, prefix) for m in metric.numpy()]
    check(groups, groupings, size, size)
    assert r < 4 or any(len(group) > 2 for grouping in groupings for group in grouping)  # some receive several


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize(("patches", "r"), [(3, 1), (9, 1), (9, 7), (16, 5), (49, 20)])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_pruning_fuses_what_the_class_token_attends_to_least(prefix, patches, r, key_heads):
    queries, keys = normal(3, 4, prefix + patches, 6), normal(3, key_heads, prefix + patches, 6, seed=1)
    size = counts(3, prefix + patches)
    each = np.repeat(keys.numpy(), 4 // key_heads, axis=1)  # a head of keys may serve several of queries
    attention = [attention_of_the_class_token(q, k) for q, k in zip(queries.numpy(), each, strict=True)]
    groups = match_unattended(queries, keys, r, prefix)
    share = size * torch.tensor(np.stack(attention))
    check(groups, [pruned_by_loops(a, r, prefix) for a in attention], share, size)


def test_unattended_tokens_of_no_weight_at_all_stay_numbers():
    """Half precision rounds the least attention to zero."""
    keys = torch.zeros(1, 1, 6, 2, dtype=torch.float16)
    keys[:, :, 3:] = -200.0
    queries = torch.full((1, 1, 6, 2), 10.0, dtype=torch.float16)
    x = torch.arange(12.0).reshape(1, 6, 2)
    groups = match_unattended(queries, keys, 2, 1)
    merged, _ = apply_groups(x, torch.ones(1, 6), groups)
    torch.testing.assert_close(merged[0, -1], x[0, 3:].mean(dim=0))


def test_gradients():
    metric, x = normal(2, 11, 4), normal(2, 11, 3, seed=1).requires_grad_()
    weight = normal(2, 11, seed=2).abs().requires_grad_()
    size = counts(2, 11)
    found = match_similar(metric, 4, 1)

    def merge(x, weight):
        return apply_groups(x, size, module.Groups(found.stays, found.goes, found.target, weight))[0]

    assert torch.autograd.gradcheck(merge, (x, weight))


# --- how many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 12, 24, 31, 32])
def test_schedules_of_a_number_a_block(blocks):
    for r in range(1, 30):
        tokens = 10_000
        assert removals(Merge(r), tokens, blocks) == (r,) * blocks
        # ToMe, sec. 4.1: from 2r in the first block linearly to 0 in the last.
        exact = [floor(2 * r * (1 - Fraction(i, blocks - 1))) for i in range(blocks)] if blocks > 1 else [r]
        assert removals(Merge(r, schedule="decreasing"), tokens, blocks) == tuple(exact)


@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
@pytest.mark.parametrize("tokens", [16, 49, 196, 197, 256, 1369])
def test_a_kept_fraction_is_kept_exactly(tokens, schedule):
    reached = 0
    for blocks in (1, 2, 12, 24):
        for keep in np.linspace(0.02, 0.98, 49):
            kept = round(tokens * keep)
            for by in ("merge", "prune"):
                try:
                    found = removals(Merge(keep=float(keep), schedule=schedule, by=by), tokens, blocks)
                except DownresError as error:
                    assert "cannot be reached" in str(error)
                    continue
                reached += 1
                assert tokens - sum(found) == max(1, kept) and min(found) >= 0 and len(found) == blocks
                left = tokens - np.cumsum([0, *found])
                for i in range(1, blocks + 1):
                    share = Fraction(i, blocks)
                    if schedule == "decreasing":  # a rate that falls linearly to 0, added up to here
                        share = 1 - (1 - share) ** 2
                    assert tokens - left[i] == round(share * sum(found))
                for r, had in zip(found, left, strict=False):
                    assert r <= (had // 2 if by == "merge" else had - 2)
    assert reached > 200


def test_a_block_merges_at_most_half_of_its_tokens():
    """196 - 16 · 11 = 20 tokens come into the last block."""
    assert removals(Merge(16), 196, 12) == (16,) * 11 + (10,)
    assert removals(Merge(16, by="prune"), 196, 12) == (16,) * 12
    assert removals(Merge(40), 49, 1) == (24,)
    assert removals(Merge(40, by="prune"), 41, 1) == (39,)


@pytest.mark.parametrize(
    ("merge", "tokens", "blocks", "message"),
    [
        (Merge(17), 196, 12, "merge17 would take 204 tokens out of 196 in 12 blocks: give at most 16 a block."),
        (Merge(1), 9, 12, "merge1 would take 12 tokens out of 9 in 12 blocks: this image has too few tokens to take any out."),
        (
            Merge(keep=0.02),
            196,
            12,
            "merge2% cannot be reached: merging at most halves the tokens of a block, so of 196 tokens 10 would be left; keep "
            "more, or try the decreasing schedule.",
        ),
        (
            Merge(keep=0.01, by="prune", schedule="decreasing"),
            100,
            2,
            "prune1%-decreasing cannot be reached: pruning leaves two tokens, so of 100 tokens 2 would be left; keep more, or "
            "try the constant schedule.",
        ),
    ],
)
def test_what_cannot_be_taken_out(merge, tokens, blocks, message):
    with pytest.raises(DownresError) as error:
        removals(merge, tokens, blocks)
    assert str(error.value) == message


# --- a whole network ----------------------------------------------------------------------------------------------

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
INPUT = (3, 32, 32)
NETWORKS = {
    "class token": lambda: VisionTransformer(**SMALL),
    "no class token": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "distillation token": lambda: VisionTransformerDistilled(**SMALL),
    "registers, layer scale, mean over patches": lambda: VisionTransformer(
        **SMALL, reg_tokens=4, global_pool="avg", init_values=0.5
    ),
    "normalised keys": lambda: VisionTransformer(**SMALL, qk_norm=True),
}


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for parameter in model.parameters():  # of the size that trained ones have: attention that chooses
        nn.init.normal_(parameter, std=1.0 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model.eval().to(dtype)


def photo(batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(batch, *INPUT, seed=3).to(dtype)


def outputs_by_loops(model: nn.Module, images: torch.Tensor, takes: list[int], by: str) -> tuple[torch.Tensor, np.ndarray]:
    """The merged network by loops, and the place of each patch in the last sequence. Embedding and head are the model's own."""

    def linear(x, layer):
        return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    def norm(x, layer):
        if isinstance(layer, nn.Identity):
            return x
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + layer.eps)
        return y * layer.weight.detach().numpy() + layer.bias.detach().numpy()

    def scaled(x, layer):
        return x * layer.gamma.detach().numpy() if hasattr(layer, "gamma") else x

    prefix, restored, maps = model.num_prefix_tokens, [], []
    for x in model.norm_pre(model._pos_embed(model.patch_embed(images))).detach().numpy():
        size, went = np.ones(len(x)), list(range(len(x)))
        for block, r in zip(model.blocks, takes, strict=True):
            heads = block.attn.num_heads
            q, k, v = linear(norm(x, block.norm1), block.attn.qkv).reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
            q, k = norm(q, block.attn.q_norm), norm(k, block.attn.k_norm)
            attended = []
            for head in range(heads):
                # ToMe, eq. 1: softmax(QK' / √D + log s).
                powers = np.exp(q[head] @ k[head].T / np.sqrt(q.shape[-1]) + np.log(size))
                attended.append(powers / powers.sum(1, keepdims=True) @ v[head])
            x = x + scaled(linear(np.concatenate(attended, axis=1), block.attn.proj), block.ls1)
            if r:
                share = size
                if by == "merge":
                    grouping = merged_by_loops(k.mean(0), r, prefix)
                else:
                    attention = attention_of_the_class_token(q, k)
                    grouping, share = pruned_by_loops(attention, r, prefix), size * attention
                x, size = averaged_by_loops(x, share, grouping), summed_by_loops(size, grouping)
                to = {i: place for place, group in enumerate(grouping) for i in group}
                went = [to[place] for place in went]
            hidden = linear(norm(x, block.norm2), block.mlp.fc1)
            x = x + scaled(linear(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, block.mlp.fc2), block.ls2)
        restored.append(x[went])
        maps.append([place - prefix for place in went[prefix:]])
    with torch.no_grad():
        return model.forward_head(model.norm(torch.from_numpy(np.stack(restored)))), np.array(maps)


@pytest.mark.parametrize("merge", ["2", "6", "3-decreasing", "30%", "prune3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_with_fewer_tokens(name, merge):
    model, images = network(name, torch.float64), photo(dtype=torch.float64)
    if merge == "prune3" and name == "no class token":
        with pytest.raises(DownresError, match="has none: merge instead"):
            reduce(model, merge=merge, input_size=INPUT)
        return
    takes = {"2": [2, 2, 2], "6": [6, 5, 2], "3-decreasing": [6, 3, 0], "30%": [4, 3, 4], "prune3": [3, 3, 3]}[merge]
    if merge == "6":  # 18 of 16 tokens
        with pytest.raises(DownresError, match="at most 5"):
            reduce(model, merge=merge, input_size=INPUT)
        merge, takes = "5", [5, 5, 3]
    reduced = reduce(model, merge=merge, input_size=INPUT)
    expected, places = outputs_by_loops(model, images, takes, "prune" if merge == "prune3" else "merge")
    with torch.no_grad():
        found = reduced(images)
        assert not torch.allclose(found, model(images), rtol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert reduced(images[:0]).shape == (0, *found.shape[1:])
    assert np.array_equal(token_map(reduced, images).flatten(1), places)
    torch.testing.assert_close(reduced(images), found)  # nothing is left over from the run before


@pytest.mark.parametrize("merge", ["4", "prune4", "50%-decreasing"])
def test_merging_equal_tokens_loses_nothing(merge):
    """Proportional attention counts a merged token by its size: one of n equal tokens stands for all of them."""
    model = network("registers, layer scale, mean over patches")
    model.pos_embed.data.zero_()
    images = photo()[:, :, :8, :8].repeat(1, 1, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(reduce(model, merge=merge, input_size=INPUT)(images), model(images), rtol=1e-4, atol=1e-4)


def test_rotary_embeddings_are_those_of_the_receivers():
    torch.manual_seed(0)
    rotary, x = torch.randn(9, 4), torch.randn(2, 10, 6)
    keys = [torch.randn(2, 3, n, 4) for n in (10, 7)]
    state = TokenState((3, 2, 0), 1, "merge")
    place = [list(range(9)), list(range(9))]
    for block in (0, 1):
        state.enter(block)
        state.of_tokens(rotary)
        state.keys = keys[block]
        x = state.shrink(block, x)
        for b in (0, 1):
            grouping = merged_by_loops(keys[block][b].mean(0).numpy(), (3, 2)[block], 1)
            place[b] = [place[b][group[0] - 1] for group in grouping[1:]]
    state.enter(2)
    assert torch.equal(state.of_tokens(rotary), torch.stack([rotary[p] for p in place])[:, None])
    a_head = torch.randn(3, 9, 4)  # mixed frequencies: one for each head
    assert torch.equal(state.of_tokens(a_head), torch.stack([a_head[:, p] for p in place]))


# --- where it runs ------------------------------------------------------------------------------------------------


def rotating() -> nn.Module:
    torch.manual_seed(0)
    return Eva(**SMALL, use_rot_pos_emb=True).eval()


def short(model: nn.Module) -> nn.Module:
    """Its first two blocks: the second works with what the first left over, and graphs of more take long to make."""
    model.blocks = model.blocks[:2]
    return model


RUN = {
    "merge3": lambda: short(network("distillation token")),
    "40%-decreasing": lambda: short(network("no class token")),
    "prune3": lambda: short(network("class token")),
    "merge4": lambda: short(rotating()),
}


def runs(merge: str) -> tuple[nn.Module, torch.Tensor]:
    model = reduce(RUN[merge](), merge=merge, input_size=INPUT)
    with torch.no_grad():
        return model, model(photo(3))


def test_onnx(tmp_path):
    """Any batch size, in a graph that was made once."""
    model = reduce(RUN["merge4"](), merge="4-decreasing", input_size=INPUT)  # all in the first block, turned in the second
    with torch.no_grad():
        expected = model(photo(3))
    session = OnnxRuntime(export_onnx(model, INPUT, tmp_path / "model.onnx"), 1)
    for batch in (1, 3):
        np.testing.assert_allclose(session(photo(3)[:batch].numpy())[0], expected[:batch], rtol=1e-4, atol=1e-4)


def test_compile_without_graph_breaks():
    model, expected = runs("prune3")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for batch in (3, 2, 1):
            torch.testing.assert_close(compiled(photo(3)[:batch]), expected[:batch], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", RUN)
def test_export_and_copies(merge):
    model, expected = runs(merge)
    program = torch.export.export(model, (photo(2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(photo(3)), expected)
    model.train()(photo(3)).sum().backward()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(again.eval()(photo(3)), expected)
        states = {id(m.tokens) for m in again.modules() if hasattr(m, "tokens")}
        assert len(states) == 1 and states != {id(m.tokens) for m in model.modules() if hasattr(m, "tokens")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merge", RUN)
def test_half_precision(merge, dtype):
    """Where no near tie turns, rounding is all that differs: of the original as much."""
    original, (model, expected) = RUN[merge](), runs(merge)
    with torch.no_grad():
        exact = original(photo(3))
        with torch.autocast("cpu", dtype):
            errors = [(original(photo(3)) - exact).abs().max(), (model(photo(3)) - expected).abs().max()]
        low = [m.to(dtype)(photo(3).to(dtype)).float() for m in (original, model)]
    assert all(torch.isfinite(one).all() for one in low)
    assert errors[1] < 0.5 and errors[0] > 0


def test_sizes_are_exact_in_half_precision():
    """bfloat16 knows no 257: sums of sizes and their logarithms are taken in float32."""
    state = TokenState((300,), 1, "prune")
    state.enter(0)
    state.keys = state.queries = torch.ones(1, 1, 401, 2, dtype=torch.bfloat16)
    x = state.shrink(0, torch.ones(1, 401, 4, dtype=torch.bfloat16))
    assert x.dtype == torch.bfloat16 and torch.equal(x, torch.ones(1, 101, 4, dtype=torch.bfloat16))
    assert state.size[0].tolist() == [1.0] * 100 + [301.0]
    mask = state.mask(x)
    assert mask.shape == (1, 1, 1, 101) and mask.dtype == torch.bfloat16
    assert mask[0, 0, 0, -1] == torch.tensor(np.log(301.0)).bfloat16()


def test_blocks_run_in_order():
    """Gradient checkpointing runs the last block again first: it would find no sizes and go on without."""
    model = reduce(network("class token"), merge=3, input_size=INPUT).train()
    model.set_grad_checkpointing(True)
    with pytest.raises(DownresError, match="block 2 came where 0 was due: turn gradient checkpointing off"):
        model(photo()).sum().backward()
    model.set_grad_checkpointing(False)
    model(photo()).sum().backward()
    with pytest.raises(DownresError, match="block 2 came where 0 was due"):
        model.blocks[2](torch.randn(1, 17, 24))


def test_a_run_that_was_cut_off_leaves_nothing():
    model, expected = runs("prune3")
    model.train()
    hook = model.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(photo(3))
    hook.remove()
    for one in (copy.deepcopy(model), model):
        with torch.no_grad():
            assert torch.equal(one.eval()(photo(3)), expected)


def test_map_needs_merging():
    with pytest.raises(DownresError, match="merges no tokens"):
        token_map(network("class token"), photo())


# --- pooling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 5), (6, 4), (12, 20)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pooling_is_antialiased_resizing_of_the_grid(prefix, size):
    x = normal(2, prefix + 60, 3).float()
    pooled = pool_grid(x, (6, 10), size, prefix)
    assert pooled.shape == (2, prefix + size[0] * size[1], 3) and torch.equal(pooled[:, :prefix], x[:, :prefix])
    for b in range(2):
        for c in range(3):
            picture = Image.fromarray(x[b, prefix:, c].reshape(6, 10).numpy())
            expected = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
            np.testing.assert_allclose(pooled[b, prefix:, c].reshape(size), expected, atol=1e-5)


def test_pooling_hooks():
    pool = PoolTokens((4, 6), 0.5, 1, "bilinear")
    x = torch.randn(2, 25, 3)
    small = pool_grid(x, (4, 6), (2, 3), 1)
    (positional, *rest), keywords = pool(nn.Identity(), (x, "mask"), {"scale": 2})
    assert torch.equal(positional, small) and rest == ["mask"] and keywords == {"scale": 2}
    positional, keywords = pool(nn.Identity(), (), {"scale": 2, "hidden_states": x})
    assert positional == () and torch.equal(keywords["hidden_states"], small) and keywords["scale"] == 2
    unpool, large = UnpoolTokens(pool), pool_grid(small, (2, 3), (4, 6), 1)
    assert torch.equal(unpool(nn.Identity(), (), small), large)
    first, second = unpool(nn.Identity(), (), (small, "weights"))
    assert torch.equal(first, large) and second == "weights"
    assert pool_grid(x, (4, 6), (4, 6), 1) is x
