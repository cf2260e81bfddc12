"""Folders of the Hugging Face hub become bundles that give what transformers gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_mask2former import TINY
from torch import Tensor
from torch.nn import functional as F

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.classes import CAMVID, ClassList
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.bundle import Bundle, load_network
from sparserefine_ros.segmenter.importing import REPORT, import_checkpoint

SIZE = (64, 96)


def save(model: Any, folder: Path, noise: float) -> Any:
    """``model`` as a folder of the hub, with weights that half precision can hold, which bundles store."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                noisy = tensor.abs() + 0.5 if tensor.ndim == 1 else tensor + noise * torch.randn_like(tensor)
                tensor.copy_(noisy.half())
    model.eval().save_pretrained(folder)
    return model


def segformer(folder: Path, num_labels: int = len(CAMVID)) -> Any:
    transformers = pytest.importorskip("transformers", "5.23")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], num_attention_heads=[1, 2, 2, 4], sr_ratios=[4, 2, 1, 1],
        mlp_ratios=[2, 2, 2, 2], decoder_hidden_size=24, num_labels=num_labels,
    )  # fmt: skip
    return save(transformers.SegformerForSemanticSegmentation(config), folder, 0.3)


def mask2former(folder: Path) -> Any:
    pytest.importorskip("scipy")  # theirs has the losses too
    transformers = pytest.importorskip("transformers", "5.23")
    config = transformers.Mask2FormerConfig(**TINY, num_labels=len(CAMVID))
    return save(transformers.Mask2FormerForUniversalSegmentation(config), folder, 0.05)


def logits_of(folder: Path, images: Tensor) -> Tensor:
    bundle = Bundle.load(folder)
    net = load_network(folder, bundle.dense, build(DENSE, bundle.dense.network, len(CAMVID), bundle.dense.args))
    with torch.inference_mode():
        logits: Tensor = net(images)
    return logits


@pytest.mark.parametrize("size", [SIZE, (61, 97)])
def test_segformer_gives_what_transformers_gives(size: tuple[int, int], tmp_path: Path) -> None:
    theirs = segformer(tmp_path / "hub")
    bundle = import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)
    assert bundle.dense.network == "segformer-hub"
    assert bundle.provenance["imported_as"] == "SegformerForSemanticSegmentation"
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = F.interpolate(theirs(images).logits, size, mode="bilinear")
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(logits_of(tmp_path / "mine", images), expected, rtol=1e-4, atol=1e-5)
    report = (tmp_path / "mine" / REPORT).read_text().splitlines()
    assert len(report) == len(load_file(tmp_path / "hub" / "model.safetensors"))
    assert "decode_head.linear_c.3.proj.weight -> levels.3.weight (renamed)" in report


def test_mask2former_gives_what_transformers_gives(tmp_path: Path) -> None:
    theirs = mask2former(tmp_path / "hub")
    bundle = import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)
    assert bundle.dense.network == "mask2former"
    images = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        output = theirs(images)
        queries = zip(
            output.class_queries_logits.softmax(-1).unbind(1), output.masks_queries_logits.unbind(1), strict=True
        )
        scores = sum(share[:, :-1, None, None] * mask.sigmoid()[:, None] for share, mask in queries)
    expected = F.interpolate(scores, SIZE, mode="bilinear").log()
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(logits_of(tmp_path / "mine", images), expected, rtol=1e-4, atol=1e-4)
    report = (tmp_path / "mine" / REPORT).read_text()
    assert "criterion.empty_weight -> - (not needed: used in training only)" in report


def test_published_files_have_what_newer_ones_lack_and_the_reverse(tmp_path: Path) -> None:
    """Published Mask2Formers hold index tables, and not the last norm of the encoder."""
    mask2former(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    weights = load_file(file)
    table = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"
    assert table in weights
    weights[table.replace("bias_table", "index")] = torch.zeros(16, 16, dtype=torch.long)
    for name in ("weight", "bias"):
        del weights[f"model.pixel_level_module.encoder.swin.layernorm.{name}"]
    save_file(weights, file)
    import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)


