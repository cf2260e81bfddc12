"""Builds the package for colcon (ament_python) and for pip.

The metadata stands here and not in pyproject.toml: ROS 2 Humble's setuptools (59) does not read that table.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

NAME = "sparserefine_ros"
SHARE = f"share/{NAME}"
HERE = Path(__file__).parent.resolve()


def shared_files(folder: str) -> list[tuple[str, list[str]]]:
    """Every file below `folder`, as (directory in the installation, files) pairs with relative paths."""
    rows: dict[str, list[str]] = {}
    for path in sorted((HERE / folder).rglob("*")):
        hidden = any(part.startswith((".", "__pycache__")) for part in path.relative_to(HERE).parts)
        if path.is_file() and not hidden:
            relative = path.relative_to(HERE)
            rows.setdefault(f"{SHARE}/{relative.parent.as_posix()}", []).append(relative.as_posix())
    return list(rows.items())


ROS_WHEELS = [  # one distribution, kilted, for machines where no ROS 2 environment is sourced
    "ros-rclpy[fastrtps]==9.1.2",
    "ros-sensor-msgs==5.5.1",
    "ros-std-msgs==5.5.1",
    "ros-std-srvs==5.5.1",
    "ros-lifecycle-msgs==2.3.0",
    "ros-diagnostic-msgs==5.5.1",
]
TEST = [
    "pytest>=7",
    "pytest-xdist>=3",
    "hypothesis>=6",
    "torchmetrics>=1",
    "scipy>=1.9",
    "selenium>=4.11",
]  # scipy: transformers' own Mask2Former; selenium: the report in a browser
LINT = ["ruff>=0.6", "mypy>=1.10"]
TRITON = ["triton>=3"]  # comes with the CUDA builds of torch for x86-64
BACKBONES = ["transformers>=5.23"]  # ResNet-50, ConvNeXt-L, SegFormer
ONNX = ["onnxruntime>=1.17", "onnx>=1.16"]  # with a GPU: onnxruntime-gpu in place of onnxruntime
TIMM = ["timm>=1"]  # encoders; needs the torchvision that fits torch
HUB = ["huggingface_hub>=0.23"]  # for downloads that are asked for
PEERS = ["spconv>=2.3"]  # to be measured beside ours

setup(
    name=NAME,
    version="0.1.0",
    description="SparseRefine semantic segmentation of camera images as a ROS 2 node",
    license="Apache-2.0",
    maintainer="SparseRefine ROS maintainers",
    maintainer_email="maintainers@sparserefine-ros.invalid",
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={
        NAME: ["py.typed"],
        f"{NAME}.evaluation": ["templates/*"],
        **{f"{NAME}.{room}": ["*.c", "*.h"] for room in ("native", "networks", "node", "segmenter", "sparse.backends")},
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.10",
    install_requires=[
        "setuptools",
        "numpy>=1.21",
        "opencv-python-headless>=4.5",
        "PyYAML>=5.4",
        "safetensors>=0.4",
        "torch>=2.4",
        "rosbags>=0.11",
        "matplotlib>=3.5",
        "rich>=11.2",
        "jinja2>=3",
    ],
    extras_require={
        "ros": ROS_WHEELS,
        "test": TEST,
        "lint": LINT,
        "triton": TRITON,
        "backbones": BACKBONES,
        "timm": TIMM,
        "onnx": ONNX,
        "hub": HUB,
        "peers": PEERS,
    },
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (SHARE, ["package.xml"]),
        *shared_files("launch"),
        *shared_files("config"),
        *shared_files("models"),
    ],
    entry_points={
        "console_scripts": [
            f"segment = {NAME}.node.main:main",
            f"sparserefine = {NAME}.cli:main",
        ],
    },
    zip_safe=False,
)
