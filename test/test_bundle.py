"""Bundles survive a round trip, and a broken one says what is broken."""

from __future__ import annotations

import hashlib
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import sparserefine_ros
from sparserefine_ros.cli import main as cli
from sparserefine_ros.datasets.classes import CAMVID
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.registry import DENSE
from sparserefine_ros.segmenter.bundle import DECODERS, Bundle, default_bundle, find_bundle, model_folders
from sparserefine_ros.segmenter.bundle_files import rehash
from sparserefine_ros.segmenter.dense import load_registered
from sparserefine_ros.segmenter.segmenter import Segmenter


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "model.yaml"
    data = yaml.safe_load(file.read_text())
    change(data)
    file.write_text(yaml.safe_dump(data))


def test_round_trip(copy: Path) -> None:
    bundle = Bundle.load(copy)
    assert bundle.classes == CAMVID
    assert bundle.decoders == ("dense", "sparserefine")
    assert replace(bundle, refiner=None).decoders == ("dense",)
    for kind, dense in {
        "offseg": replace(bundle.dense, args={"offsets": True}),
        "superpixel": replace(bundle.dense, network="superpixel"),
    }.items():
        assert replace(bundle, dense=dense).decoders == ("dense", "sparserefine", kind)
    bundle.save()
    assert Bundle.load(copy) == bundle