def test_every_key_is_checked(tmp_path: Path) -> None:
    segformer(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "segformer.extra": torch.zeros(1)}, file)
    with pytest.raises(BundleError, match=r"1 weights left over \(segformer.extra\); 0 weights missing"):
        import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)
    del weights["decode_head.batch_norm.running_mean"]
    save_file(weights, file)
    with pytest.raises(BundleError, match=r"0 weights left over; 1 weights missing \(fusion.1.running_mean\)"):
        import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)
    assert not (tmp_path / "mine").exists()


def folder_with(tmp_path: Path, config: object, **files: object) -> Path:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    for name, contents in files.items():
        (tmp_path / "hub" / f"{name}.json").write_text(json.dumps(contents))
    return tmp_path / "hub"


LABELS = {str(i): name for i, name in enumerate(CAMVID.names)}
SEGFORMER: dict[str, Any] = {"architectures": ["SegformerForSemanticSegmentation"], "id2label": LABELS}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "holds a list"),
        ({}, "of class None; known are SegformerForSemanticSegmentation, Mask2Former"),
        ({"architectures": ["BertModel"]}, "of class BertModel"),
        ({**SEGFORMER, "id2label": {"0": "road"}}, "has 1 classes, --classes has 11"),
        (
            {"architectures": ["Mask2FormerForUniversalSegmentation"], "id2label": LABELS,
             "backbone_config": {"model_type": "resnet"}},
            "backbone 'resnet'; known is 'swin'",
        ),
        (SEGFORMER, "hub has no weights: none of model.safetensors, pytorch_model.bin"),
        ({"architectures": 5}, "cannot use the settings in .*hub: 'int' object is not iterable"),
        ({**SEGFORMER, "id2label": 5}, "cannot use the settings in .*hub: object of type 'int' has no len"),
        (
            {"architectures": ["Mask2FormerForUniversalSegmentation"], "id2label": LABELS, "backbone_config": [1]},
            "cannot use the settings in .*hub: 'list' object has no attribute 'get'",
        ),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_imported(config: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=message):
        import_checkpoint(folder_with(tmp_path, config), None, CAMVID, tmp_path / "mine", SIZE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_normalize": False}, "do_normalize false; images are scaled to 1 and normalised here"),
        ({"do_rescale": False}, "do_rescale false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078.*; images are scaled by 1/255 here"),
        ({"image_std": 0.5}, "cannot use the settings in .*hub: object of type 'float' has no len"),
        ({"image_std": ["a", "b", "c"]}, "cannot use the settings in .*hub: must be real number, not str"),
        ({"do_normalize": True, "rescale_factor": 0.00392156862745098}, "has no weights"),  # the usual ones
    ],
)
def test_other_scales_of_colours_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, SEGFORMER, preprocessor_config=settings)
    with pytest.raises(BundleError, match=message):
        import_checkpoint(folder, None, CAMVID, tmp_path / "mine", SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"depths": [1]}, "IndexError"),
        ({"hidden_sizes": [-8, 16, 24, 32]}, "RuntimeError: .*negative dimension"),
        ({"hidden_sizes": [8, 16, 24, 3000]}, ".*far more than the .* values of its weights"),
    ],
)
def test_configurations_that_cannot_be_built(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    segformer(tmp_path / "hub")
    file = tmp_path / "hub" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BundleError, match=f"as SegformerForSemanticSegmentation: {message}"):
        import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)
    assert not (tmp_path / "mine").exists()


