"""Artifacts that somebody else made: whatever is in the folder, a right answer or one sentence, at once."""

import hashlib
import json
import os
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from downres import check, predict
from downres.artifacts import read_manifest
from downres.errors import DownresError

INPUT = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 32, 32])


@pytest.fixture(scope="module")
def shipped(shipped, cells, tmp_path_factory):
    """(folder, data set, model, a picture)"""
    picture = tmp_path_factory.mktemp("hostile") / "x.png"
    Image.fromarray(cells.pictures[0]).save(picture)
    return *shipped, picture


@pytest.fixture
def folder(shipped, tmp_path):
    return shutil.copytree(shipped[0], tmp_path / "best")


def sign(folder, manifest):
    """As whoever forges an artifact would: all digests are right."""
    digests = manifest.get("sha256") if isinstance(manifest, dict) else None
    if isinstance(digests, dict) and isinstance(digests.get("manifest.json"), str):
        for name in digests:
            if name != "manifest.json" and (folder / name).is_file():
                digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digests["manifest.json"] = ""
        text = json.dumps(manifest, indent=1) + "\n"
        digests["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def with_graph(folder, nodes, outputs=("logits",), initializers=(), inputs=(INPUT,), kind=TensorProto.FLOAT):
    given = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", list(inputs), given, list(initializers))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "model.onnx")
    sign(folder, read_manifest(folder))


def constant(values):
    """(b, 3, 32, 32) → (b, K) of these values."""
    array = np.array([values], np.float32)
    mean = helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0)
    shape = helper.make_node("Unsqueeze", ["mean", "one"], ["column"])
    nothing = helper.make_node("Mul", ["column", "zero"], ["nothing"])
    answer = helper.make_node("Add", ["nothing", "values"], ["logits"])
    tensors = [
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        onnx.numpy_helper.from_array(array, "values"),
    ]
    return [mean, shape, nothing, answer], tensors


def test_a_forged_graph_of_the_right_form_is_used(shipped, folder):
    """The helper above makes what it should: else the refusals below would show nothing."""
    nodes, tensors = constant([0.0, 5.0])
    with_graph(folder, nodes, initializers=tensors)
    (prediction,) = predict(folder, [shipped[3]], threads=1)
    assert prediction.classes[0] == "defective" and prediction.probabilities[0] == pytest.approx(99.33, abs=0.01)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_an_error(shipped, folder, cli, value):
    nodes, tensors = constant([0.0, value])
    with_graph(folder, nodes, initializers=tensors)
    with pytest.raises(DownresError, match="model.onnx answers NaN or infinite values"):
        predict(folder, [shipped[3]], threads=1)
    done = cli("predict", folder, shipped[3], "--json")
    assert done.code == 2 and done.out == "" and "NaN or infinite" in done.err


