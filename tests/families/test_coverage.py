"""benchmarks/coverage.py: that it sees what is wrong, on small networks; and docs/families.md against its table."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from torch import nn

import downres

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # it imports measuring.py beside it
spec = importlib.util.spec_from_file_location("coverage_of_networks", ROOT / "benchmarks" / "coverage.py")
coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(coverage)
sys.path.remove(str(ROOT / "benchmarks"))

RESULT = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())
DOCS = (ROOT / "docs" / "families.md").read_text()
FAMILIES = {
    "beit": "BEiT", "botnet": "BoTNet", "bat_": "BAT-ResNeXt", "cait": "CaiT", "coat_": "CoaT", "coatnet": "CoAtNet",
    "convit": "ConViT", "crossvit": "CrossViT", "csatv2": "CSATv2", "davit": "DaViT", "deit": "DeiT", "edgenext": "EdgeNeXt",
    "efficientformer_": "EfficientFormer", "efficientformerv2": "EfficientFormer v2", "flexivit": "FlexiViT",
    "gcvit": "GC-ViT", "gemma4": "Gemma 4", "gmixer": "gMixer", "gmlp": "gMLP", "halonet": "HaloNet", "hiera": "Hiera",
    "iformer": "iFormer", "levit": "LeViT", "maxvit": "MaxViT", "mixer": "MLP-Mixer", "mobilevit": "MobileViT",
    "mvitv2": "MViT v2", "naflexvit": "NaFlexViT", "nest": "NesT", "nextvit": "Next-ViT", "pit_": "PiT", "pvt_v2": "PVT v2",
    "qwen3": "Qwen3", "resmlp": "ResMLP",
    "samvit": "SAM's ViT", "sequencer": "Sequencer", "swiftformer": "SwiftFormer", "swin_": "Swin",
    "swinv2_cr": "Swin v2 CR", "swinv2_tiny": "Swin v2", "tiny_vit": "TinyViT", "tnt": "TNT", "twins": "Twins",
    "visformer": "Visformer", "vitamin": "ViTamin", "vit_": "ViT", "volo": "VOLO", "xcit": "XCiT",
}  # fmt: skip
"""Beginnings of timm's names → how docs/families.md calls them; all others are convnets there."""


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).relu().mean((2, 3)))


def test_a_small_network_of_timm():
    row = coverage.check(coverage.build("timm:test_resnet"))
    assert row["reduced_macs"] < 0.5 * row["macs"] and row["onnx_difference"] <= coverage.TOLERANCE


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model, small: model, "are not fewer than"),
        (lambda model, small: nn.Sequential(small, nn.Flatten(0)), "the original"),
        (lambda model, small: nn.Sequential(small, nn.LogSigmoid(), nn.Hardtanh(), _Log()), "is not finite"),
        (lambda model, small: _Forgets(small), "its deepcopy gives other numbers"),
        (lambda model, small: model.head.bias.data.add_(1) is None or small, "the original's tensors have changed"),
        (lambda model, small: _Same(small), "one and the same answer"),
    ],
)
def test_what_is_wrong_is_seen(spoil, words, monkeypatch):
    reduce = downres.reduce
    monkeypatch.setattr(downres, "reduce", lambda model, **given: spoil(model, reduce(model, **given)))
    with pytest.raises(coverage.Unsound, match=words):
        coverage.check(Small().eval(), export=False)


class _Log(nn.Module):
    def forward(self, x):
        return x.log()  # of what is negative


class _Same(nn.Sequential):
    def forward(self, x):
        return super().forward(x[:1]).expand(len(x), -1)


class _Forgets(nn.Sequential):
    """Its hook is lost in a copy."""

    def __deepcopy__(self, memo):
        return nn.Sequential(nn.Upsample(scale_factor=0.5), self[0])


def test_the_table_has_no_fault_and_a_sentence_for_each_refusal():
    rows = RESULT["rows"]
    assert RESULT["counts"] == coverage.counts(rows)
    results = Counter(row["result"] for row in rows)
    tried = len(rows) - results["not run yet"] - results["not built"]
    works = results["works"] + results["works in torch"]
    text = (
        f"Of the {len(rows)} networks in it {tried} have been run so far: {works} work, {results['refused']} are refused, "
        f"{results['fault']} are faults."
    )
    assert text in " ".join(DOCS.split()) and results["fault"] == 0
    for row in rows:
        if row["result"] == "refused":
            assert re.fullmatch(r"[A-Z][^\n]+\.", row["sentence"]), row


def test_what_docs_say_works_does():
    """Every network of timm in the table: as its family's row in docs/families.md has it."""
    lines = re.findall(r"^\|(.+)\|$", DOCS.partition("## torchvision")[0], re.MULTILINE)
    known = [[cell.strip() for cell in line.split("|")] for line in lines][2:]
    tried = [r for r in RESULT["rows"] if r["network"].startswith("timm:") and r["result"] not in ("not run yet", "not built")]
    assert len(tried) >= 15
    for row in tried:
        name = row["network"].removeprefix("timm:")
        family = next((FAMILIES[key] for key in sorted(FAMILIES, key=len, reverse=True) if name.startswith(key)), "convnets")
        found = [cells for cells in known if re.search(rf"(^|[ ,(]){re.escape(family)}($|[ ,)])", cells[0])]
        assert found, family
        sizes = {cells[1] for cells in found}
        if sizes == {"no"}:
            assert row["result"] == "refused", row
        elif not any("px" in size for size in sizes):  # of these some sizes work
            assert row["result"].startswith("works"), row
