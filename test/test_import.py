"""Checkpoints of mmsegmentation become bundles: every weight finds its place, or the error names it."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from official_names import drawn
from official_names import offseg as official_offseg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparserefine_ros.cli import main
from sparserefine_ros.datasets.classes import CAMVID, CITYSCAPES, ClassList
from sparserefine_ros.errors import BundleError
from sparserefine_ros.networks.registry import DENSE, build
from sparserefine_ros.segmenter.bundle import Bundle, load_network
from sparserefine_ros.segmenter.checkpoints import read_checkpoint
from sparserefine_ros.segmenter.importing import REPORT, fill, import_checkpoint, read_renames, rename
from sparserefine_ros.segmenter.mmseg_names import ARCHITECTURES
from sparserefine_ros.segmenter.segmenter import Segmenter

SIZE = (64, 96)


def offset_names(key: str) -> str:
    """The last layer's name in mmseg: of a plain classifier, or of the official release's offset learning."""
    for ours, theirs in {
        r"^classifier\.(weight|bias)": r"conv_seg.\1", r"^classifier\.embeddings": "offset_learning.cls_repr",
        r"^classifier\.norm": "offset_learning.mask_norm", r"^classifier\.offset\.class_offset":
        "offset_learning.cls_offset_proj", r"^classifier\.offset\.feature_offset": "offset_learning.feat_offset_proj",
    }.items():  # fmt: skip
        key = re.sub(ours, theirs, key)
    return f"decode_head.{key}"


def segformer_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A SegFormer's weights under mmseg's names, its linear layers as it stores them."""
    pairs = {
        "patch_embeddings.proj": "0.projection", "patch_embeddings.layer_norm": "0.norm", "layernorm_before": "norm1",
        "layernorm_after": "norm2", "attention.o_proj": "attn.attn.out_proj",
        "attention.sequence_reduction.sequence_reduction": "attn.sr", "attention.sequence_reduction.layer_norm":
        "attn.norm", "mlp.fc1": "ffn.layers.0", "mlp.dwconv.dwconv": "ffn.layers.1", "mlp.fc2": "ffn.layers.4",
    }  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        stage = re.match(r"encoder\.stages\.(\d)\.(.*)", key)
        if stage:
            rest = stage[2].replace("blocks.", "1.")
            rest = re.sub(r"^layer_norm", "2", rest)
            for ours, theirs in pairs.items():
                rest = rest.replace(ours, theirs)
            name = f"backbone.layers.{stage[1]}.{rest}"
            if ".fc" in key and key.endswith("weight"):
                tensor = tensor[..., None, None]  # 1x1 convolutions there
            if third := re.match(r"(.*)\.attention\.([qkv])_proj\.(.*)", name):
                name = f"{third[1]}.attn.attn.in_proj_{third[3]}"
                tensor = torch.cat([renamed[name], tensor]) if name in renamed else tensor
        else:
            name = offset_names(re.sub(r"^levels\.", "convs.", key).replace("fusion.", "fusion_conv."))
            name = re.sub(r"((?:convs\.\d|fusion_conv))\.0\.", r"\1.conv.", name)
            name = re.sub(r"((?:convs\.\d|fusion_conv))\.1\.", r"\1.bn.", name)
        renamed[name] = tensor
    return renamed


def segnext_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A SegNeXt's weights under mmseg's names."""
    parts = {
        "before": "attn.proj_1", "after": "attn.proj_2", "local": "attn.spatial_gating_unit.conv0",
        "mix": "attn.spatial_gating_unit.conv3", "scale_attention": "layer_scale_1", "scale_mlp": "layer_scale_2",
    }  # fmt: skip
    renamed = {}
    for key, tensor in state.items():
        words = key.split(".")
        if words[0] == "embeds":
            inner = f"proj.{words[2]}" if words[1] == "0" else {"0": "proj", "1": "norm"}[words[2]]
            name = f"backbone.patch_embed{int(words[1]) + 1}.{inner}.{words[3]}"
        elif words[0] == "norms":
            name = f"backbone.norm{int(words[1]) + 1}.{words[2]}"
        elif words[0] == "stages":
            if words[3] == "strips":
                words[3:6] = [f"attn.spatial_gating_unit.conv{words[4]}_{int(words[5]) + 1}"]
            elif words[3] == "mlp":
                words[4] = {"0": "fc1", "1": "dwconv", "3": "fc2"}[words[4]]
            words[3] = parts.get(words[3], words[3])
            name = ".".join([f"backbone.block{int(words[1]) + 1}", *words[2:]])
            tensor = tensor.flatten() if "scale" in key else tensor
        elif words[0] == "ham_in":
            name = f"decode_head.hamburger.ham_in.conv.{words[1]}"
        elif words[0] == "classifier":
            name = offset_names(key)
        else:
            inner = "hamburger.ham_out" if words[0] == "ham_out" else words[0]
            name = f"decode_head.{inner}." + {"0": "conv", "1": "gn"}[words[1]] + "." + words[2]
        renamed[name] = tensor
    return renamed


def random_network(network: str, **args: object) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = build(DENSE, network, len(CAMVID), args)
    for name, tensor in module.state_dict().items():
        if name.endswith(("running_mean", "bias", "scale_attention", "scale_mlp")):
            tensor.normal_(std=0.2)
        elif name.endswith(("running_var", "norm.weight")):
            tensor.uniform_(0.5, 1.5)
    return module.eval()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of an OffSeg-T, as the official release names them."""
    return {k: t.float() if t.is_floating_point() else t for k, t in drawn(official_offseg("t", len(CAMVID))).items()}


