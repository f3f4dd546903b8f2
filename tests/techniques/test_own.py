"""A technique of one's own, told in this file alone, grey and back: read, planned, applied, counted, an option, searched."""

import json
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch

from downres import Axes, Candidate, DownresError, costs, curve, load_run, reduce, search
from downres import cli as cli_module
from downres.axes import default_axes
from downres.images import split_once
from downres.images.images import from_arrays as images_of
from downres.records import Result
from downres.recovery.state import State
from downres.reports import words
from downres.searching.plan import plan
from downres.tasks.classification.folders import from_arrays
from downres.techniques import Design, Style, Technique, register, techniques, unregister


def to_grey(module, args):
    return (args[0].mean(1, keepdim=True).expand_as(args[0]), *args[1:])


class Grey(Technique):
    """The input loses its colours and keeps its three channels."""

    name, keyword, option, help = "grey", "grey", "--grey", "Without colours."
    order, sought = 45, "grey"
    styles = {"grey": Style("#7d8590", "cross")}

    def defaults(self, design):
        return (True,)

    def detail(self, c):
        return "without colours"

    def how(self, c):
        return "no colours"

    def apply(self, work):
        work.small.register_forward_pre_hook(to_grey)
        work.note("grey", "", "the mean of the channels in each of them")


class Bits(Technique):
    """Counts on a value: so many grey levels, as a power of two."""

    name, neutral, keyword, option, metavar, help = "bits", None, "bit_depths", "--bits", "4,2", "Grey levels."
    inside = True

    def normalise(self, value):
        if value is not None and value < 1:
            raise DownresError(f"Bits are at least 1, {value} is not: give for example 4.")
        return value

    def word(self, c):
        return f"bits{self.value(c)}"

    def read(self, word):
        return {"bits": int(word[4:])} if word[:4] == "bits" and word[4:].isdigit() else {}

    def parse_option(self, text):
        return tuple(int(part) for part in text.split(","))

    def apply(self, work):
        levels = 2 ** self.value(work.candidate) - 1
        work.small.register_forward_pre_hook(lambda module, args: ((args[0] * levels).round() / levels,))
        work.note("bits", "", f"{levels + 1} levels")


@pytest.fixture
def grey():
    technique = Grey()
    register(technique)
    yield technique
    unregister(technique)


@pytest.fixture
def bits():
    technique = Bits()
    register(technique)
    yield technique
    unregister(technique)