def test_a_graph_that_never_ends_is_stopped(shipped, folder, monkeypatch, capfd):
    """By `predict` and by `check`, and the runtime's own chatter does not stand beside the sentence."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
    )
    nodes, tensors = constant([0.0, 1.0])
    nodes[0].input[0] = "looped"
    loop = helper.make_node("Loop", ["", "true", "input"], ["looped"], body=body)
    with_graph(folder, [loop, *nodes], initializers=[*tensors, helper.make_tensor("true", TensorProto.BOOL, [], [True])])
    with pytest.raises(DownresError, match="model.onnx gave no answer in 0.3 s and was stopped"):
        predict(folder, [shipped[3]], threads=1, limit_s=0.3)
    monkeypatch.setattr("downres.artifacts.proof.LIMIT_S", 0.3)
    with pytest.raises(DownresError, match="model.onnx gave no answer in 0.3 s and was stopped"):
        check(folder, model=shipped[2], data=shipped[1], threads=1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_time_limit_is_a_time(shipped, limit):
    with pytest.raises(DownresError, match="time limit"):
        predict(shipped[0], [shipped[3]], limit_s=limit)


def test_other_inputs_and_outputs_are_refused(shipped, folder):
    nodes, tensors = constant([0.0, 1.0])
    second = helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch"])
    small = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 16, 16])
    whole = helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", 3, 32, 32])
    three, tensors3 = constant([0.0, 1.0, 2.0])
    text = [helper.make_node("Cast", ["x"], ["logits"], to=TensorProto.STRING)]
    fixed = helper.make_tensor("fixed", TensorProto.FLOAT, [1, 2], [0.0, 1.0])
    alone = [helper.make_node("Identity", ["fixed"], ["logits"])]
    renamed = [*nodes, helper.make_node("Identity", ["logits"], ["other"])]
    for change, words in [
        ({"nodes": nodes, "initializers": tensors, "inputs": [INPUT, second]}, "it takes input"),
        ({"nodes": nodes, "initializers": tensors, "inputs": [small]}, "it takes input"),
        ({"nodes": alone, "initializers": [fixed], "inputs": []}, "it takes none"),
        ({"nodes": nodes, "initializers": tensors, "inputs": [whole]}, "model.onnx"),
        ({"nodes": renamed, "initializers": tensors, "outputs": ["logits", "other"]}, "it gives logits, other"),
        ({"nodes": renamed, "initializers": tensors, "outputs": ["other"]}, "it gives other"),
        ({"nodes": three, "initializers": tensors3}, r"it answers \(1, 3\)"),
        ({"nodes": [*nodes[:1], *text], "initializers": tensors}, "model.onnx"),
    ]:
        if change["nodes"][-1] is text[0]:
            text[0].input[0] = "mean"
            change["kind"] = TensorProto.STRING
        with_graph(folder, **change)
        with pytest.raises(DownresError, match=words):
            predict(folder, [shipped[3]], threads=1)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 200_000, b"3", b"null", b'{"format": 3}', b"\xff\xfe\x00", b"1e999"])
def test_a_manifest_that_is_none(shipped, folder, content):
    (folder / "manifest.json").write_bytes(content)
    for call in (lambda: predict(folder, [shipped[3]]), lambda: check(folder), lambda: read_manifest(folder)):
        with pytest.raises(DownresError, match="manifest.json is broken"):
            call()


def test_a_manifest_that_never_ends(shipped, folder):
    file = folder / "manifest.json"
    for make in (lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file), file.mkdir):
        file.rmdir() if file.is_dir() else file.unlink()
        make()
        with pytest.raises(DownresError, match="manifest.json") as told:
            predict(folder, [shipped[3]])
        assert "Errno" not in str(told.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ""])
def test_names_that_leave_the_folder_are_not_opened(shipped, folder, name):
    (folder.parent / "secret").write_text("mine")
    manifest = read_manifest(folder)
    manifest["sha256"][name] = hashlib.sha256(b"mine").hexdigest()
    sign(folder, manifest)
    with pytest.raises(DownresError, match="not as it was shipped .*no name of a file in it"):
        predict(folder, [shipped[3]])


def test_any_field_changed_is_used_or_refused_in_a_sentence(shipped, folder, damage, read_once):
    """Every field of the manifest, deleted and of every other type, the digests made right: nothing but DownresError."""
    manifest = read_manifest(folder)
    refused = 0
    # The original's numbers are read as the result's are.
    fields = [p for p in damage.paths(manifest) if p and p[0] != "versions" and "skipped" not in p and len(p) < 4]
    for at in [p for p in fields if p[0] != "original" or len(p) < 3]:
        for value in (..., None, "x", -1, 10**30, [], {"a": 1}, [[1]]):
            sign(folder, damage.changed(manifest, at, value))
            try:
                predict(folder, [shipped[3]], threads=1)
            except DownresError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 500


def test_check_of_any_field_changed(shipped, folder, damage, read_once):
    """`predict` above has met every field with every value; here each field that `check` alone reads, with one of them."""
    _, dataset, model, _ = shipped
    manifest = read_manifest(folder)
    whole = [(name,) for name in ("folds", "task", "classes", "result", "state")]
    parts = [p for p in damage.paths(manifest) if len(p) == 3 and (p[0] == "source" or p[:2] == ("result", "quality"))]
    values = (..., [], 10**30)
    cases = [(at, value) for at in whole for value in values]
    cases += [(at, values[i % 3]) for i, at in enumerate(parts)]
    for at, value in cases:
        sign(folder, damage.changed(manifest, at, value))
        try:
            check(folder, model=model, data=dataset, threads=1)
        except DownresError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "targets.npz", "folds.safetensors"])
def test_lying_files_beside_it(shipped, folder, name):
    _, dataset, model, _ = shipped
    header = json.dumps({"head.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}).encode()
    for content in (b"", b"\xff" * 40, len(header).to_bytes(8, "little") + header + b"\0" * 8, (2**60).to_bytes(8, "little")):
        (folder / name).write_bytes(content)
        manifest = read_manifest(folder)
        manifest["sha256"][name] = ""
        sign(folder, manifest)
        with pytest.raises(DownresError) as caught:
            check(folder, model=model, data=dataset, threads=1)
        assert "\n" not in str(caught.value)