@pytest.fixture(scope="module")
def offseg(weights: dict[str, Tensor]) -> nn.Module:
    module: nn.Module = build(DENSE, "offseg", len(CAMVID), {"variant": "T"})
    fill(module, *rename(weights, ARCHITECTURES["offseg-t"]), "the test's weights")
    return module.eval()


def same(folder: Path, module: nn.Module) -> None:
    """The bundle in ``folder`` rebuilds ``module``, up to the half precision that matrices are stored in."""
    bundle = Bundle.load(folder)
    built = load_network(folder, bundle.dense, build(DENSE, bundle.dense.network, len(CAMVID), bundle.dense.args))
    expected = module.state_dict()
    for name, tensor in built.state_dict().items():
        wanted = expected[name].half().to(tensor.dtype) if tensor.ndim >= 2 else expected[name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("form", ["pth", "mmengine", "safetensors"])
def test_offseg_round_trip(form: str, offseg: nn.Module, weights: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, file)
    else:
        torch.save({"meta": {"epoch": 1}, "state_dict": weights} if form == "mmengine" else weights, file)
    bundle = import_checkpoint(file, "offseg-t", CAMVID, tmp_path / "models" / "mine", SIZE)
    assert bundle.dense.args == {"variant": "T", "resolution": 512} and bundle.name == "mine"
    assert Bundle.load(bundle.path) == bundle
    same(bundle.path, offseg)

    report = (bundle.path / REPORT).read_text().splitlines()
    assert len(report) == len(weights)  # one line a weight
    assert "backbone.patch_embed.0.weight -> encoder.stem.0.0.weight (renamed)" in report
    assert "backbone.network.5.attn.q.local.0.weight -> encoder.downs.2.attention.q_local.weight (renamed)" in report
    assert "decode_head.freqfusions.0.dysampler.hr_offset.bias -> fuse.2.direction_fine.bias (renamed)" in report
    unneeded = [line.split(" -> ")[0] for line in report if "not needed" in line]
    tables = [key for key in unneeded if "attention_bias" in key]
    assert len(tables) == 15  # three of each of five attentions
    assert sorted(set(unneeded) - set(tables)) == [
        "decode_head.conv_seg.bias", "decode_head.conv_seg.weight",
        *(f"decode_head.freqfusions.{i}.{name}" for i in range(3)
          for name in ("dysampler.init_pos", "hamming_highpass", "hamming_lowpass")),
    ]  # fmt: skip


@pytest.mark.parametrize(("network", "offsets"), [("segformer-b0", False), ("segformer-ol-b0", True)])
def test_segformer_round_trip(network: str, offsets: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = random_network("segformer", size="b0", offsets=offsets)
    weights = segformer_names(module.state_dict())
    for key, shape in {
        "backbone.layers.0.1.1.attn.attn.in_proj_weight": (96, 32),
        "backbone.layers.0.1.0.attn.sr.weight": (32, 32, 8, 8),
        "backbone.layers.3.2.weight": (256,),
        "backbone.layers.2.1.0.ffn.layers.4.weight": (160, 640, 1, 1),
        "decode_head.convs.3.conv.weight": (256, 256, 1, 1),
        "decode_head.fusion_conv.bn.running_var": (256,),
    }.items():
        assert weights[key].shape == shape, key
    weights["auxiliary_head.conv_seg.weight"] = torch.zeros(2, 2)
    if offsets:
        weights["decode_head.conv_seg.bias"] = torch.zeros(2)
    torch.save(weights, tmp_path / "weights.pth")
    bundle = import_checkpoint(tmp_path / "weights.pth", network, CAMVID, tmp_path / "mine", SIZE)
    same(bundle.path, module)

    # mmseg's attention is torch's own, which takes queries, keys and values in this order.
    block = build(DENSE, "segformer", len(CAMVID), bundle.dense.args)
    load_network(bundle.path, bundle.dense, block)
    block = block.encoder.stages[3].blocks[0].attention
    theirs = nn.MultiheadAttention(256, 8, batch_first=True)
    prefix = "backbone.layers.3.1.0.attn.attn."
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    x = torch.randn(1, 12, 256)
    with torch.no_grad():
        torch.testing.assert_close(block(x, 3, 4)[0], theirs(x, x, x)[0], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(("network", "offsets"), [("segnext-t", False), ("segnext-ol-t", True)])
def test_segnext_round_trip(network: str, offsets: bool, tmp_path: Path) -> None:
    module = random_network("segnext", size="T", offsets=offsets)
    weights = segnext_names(module.state_dict())
    for key, shape in {
        "backbone.patch_embed1.proj.3.weight": (32, 16, 3, 3),
        "backbone.patch_embed4.norm.running_var": (256,),
        "backbone.block3.4.attn.spatial_gating_unit.conv0.weight": (160, 1, 5, 5),
        "backbone.block3.4.attn.spatial_gating_unit.conv2_1.weight": (160, 1, 1, 21),
        "backbone.block2.0.layer_scale_1": (64,),
        "backbone.norm4.weight": (256,),
        "decode_head.hamburger.ham_in.conv.bias": (256,),
        "decode_head.hamburger.ham_out.gn.weight": (256,),
        "decode_head.squeeze.conv.weight": (256, 480, 1, 1),
    }.items():
        assert weights[key].shape == shape, key
    older = {key.replace("mlp.dwconv", "mlp.dwconv.dwconv"): tensor for key, tensor in weights.items()}
    for number, state in enumerate((weights, older)):
        torch.save(state, tmp_path / "weights.pth")
        same(import_checkpoint(tmp_path / "weights.pth", network, CAMVID, tmp_path / str(number), SIZE).path, module)


def test_left_over_missing_and_misshapen_weights(weights: dict[str, Tensor], tmp_path: Path) -> None:
    def attempt(change: dict[str, Tensor | None], message: str, classes: object = CAMVID) -> None:
        merged = {**weights, **change}
        torch.save({key: tensor for key, tensor in merged.items() if tensor is not None}, tmp_path / "w.pth")
        with pytest.raises(BundleError, match=message):
            import_checkpoint(tmp_path / "w.pth", "offseg-t", classes, tmp_path / "mine", SIZE)  # type: ignore[arg-type]
        assert not (tmp_path / "mine").exists()

    attempt(
        {"decode_head.extra": torch.zeros(1)},
        r"1 weights left over \(decode_head.extra\); 0 weights missing.*--renames",
    )
    attempt({"decode_head.align.gn.bias": None}, r"0 weights left over; 1 weights missing \(align.1.bias\)")
    attempt({"backbone.network.6.5.token_mixer.attention_biases_seg": None}, "weights missing .*stages.3.5")
    attempt({"decode_head.align.gn.bias": torch.zeros(8)}, r"align.1.bias' has shape \(8,\), needed is \(256,\)")
    attempt({"align.0.weight": torch.zeros(1)}, "two weights become 'align.0.weight'")
    too_many = {"decode_head.offset_learning.cls_repr": torch.zeros(1, 150, 256)}
    attempt(too_many, r"with the 11 classes of 'camvid': .*\(1, 150, 256\), needed is \(11, 256\).*number of classes")
    attempt(
        {"decode_head.align.gn.bias": torch.full((256,), torch.nan)}, "align.1.bias' has values that are not finite"
    )
    many = {f"decode_head.unknown{i}": torch.zeros(1) for i in range(30)}
    attempt(many, "30 weights left over .*unknown11 and 18 more")


def test_counters_of_batch_normalisation_may_be_absent(
    offseg: nn.Module, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}, tmp_path / "w.pth")
    same(import_checkpoint(tmp_path / "w.pth", "offseg-t", CAMVID, tmp_path / "mine", SIZE).path, offseg)


class Trap:
    """Writes a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_unreadable_files(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"state_dict": {}, "hook": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(BundleError, match="could run code.*weights_only=False"):
        read_checkpoint(file)
    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    with pytest.raises(BundleError, match=r"w\.pth"):
        read_checkpoint(file)
    assert not (tmp_path / "sprung").exists()
    for contents in (b"", b"\x80", b"nonsense"):
        for name in ("w.pth", "w.safetensors"):
            (tmp_path / name).write_bytes(contents)
            with pytest.raises(BundleError, match=re.escape(name)):
                read_checkpoint(tmp_path / name)
    torch.save({"epoch": 3}, file)
    with pytest.raises(BundleError, match="no state dict"):
        read_checkpoint(file)
    torch.save({0: torch.zeros(2)}, file)
    with pytest.raises(BundleError, match="no state dict"):
        read_checkpoint(file)
    plain = torch.eye(3)
    odd = {
        "sparse": plain.to_sparse(), "meta": plain.to("meta"), "complex": plain + 1j, "bool": plain > 0,
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8), "int8": plain.to(torch.int8),
        "nested": torch.nested.nested_tensor([plain[0], plain[1, :2]]),
    }  # fmt: skip
    for name, tensor in odd.items():
        torch.save({"good": plain, name: tensor}, file)
        with pytest.raises(
            BundleError, match=f"(weight '{name}' is no plain tensor|damaged or holds more|cannot read)"
        ):
            read_checkpoint(file)
    torch.save({"good": plain, "counter": torch.tensor(3), "half": plain.half()}, file)
    assert list(read_checkpoint(file).weights) == ["good", "counter", "half"]
    with pytest.raises(BundleError, match="cannot read checkpoint .*nothing.pth"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_command_renames_and_segments(
    offseg: nn.Module, weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that the built-in table does not know come from a file; the bundle runs."""
    save_file(
        {k.replace("decode_head.freqfusions", "decode_head.ff"): v.contiguous() for k, v in weights.items()},
        tmp_path / "w.safetensors",
    )
    (tmp_path / "classes.yaml").write_text(
        yaml.safe_dump({"name": "mine", "names": list(CAMVID.names), "palette": [list(c) for c in CAMVID.palette]})
    )
    words = ["import", str(tmp_path / "w.safetensors"), "--name", "mine"]
    words += ["--models", str(tmp_path), "--classes", str(tmp_path / "classes.yaml"), "--native-size", "64x96"]
    assert main(words) == 2
    assert "decode_head.ff.0.content_encoder.bias" in capsys.readouterr().err
    (tmp_path / "renames.yaml").write_text(yaml.safe_dump([["^decode_head.ff", "decode_head.freqfusions"]]))
    assert main([*words, "--renames", str(tmp_path / "renames.yaml")]) == 0
    same(tmp_path / "mine", offseg)
    assert "(renamed)" in (tmp_path / "mine" / REPORT).read_text()
    segmenter = Segmenter(Bundle.load(tmp_path / "mine"), "cpu")
    assert segmenter.segment([torch.randint(256, (64, 96, 3), dtype=torch.uint8).numpy()])[0].mask.shape == (64, 96)
    assert main(words) == 2 and "holds a bundle already" in capsys.readouterr().err
    assert main([*words, "--scale", "3"]) == 2


@pytest.mark.parametrize("contents", ["[[a]]", "5", "[['(', b]]", "a: [", "[[a, b, c]]"])
def test_broken_renames(contents: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(contents)
    with pytest.raises(BundleError, match="(?s)r.yaml.*list of"):
        read_renames(tmp_path / "r.yaml")


def test_replacements_with_a_group_that_is_not_there() -> None:
    with pytest.raises(BundleError, match=r"cannot rename 'a.b' by \['a', '.*3'\]: invalid group reference 3"):
        rename({"a.b": torch.zeros(1)}, ARCHITECTURES["hrnet-w18"], (("a", r"\3"),))


@pytest.mark.parametrize("shape", [(), (4, 2)])
def test_weights_that_cannot_be_split(shape: tuple[int, ...]) -> None:
    key = "backbone.layers.0.1.0.attn.attn.in_proj_weight"
    with pytest.raises(BundleError, match=re.escape(f"{key!r} of shape {shape} cannot be split into 3")):
        rename({key: torch.zeros(shape)}, ARCHITECTURES["segformer-b0"])


@pytest.mark.parametrize(
    ("classes", "size", "scale", "message"),
    [
        (CAMVID, (0, 96), 1.0, "native_size 0 x 96; expected"),
        (CAMVID, (-64, 96), 1.0, "native_size -64 x 96; expected"),
        (CAMVID, (100_000, 100_000), 1.0, "native_size 100000 x 100000; expected"),
        (CAMVID, SIZE, 1.5, "scale 1.5; expected"),
        (ClassList("one", ("road",), ((0, 0, 0),)), SIZE, 1.0, "1 class; expected 2"),
        (ClassList("many", ("x",) * 256, ((0, 0, 0),) * 256), SIZE, 1.0, "256 classes; expected 1 to 255"),
        (ClassList("bright", ("x", "y"), ((0, 0, 300),) * 2), SIZE, 1.0, "colour .*300.; expected"),
    ],
)
def test_no_bundle_is_written_that_could_not_be_loaded(
    classes: ClassList, size: tuple[int, int], scale: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        import_checkpoint(tmp_path / "w.pth", None, classes, tmp_path / "mine", size, scale)
    assert not (tmp_path / "mine").exists()


def test_weights_too_large_for_half_precision_keep_theirs(weights: dict[str, Tensor], tmp_path: Path) -> None:
    key = "decode_head.offset_learning.cls_repr"
    large = torch.full((1, 11, 256), 70_000.0)
    torch.save({**weights, key: large}, tmp_path / "w.pth")
    path = import_checkpoint(tmp_path / "w.pth", "offseg-t", CAMVID, tmp_path / "mine", SIZE).path
    stored = load_file(path / "dense.safetensors")
    assert stored["classifier.embeddings"].dtype == torch.float32 and stored["project.0.0.weight"].dtype == torch.half
    assert torch.equal(stored["classifier.embeddings"], large[0])
    Segmenter(Bundle.load(path), "cpu")


def test_unknown_network_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="'hrnet-w5'; choose one of hrnet-w18"):
        import_checkpoint(tmp_path / "w.pth", "hrnet-w5", CAMVID, tmp_path / "mine", SIZE)
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BundleError, match="pip install .transformers"):
        import_checkpoint(tmp_path / "w.pth", "segformer-b0", CAMVID, tmp_path / "mine", SIZE)


def test_every_architecture_is_registered() -> None:
    assert {a.network for a in ARCHITECTURES.values()} <= set(DENSE)


def test_old_torch_is_not_trusted_with_a_pth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2)}, file)
    assert list(read_checkpoint(file).weights) == ["a"]
    for version, trusted in (("2.5.1+cu121", False), ("2.4.0", False), ("2.6.0", True), ("2.13.0+cpu", True)):
        monkeypatch.setattr(torch, "__version__", version)
        if trusted:
            assert list(read_checkpoint(file).weights) == ["a"]
        else:
            with pytest.raises(BundleError, match=rf"torch {re.escape(version)} .*CVE-2025-32434.*>= 2\.6"):
                read_checkpoint(file)