@pytest.fixture(scope="module")
def coloured():
    """60 images of 48×48: class 1 is as bright as class 0 but for its bright stripes, colours say nothing."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    pictures = rng.integers(60, 120, (60, 48, 48, 3)).astype(np.uint8)
    pictures[labels == 1, ::4] += 100
    return from_arrays(
        images_of(pictures, [str(i) for i in range(60)]),
        labels,
        ("flat", "striped"),
        (split_once(labels, 0.5, 0),),
        "Made.",
        "",
    )


@pytest.fixture
def cli(monkeypatch, capsys):
    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["downres", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with warnings.catch_warnings():
            try:
                cli_module.main()
            except SystemExit as stop:
                assert not stop.code, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_it_is_a_value_of_candidates(grey):
    candidate = Candidate(128, extra={"grey": True})
    assert candidate == Candidate.parse("128 grey") == Candidate.of(resolution=128, grey=True)
    assert str(candidate) == "128 grey" and str(Candidate.parse("224 merge8 grey")) == "224 merge8 grey"
    assert len({candidate, Candidate.parse("128 grey"), Candidate(128)}) == 2  # hashed by it
    assert candidate.extra == (("grey", True),) and candidate.at(96) == Candidate.parse("96 grey")
    assert candidate.to_json() == {**Candidate(128).to_json(), "extra": {"grey": True}}
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate
    assert pickle.loads(pickle.dumps(candidate)) == candidate
    assert not candidate.is_input_only and candidate.techniques[-1] is grey and candidate.without(grey) == Candidate(128)
    assert Candidate(128, extra={"grey": False}) == Candidate(128)
    result = Result(candidate, "stopped")
    assert result.row()["grey"] is True and Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    for wrong in ({"grey": 3}, {"gray": True}, {"merge": 8}):
        with pytest.raises(DownresError, match=r"True or False|No technique has a value"):
            Candidate(extra=wrong)
    with pytest.raises(DownresError, match="at 'grey'"):
        Candidate.parse("128 grey grey")


def test_others_do_not_change_where_it_is_registered(grey):
    before = '{"resolution": 128, "stem_scale": 1.0, "stem": null, "patch_size": null, "merge": {"r": 8, "keep": null, '
    before += '"schedule": "constant", "by": "merge"}, "ragged": "error", "depth": null, "width": 1.0}'
    candidate = Candidate(128, merge=8)
    assert json.dumps(candidate.to_json()) == before and str(candidate) == "128 merge8"
    key = State(candidate, 0.875).key()
    unregister(grey)
    assert json.dumps(candidate.to_json()) == before and State(Candidate(128, merge=8), 0.875).key() == key
    with pytest.raises(DownresError, match="at 'grey'"):
        Candidate.parse("128 grey")
    with pytest.raises(DownresError, match="No technique is tried by 'grey': register"):
        Axes(extra={"grey": [True]})
    register(grey)


def test_a_name_is_taken_once(grey):
    for name, keyword, option in (
        ("grey", "greys", "--greys"),
        ("merge", "joins", "--joins"),
        ("joins", "merges", "--joins"),
        ("joins", "joins", "--merge"),
        ("", "joins", "--joins"),
    ):
        other = type("Other", (Grey,), {"name": name, "keyword": keyword, "option": option})()
        with pytest.raises(DownresError, match="of its own"):
            register(other)
    assert techniques().count(grey) == 1


def test_it_is_planned(grey, bits):
    design = Design(224, 32)
    assert [str(c) for c in plan(design, Axes((), (), extra={"grey": [True]}))[0]] == ["224 grey"]
    texts = [str(c) for c in plan(design, default_axes(design, Axes([128], ())))[0]]
    assert texts == ["128", "224 grey"]  # its own default; the other has none
    axes = Axes([128], candidates=["96 grey"], extra={"grey": (), "bit_depths": [4, 2]})
    assert [str(c) for c in plan(design, axes)[0]] == ["128", "224 bits4", "224 bits2", "96 grey"]
    with pytest.raises(DownresError, match="at least 1"):
        Axes(extra={"bit_depths": [0]})


def test_it_is_applied(grey, bits, tiny):
    x = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    small = reduce(tiny.module, Candidate.parse("as is grey"))
    assert [str(change) for change in small.downres.changes] == ["grey at the input: the mean of the channels in each of them"]
    flat = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(small(x), tiny.module(flat), rtol=0, atol=0)
    both = reduce(tiny.module, Candidate.parse("24 grey"), input_size=(3, 48, 48))
    torch.testing.assert_close(both(x), reduce(tiny.module, resolution=24)(flat), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reduce(tiny.module, Candidate.parse("as is bits1"))(x), tiny.module(x.round()))
    with pytest.warns(UserWarning, match="a patch_size, a merge and grey, and the candidate has none"):
        reduce(tiny.module, Candidate())


def test_it_is_counted_and_drawn(grey, tiny, tmp_path):
    found = costs(tiny, [24], tries=None, candidates=["24 grey"])
    assert [(r.family, str(r.candidate)) for r in found.rows] == [
        ("original", "48"),
        ("resolution", "24"),
        ("given", "24 grey"),
    ]
    found = costs(tiny, tries=Axes([24], extra={"grey": (True,)}))
    assert [(row.family, str(row.candidate)) for row in found.rows] == [
        ("original", "48"),
        ("resolution", "24"),
        ("grey", "48 grey"),
    ]
    assert found.rows[2].cost.params == found.original.params
    assert found.to_json()["costs"][2]["extra"] == {"grey": True}
    page = found.write_picture(tmp_path / "page.html").read_text()
    assert '"cross"' in page and "48 px, without colours" in page
    with pytest.raises(DownresError, match="not both"):
        costs(tiny, [24], tries=Axes([16]))


def test_it_is_told(grey):
    candidate = Candidate.parse("128 stem×0.5 grey")
    assert words.label(candidate) == "128 px, stem ×0.5, without colours"
    assert words.short_label(candidate) == "128 ×0.5 grey"
    said = words.verdict(Result(Candidate(224), "measured"), [], Result(candidate, "measured"), None)
    assert said.startswith("At 128 px instead of 224 px and with the activations after its stem resized ×0.5 and no colours, ")


def test_it_is_an_option(grey, bits, cli, tiny_file):
    assert "--grey " in cli("cost", "--help") and all(word in cli("search", "--help") for word in ("--bits ", " 4,2 "))
    assert "--depth" in cli("cost", "--help") and "--depth" not in cli("curve", "--help")
    found = json.loads(cli("cost", f"{tiny_file}:make", "--native-resolution", "48", "--grey", "--bits", "4,2", "--json"))
    assert [row["family"] for row in found["costs"]] == ["original", "grey", "bits", "bits"]
    unregister(bits)
    assert "--bits" not in cli("search", "--help") and "--grey" in cli("curve", "--help")
    register(bits)


def test_it_is_searched(grey, tiny, coloured, tmp_path):
    options = {"fit_head": True, "max_drop": 40.0, "rungs": ("head",), "threads": 1}
    run = search(tiny, coloured, tries=Axes([32], ()), out=tmp_path / "run", **options)
    assert [str(r.candidate) for r in run.results] == ["32", "48 grey"]  # tried by default
    result = run.results[1]
    assert result.status == "measured" and result.quality.n == 30 and result.drop.verdict and result.row()["grey"] is True
    again = load_run(run.folder)
    assert again.results[1].candidate == result.candidate
    assert "48 px, without colours" in (run.folder / "report.html").read_text()
    # What it shows the network is grey: on grey pictures it changes nothing.
    flat = np.stack([np.asarray(coloured.images[i]) for i in range(60)]).mean(-1, keepdims=True).round().repeat(3, -1)
    images = images_of(flat.astype(np.uint8), [str(i) for i in range(60)])
    dataset = from_arrays(images, coloured.labels, coloured.classes, coloured.folds, "Made.", "")
    found = curve(tiny, dataset, candidates=["48 grey"])
    assert found.results[0].quality == found.original.quality