def test_found_by_name_and_by_path(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEREFINE_MODELS", str(copy.parent))
    assert find_bundle("copy") == copy
    assert find_bundle(copy) == copy
    with pytest.raises(BundleError, match="no bundle 'nothing'.*copy"):
        find_bundle("nothing")
    with pytest.raises(BundleError, match="no bundle '~nobody-of-this-name/camvid'; give a folder"):
        find_bundle("~nobody-of-this-name/camvid")


@pytest.mark.parametrize("packages", ["lib/python3.12/site-packages", "local/lib/python3.10/dist-packages", ""])
def test_bundles_are_found_wherever_pip_put_the_package(
    packages: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --user`, --prefix and --target: the share folder lies above the package, not where Python says."""
    root = tmp_path / "root"
    there = root / ("local" if packages.startswith("local") else "") / "share" / "sparserefine_ros" / "models" / "mine"
    shutil.copytree(tiny_bundle, there)
    module = root / packages / "sparserefine_ros" / "segmenter" / "bundle.py"
    monkeypatch.setattr("sparserefine_ros.segmenter.bundle.__file__", str(module))
    assert find_bundle("mine") == there


def test_every_decoder_has_a_default_that_ships() -> None:
    for decoder in DECODERS:
        assert Bundle.load(default_bundle(decoder)).path.is_dir()
    with pytest.raises(BundleError, match="'magic'.*sparserefine"):
        default_bundle("magic")


def test_folder_without_model_yaml(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no model.yaml"):
        Bundle.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "format 99.*reads format 1"),
        (lambda d: d.pop("scale"), "lacks 'scale'"),
        (lambda d: d.update(scale=3), "scale 3.0"),
        (lambda d: d.update(temperature=0), r"temperature 0.0; expected a number above 0"),
        (lambda d: d.update(entropy_threshold=7), r"entropy_threshold 7.0.*log 11 = 2\.398"),
        (lambda d: d["classes"]["names"].pop(), "10 names but 11 colours"),
        (lambda d: d["dense"].pop("weights"), "weights"),
        (lambda d: d["dense"].pop("sha256"), "dense has no sha256.*sparserefine rehash"),
        (lambda d: d["dense"].update(sha256=7), "dense: sha256 7; expected text"),
        (lambda d: d.update(dense=[1]), "dense; expected network, args, weights and sha256"),
        (lambda d: d["dense"].update(weights="../dense.safetensors"), "'../dense.safetensors' must be the plain name"),
        (lambda d: d["dense"].update(weights="/etc/passwd"), "'/etc/passwd' must be the plain name of a file in"),
        (lambda d: d["dense"].update(weights=".."), "'..' must be the plain name"),
        (lambda d: d["dense"].update(weights="a\\b"), "must be the plain name"),
        (lambda d: d.update(native_size=[2**20, 2**20]), "native_size 1048576 x 1048576.*67108864 pixels"),
        (lambda d: d.update(native_size=[0, 9]), "native_size 0 x 9"),
        (lambda d: d.update(native_size=[float("inf"), 9]), "cannot convert float infinity"),
        (lambda d: d.update(scale=1e-9), "scale 1e-09 leaves 1x1 of frames of 64x96; expected 4 pixels a"),
        (lambda d: d["classes"]["names"].__setitem__(3, None), "class 3 is called None; expected text, in quotes"),
        (lambda d: d["classes"]["names"].__setitem__(3, "sky"), "two classes are called 'sky'; give each a name"),
        (lambda d: d["classes"].update(names=["x"] * 1000), "1000 classes; expected 1 to 255"),
        (lambda d: d["classes"]["palette"].__setitem__(0, [0, 0, 256]), r"colour \[0, 0, 256\]; expected \[red"),
    ],
)
def test_broken_model_yaml(copy: Path, change: Callable[[dict], None], message: str) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.load(copy)


def test_unreadable_yaml(copy: Path) -> None:
    (copy / "model.yaml").write_text("a: [1, 2")
    with pytest.raises(BundleError, match="cannot read .*model.yaml"):
        Bundle.load(copy)
    (copy / "model.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(BundleError, match="cannot read .*model.yaml"):
        Bundle.load(copy)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"size": [64]}, r"size \[64\]; expected null or \[height, width\]"),
        ({"size": "64"}, "size '64'"),
        ({"size": [0, 64]}, r"size \[0, 64\]"),
        ({"size": [64, 1.5]}, r"size \[64, 1.5\]"),
        ({"size": [10**6, 10**6]}, "size .*at most 67108864 pixels"),
        ({"size": None, "dtype": ["float32"]}, r"dtype \['float32'\]; expected text"),
        ({"size": [64, 64], "input": 3}, "input 3; expected text"),
    ],
)
def test_arguments_of_an_onnx_file_are_checked(copy: Path, args: dict, message: str) -> None:
    edit(copy, lambda d: d["dense"].update(network="onnx", args=args))
    with pytest.raises(BundleError, match=f"model.yaml: dense: {message}"):
        Bundle.load(copy)


def test_truncated_and_missing_weights(copy: Path) -> None:
    weights = copy / "refiner.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BundleError, match="refiner.safetensors have sha256.*restore"):
        Bundle.load(copy)
    weights.unlink()
    with pytest.raises(BundleError, match="refiner.safetensors are missing"):
        Bundle.load(copy)


def test_class_count_mismatch_names_the_weight(copy: Path) -> None:
    edit(copy, lambda d: (d["classes"]["names"].pop(), d["classes"]["palette"].pop()))
    with pytest.raises(BundleError, match="'classifier.*needs .*10"):
        Segmenter(Bundle.load(copy), "cpu")


def test_missing_and_left_over_weights(copy: Path) -> None:
    bundle = Bundle.load(copy)
    tensors = load_file(copy / bundle.dense.weights)
    name, tensor = tensors.popitem()
    for contents, message in (
        (tensors, f"'{name}' is missing"),
        ({**tensors, name: tensor, "more": torch.zeros(1)}, "'more' is left over"),
    ):
        save_file(contents, copy / "dense.safetensors")
        digest = hashlib.sha256((copy / "dense.safetensors").read_bytes()).hexdigest()
        edit(copy, lambda d, digest=digest: d["dense"].update(sha256=digest))
        with pytest.raises(BundleError, match=message):
            Segmenter(Bundle.load(copy), "cpu")


def test_unknown_network_and_argument(copy: Path) -> None:
    edit(copy, lambda d: d["dense"].update(network="vgg"))
    with pytest.raises(BundleError, match="'vgg'; known are compact"):
        Segmenter(Bundle.load(copy), "cpu")
    edit(copy, lambda d: d["dense"].update(network="compact", args={"depth": 3}))
    with pytest.raises(BundleError, match="does not take these arguments.*depth"):
        Segmenter(Bundle.load(copy), "cpu")


def test_hash_mismatch_names_both_hashes_and_the_remedy_before_anything_is_parsed(copy: Path) -> None:
    said = Bundle.load(copy).dense.sha256
    (copy / "dense.safetensors").write_bytes(b"not safetensors at all")
    found = hashlib.sha256(b"not safetensors at all").hexdigest()
    with pytest.raises(BundleError) as error:
        Bundle.load(copy)
    for words in (str(copy / "dense.safetensors"), f"have sha256 {found}", said, f"sparserefine rehash {copy}"):
        assert words in str(error.value)


def test_weights_that_change_after_the_check_are_not_parsed(copy: Path) -> None:
    bundle = Bundle.load(copy)
    shutil.copy(copy / "refiner.safetensors", copy / "dense.safetensors")
    with pytest.raises(BundleError, match="dense.safetensors have sha256"):
        Segmenter(bundle, "cpu")


def test_rehash_takes_a_deliberate_edit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / "dense.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "dense.safetensors")
    before = yaml.safe_load((copy / "model.yaml").read_text())
    assert cli(["rehash", str(copy)]) == 0
    assert "new sha256 of dense.safetensors" in capsys.readouterr().out
    after = yaml.safe_load((copy / "model.yaml").read_text())
    before["dense"]["sha256"] = hashlib.sha256((copy / "dense.safetensors").read_bytes()).hexdigest()
    assert after == before
    assert Bundle.load(copy).dense.sha256 == before["dense"]["sha256"]
    assert rehash(copy) == []


def test_rehash_writes_hashes_that_are_missing(copy: Path) -> None:
    edit(copy, lambda d: d["refiner"].pop("sha256"))
    assert rehash(copy) == ["refiner.safetensors"]
    Bundle.load(copy)


def test_every_bundle_that_ships_has_the_hash_of_every_file_of_weights() -> None:
    models = model_folders()[0]
    found = 0
    for file in models.glob("*/model.yaml"):
        bundle = Bundle.load(file.parent)
        listed = {s.weights: s.sha256 for s in (bundle.dense, bundle.refiner, bundle.native) if s}
        there = {w.name: hashlib.sha256(w.read_bytes()).hexdigest() for w in file.parent.glob("*.safetensors")}
        assert listed == there
        found += len(there)
    assert found >= 9


def test_links(copy: Path, tmp_path: Path) -> None:
    """A workspace of links to a bundle is one; a link to a file elsewhere is not part of the bundle."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in copy.iterdir():
        (linked / file.name).symlink_to(file)
    assert replace(Bundle.load(linked), path=copy) == Bundle.load(copy)
    (tmp_path / "elsewhere").write_bytes((copy / "dense.safetensors").read_bytes())
    (copy / "dense.safetensors").unlink()
    (copy / "dense.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link that leads out of"):
        Bundle.load(copy)


def test_names_do_not_lead_out_of_models(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("SPARSEREFINE_MODELS", str(tmp_path / "models"))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    with pytest.raises(BundleError, match="no bundle 'models/../../copy'"):
        find_bundle("models/../../copy")
    assert (tmp_path / "models" / ".." / "copy" / "model.yaml").is_file()
    with pytest.raises(BundleError, match="no bundle '../nothing/copy'"):
        find_bundle("../nothing/copy")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"widths": [6000] * 4}, "far more than the .* values of its weights"),
        ({"widths": [8, 8, 8, 8], "depths": [60000, 1, 1]}, "far more than the .* values of its weights"),
        ({"widths": [10**9, 8, 8, 8]}, "argument 1000000000; expected a number from -65536 to 65536"),
        ({"widths": [float("nan"), 8, 8, 8]}, "argument nan"),
        ({"widths": [8] * 1001}, "1001 values in one list"),
        ({"widths": []}, "network 'compact'"),
        ({"widths": [8, -1, 8, 8]}, "network 'compact'"),
        ({"widths": {"a": 1}}, "network 'compact'"),
    ],
)
def test_arguments_are_held_against_the_weights_before_memory_is_taken(copy: Path, args: dict, message: str) -> None:
    edit(copy, lambda d: d["dense"].update(args=args))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match=message):
        Segmenter(Bundle.load(copy), "cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_data_set_of_that_name_here_does_not_hide_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "camvid" / "val").mkdir(parents=True)
    (tmp_path / "frames").mkdir()
    assert Bundle.load("camvid").path == Path(sparserefine_ros.__file__).parents[1] / "models" / "camvid"
    with pytest.raises(BundleError, match="frames is no bundle: it has no model.yaml"):
        Bundle.load("frames")


def test_a_name_that_no_file_can_have(copy: Path) -> None:
    with pytest.raises(BundleError, match="no bundle 'aaa.*File name too long; give another folder"):
        Bundle.load(300 * "a")


def test_numbers_of_eight_bits_are_read(copy: Path) -> None:
    state = load_file(copy / "dense.safetensors")
    state["classifier.weight"] = state["classifier.weight"].to(torch.float8_e4m3fn)
    save_file(state, copy / "dense.safetensors")
    rehash(copy)
    network = load_registered(Bundle.load(copy), Bundle.load(copy).dense, DENSE)
    assert torch.equal(network.classifier.weight, state["classifier.weight"].float())


def test_rehash_says_what_does_not_fit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(copy / "refiner.safetensors", copy / "dense.safetensors")
    assert cli(["rehash", str(copy)]) == 2
    assert "weight 'classifier.weight' in" in capsys.readouterr().err
