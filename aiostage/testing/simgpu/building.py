"""Building the device once for each PyTorch, Python and source, outside of any checkout."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["UnavailableError", "build", "environment"]

_SOURCE = Path(__file__).parent / "source"
_ENTRY_POINTS = "[torch.backends]\ntorch_simgpu = torch_simgpu:autoload\n"
_METADATA = "Metadata-Version: 2.1\nName: torch-simgpu\nVersion: 0\n"
_LINES_OF_AN_ERROR = 5


class UnavailableError(Exception):
    """The device cannot be built on this machine. The message says why."""


def build() -> Path:
    """Build the device for the running interpreter and PyTorch, unless that was done before.

    Returns:
        The folder that has to be on ``sys.path`` of a process that is to have the device.

    Raises:
        UnavailableError: If there is no C++ compiler, PyTorch has an accelerator of its own, or its headers do not fit.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        raise UnavailableError("this PyTorch was built for GPUs, and has one kind of accelerator at a time")
    compiler = next((path for name in _compilers() if (path := shutil.which(name)) is not None), None)
    if compiler is None:
        raise UnavailableError(f"there is no C++ compiler: none of {', '.join(_compilers())} was found")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aiostage"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"simgpu-{_fingerprint(compiler)}"
    with (cache / "simgpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            # In a temporary directory, and renamed at the end: a build that was killed leaves no half of a device.
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / "made"
                _build_in(made, compiler)
                made.rename(folder)
    return folder


def environment(folder: Path, before: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return environment variables for a process that is to have the device.

    Args:
        folder: From :func:`build`.
        before: Those that it would have without.
    """
    path = [str(folder), *filter(None, [before.get("PYTHONPATH")])]
    return {**before, "PYTHONPATH": os.pathsep.join(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}


def _compilers() -> list[str]:
    return [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {compiler}".encode())
    for path in sorted(_SOURCE.rglob("*")):
        if path.suffix in (".cpp", ".hpp", ".py"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build_in(folder: Path, compiler: str) -> None:
    shutil.copytree(_SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include", folder]
    flags = ["-O0", "-fPIC", "-std=c++20", "-w", "-DTORCH_EXTENSION_NAME=_C", f"-I{sysconfig.get_path('include')}"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *(f"-I{path}" for path in includes)]
    libraries = torch_folder / "lib"
    links = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", f"-Wl,-rpath,{libraries}"]
    target = folder / "torch_simgpu/_C.so"
    _run([compiler, *flags, "-shared", str(folder / "module.cpp"), "-o", str(target), *links])
    information = folder / "torch_simgpu-0.dist-info"
    information.mkdir()
    (information / "entry_points.txt").write_text(_ENTRY_POINTS)
    (information / "METADATA").write_text(_METADATA)


def _run(command: list[str]) -> None:
    outcome = subprocess.run(command, check=False, capture_output=True, text=True)
    if outcome.returncode != 0:
        lines = [line for line in outcome.stderr.splitlines() if "error" in line][:_LINES_OF_AN_ERROR]
        raise UnavailableError(f"it does not build for PyTorch {torch.__version__}: {'; '.join(lines)}")