def test_names_of_bundles_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../mine", "/tmp/mine", "a/b", ".."):
        words = ["import", str(tmp_path / "x.pth"), "--network", "offseg-t", "--classes", "camvid", "--name", name]
        assert main(words) == 2
        assert f"--name '{name}' must be a plain folder name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "meta", [{"CLASSES": CITYSCAPES.names[::-1]}, {"dataset_meta": {"classes": list(CITYSCAPES.names[::-1])}}]
)
def test_classes_of_another_order_are_told(meta: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save({"meta": meta, "state_dict": {"a": torch.zeros(1)}}, file)
    assert read_checkpoint(file).class_names == CITYSCAPES.names[::-1]
    with pytest.raises(BundleError, match="w.pth calls its classes otherwise than 'cityscapes': 0 is 'bicycle'"):
        import_checkpoint(file, "segformer-b0", CITYSCAPES, tmp_path / "mine", (64, 96))
    with pytest.raises(BundleError, match="weights missing"):
        import_checkpoint(file, "segformer-b0", CITYSCAPES, tmp_path / "mine", (64, 96), any_names=True)


def test_the_wrapper_of_data_parallel_is_taken_off(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.a": torch.zeros(1), "module.b": torch.ones(1)}}, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth").weights) == ["a", "b"]
    torch.save({"module.a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_checkpoint(tmp_path / "w.pth").weights) == ["module.a", "b"]


def test_weights_under_another_key_are_pointed_at(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(BundleError, match="but a dict of model, epoch; if one of these is it, keep that alone"):
        read_checkpoint(tmp_path / "w.pth")


def test_renames_are_texts(tmp_path: Path) -> None:
    (tmp_path / "renames.yaml").write_text("- [a, null]\n")
    with pytest.raises(BundleError, match="'a', None. are not two texts"):
        read_renames(tmp_path / "renames.yaml")