def test_a_bundle_is_not_written_over_its_checkpoint(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, SEGFORMER)
    (folder / "README.md").write_text("theirs")
    (folder / "dense.onnx").touch()
    for file, name in ((folder, "hub"), (folder / "dense.onnx", "dense.onnx")):
        with pytest.raises(BundleError, match=f"hub holds the checkpoint itself; .* another name, or move {name}"):
            import_checkpoint(file, None, CAMVID, folder, SIZE)
    assert (folder / "README.md").read_text() == "theirs"
    save_file({"segformer.a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(
        BundleError, match=r"cannot tell.*\(segformer.a, .*; give its folder, whose config.json may say it, or --net"
    ):
        import_checkpoint(folder / "model.safetensors", None, CAMVID, tmp_path / "mine", SIZE)


def test_two_classes_without_names(tmp_path: Path) -> None:
    """transformers writes what differs from its defaults, of which two classes are one."""
    pytest.importorskip("transformers", "5.23")
    segformer(tmp_path / "hub", num_labels=2)
    assert "id2label" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    classes = ClassList("two", ("road", "other"), ((0, 0, 0), (1, 1, 1)))
    bundle = import_checkpoint(tmp_path / "hub", None, classes, tmp_path / "mine", SIZE)
    assert load_file(bundle.path / "dense.safetensors")["classifier.weight"].shape == (2, 24, 1, 1)


def test_other_statistics_of_colours_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, SEGFORMER, preprocessor_config={"image_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(BundleError, match=r"image_mean \[0.5, 0.5, 0.5\]; images are normalised with \[0.485"):
        import_checkpoint(folder, None, CAMVID, tmp_path / "mine", SIZE)
    (folder / "config.json").unlink()
    with pytest.raises(BundleError, match="cannot read .*config.json"):
        import_checkpoint(folder, None, CAMVID, tmp_path / "mine", SIZE)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--classes", "camvid", "--name", "mine", "--models", str(tmp_path), "--native-size", "64x96"]
    assert main(["import", "nvidia/segformer-b0-finetuned-cityscapes-1024-1024", *words]) == 2
    error = capsys.readouterr().err
    assert "no nvidia/segformer-b0-finetuned-cityscapes-1024-1024 here" in error and "add --download" in error
    folder = folder_with(tmp_path, SEGFORMER)
    assert main(["import", str(folder), "--network", "segformer-b0", *words]) == 2
    assert "leave --network segformer-b0 out" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "w.pth"), *words]) == 2
    assert f"cannot read checkpoint {tmp_path / 'w.pth'}" in capsys.readouterr().err
    segformer(folder)
    assert main(["import", str(folder), *words]) == 0
    assert Bundle.load(tmp_path / "mine").dense.args["config"]["hidden_sizes"] == [8, 16, 24, 32]


@pytest.mark.parametrize("form", ["bin", "shards", "bin shards"])
def test_other_forms_of_weights_give_the_same(form: str, tmp_path: Path) -> None:
    segformer(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    right = import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "right", SIZE)
    weights = load_file(file)
    file.unlink()
    stem, ending = ("pytorch_model", "bin") if "bin" in form else ("model", "safetensors")
    write = torch.save if "bin" in form else save_file
    if form == "bin":
        write(weights, tmp_path / "hub" / "pytorch_model.bin")
    else:
        keys, where = list(weights), {}
        for part, chosen in enumerate((keys[::2], keys[1::2]), 1):
            name = f"{stem}-0000{part}-of-00002.{ending}"
            write({key: weights[key] for key in chosen}, tmp_path / "hub" / name)
            where |= dict.fromkeys(chosen, name)
        (tmp_path / "hub" / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": where}))
    bundle = import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "mine", SIZE)
    assert bundle.dense.sha256 == right.dense.sha256


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../model.safetensors"}}, []])
def test_an_index_leads_nowhere_else(index: Any, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, SEGFORMER)
    save_file({"a": torch.zeros(1)}, folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BundleError, match="names files that are not in its folder|holds a list"):
        import_checkpoint(folder, None, CAMVID, tmp_path / "mine", SIZE)


def test_classes_that_are_called_otherwise_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segformer(tmp_path / "hub")
    file = tmp_path / "hub" / "config.json"
    config = json.loads(file.read_text())
    assert set(config["id2label"].values()) == {f"LABEL_{i}" for i in range(len(CAMVID))}  # nobody's names

    def write_names(names: list[str]) -> None:
        file.write_text(json.dumps({**config, "id2label": {str(i): name for i, name in enumerate(names)}}))

    write_names([name.replace("_", " ").upper() for name in CAMVID.names])
    import_checkpoint(tmp_path / "hub", None, CAMVID, tmp_path / "same", SIZE)
    swapped = [CAMVID.names[1], CAMVID.names[0], *CAMVID.names[2:]]
    write_names(swapped)
    words = ["import", str(tmp_path / "hub"), "--classes", "camvid", "--models", str(tmp_path), "--name", "other"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "otherwise than 'camvid': 0 is 'building', here 'sky', 1 is 'sky', here 'building';" in error
    assert "or add --any-names" in error and not (tmp_path / "other").exists()
    assert main([*words, "--any-names"]) == 0
