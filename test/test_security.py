"""No code from data: what the package never calls. And what its dependencies are allowed to be."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = [*(ROOT / "sparserefine_ros").rglob("*.py"), *(ROOT / "launch").glob("*.py")]

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pty.spawn",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FORBIDDEN_MODULES = {"dill", "joblib", "marshal", "shelve", "cloudpickle"}
# pickle is imported for the name of its error alone.
PICKLE = {"pickle.UnpicklingError"}


def name(node: ast.AST) -> str:
    """The dotted name of a name or attribute, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def complaints(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for module in modules:
                if module.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"imports {module}"
                if isinstance(node, ast.ImportFrom) and module in ("pickle", "torch", "yaml", "subprocess"):
                    names = {a.name for a in node.names} & {"load", "loads", "Unpickler", "full_load", "unsafe_load"}
                    yield from (f"imports {module}.{n}, which this test would not see being called" for n in names)
        if isinstance(node, ast.Attribute) and name(node).startswith("pickle.") and name(node) not in PICKLE:
            yield f"uses {name(node)}"
        if not isinstance(node, ast.Call):
            continue
        called, given = name(node.func), {k.arg: k.value for k in node.keywords}
        if called in FORBIDDEN_CALLS:
            yield f"calls {called}"
        if called == "torch.load" and ast.unparse(given.get("weights_only", ast.Constant(None))) != "True":
            yield "calls torch.load without weights_only=True"
        if called == "yaml.load" and ast.unparse(given.get("Loader", ast.Constant(None))) != "_LOADER":
            yield "calls yaml.load with another loader than that of untrusted.py"
        if "shell" in given and ast.unparse(given["shell"]) != "False":
            yield f"calls {called} with a shell"
        if "allow_pickle" in given and ast.unparse(given["allow_pickle"]) != "False":
            yield f"calls {called} with allow_pickle"


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_from_data(path: Path) -> None:
    assert list(complaints(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "exec(text)", "compile(text, '', 'exec')", "import os\nos.system(text)", "import marshal",
        "import pickle\npickle.load(f)", "from pickle import loads", "torch.load(f)", "from torch import load",
        "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)", "yaml.load(f)",
        "yaml.load(f, Loader=yaml.Loader)", "yaml.unsafe_load(f)",
        "subprocess.run(text, shell=True)", "subprocess.Popen(text, shell=flag)",
        "np.load(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_the_test_sees_it(code: str) -> None:
    assert list(complaints(ast.parse(code)))


# Dependencies: what can be said of them without an advisory service (scripts/audit.sh asks one).

# The first release without a hole that data of others could reach through this package.
SAFE_FROM = {"pyyaml": (5, 4), "safetensors": (0, 3), "rosbags": (0, 11), "onnx": (1, 16)}
LICENCES = re.compile(r"Apache|MIT|BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla|HPND|zlib|Unlicense|CC0", re.I)
COPYLEFT = re.compile(r"\bA?GPL|Affero|GNU General Public", re.I)


def requirements() -> dict[str, str]:
    """Name to version range, of everything that setup.py asks for."""
    text = (ROOT / "setup.py").read_text()
    found = re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?((?:[><=!~]=?[\w.]+,?)*)"', text[text.index("ROS_WHEELS") :])
    known = {"torch", "numpy", "PyYAML", "setuptools", "triton", "transformers", "rich", "matplotlib", "spconv"}
    listed = {name: "" for name, _ in found if name in known} | {name: bounds for name, bounds in found if bounds}
    assert known <= set(listed)
    return {name.lower(): bounds for name, bounds in listed.items()}


def test_every_dependency_has_a_lower_bound_above_known_holes() -> None:
    rows = requirements()
    without = {name for name, bounds in rows.items() if not re.search(r"[>=]=", bounds)}
    assert without == {"setuptools"}  # whatever built us will do
    for dependency, safe in SAFE_FROM.items():
        [lowest] = re.findall(r">=([\d.]+)", rows[dependency])
        assert tuple(map(int, lowest.split("."))) >= safe, dependency


@pytest.mark.parametrize("dependency", sorted(requirements()))
def test_licences_go_with_ours(dependency: str) -> None:
    try:
        facts = metadata.metadata(dependency)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{dependency} is not installed")
    said = [facts.get("License-Expression") or "", (facts.get("License") or "")[:200]]
    said += [c for c in facts.get_all("Classifier") or [] if c.startswith("License")]
    text = " ".join(said)
    if text.strip() in ("", "UNKNOWN"):  # the wheels of ROS, whose package.xml says Apache-2.0 or BSD
        pytest.skip(f"{dependency} does not say")
    assert LICENCES.search(text) and not COPYLEFT.search(text.replace("LGPL", "")), f"{dependency}: {text!r}"


@pytest.mark.parametrize(
    ("stand_in", "status", "said"),
    [
        ("echo 'No known vulnerabilities found' >&2", 0, "no known holes in 2 packages, says osv"),
        ("echo 'numpy 1.0 CVE-1' >\"${@: -1}\"; exit 1", 1, "numpy 1.0 CVE-1"),
        ("echo 'Traceback ...' >&2; echo 'no such host' >&2; exit 1", 3, "NOT AUDITED: osv gave no answer"),
    ],
)
def test_an_audit_that_was_none_is_told_from_one(tmp_path: Path, stand_in: str, status: int, said: str) -> None:
    """pip-audit ends alike where it finds holes and where it reaches nobody."""
    for file, text in {
        "scripts/audit.sh": (ROOT / "scripts" / "audit.sh").read_text(),
        "scripts/setup.sh": "",
        ".venv/bin/python": "#!/bin/bash\n[[ $* == *freeze* ]] && echo numpy==1.0 && echo torch==2.13.0+cpu\nexit 0\n",
        ".venv/audit/bin/python": "#!/bin/bash\n",
        ".venv/audit/bin/pip-audit": f"#!/bin/bash\n{stand_in}\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
        (tmp_path / file).chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "scripts" / "audit.sh", "osv"], capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout + done.stderr
    assert ("no such host" in done.stderr) == (status == 3)
