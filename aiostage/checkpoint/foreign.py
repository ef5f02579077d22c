"""Checkpoints of other programs: what a file is, and reading those that need no code. Everything here blocks.

A file is recognized by its first bytes, a directory by its names. A directory with more
than one part is refused with the names of the others, so that nothing is left out silently.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from importlib import import_module
from pickle import UnpicklingError
from typing import Any

import torch

from aiostage.errors import CheckpointCorruptError, CheckpointError, listed
from aiostage.format.safetensors import DTYPES, HEADER_LENGTH_BYTES, MAX_HEADER_BYTES, METADATA, read_header

__all__ = ["DAMAGED_ARCHIVE", "Read", "merge_shards", "recognize", "refuse_chunks"]


@dataclass(frozen=True, slots=True)
class Read:
    """Reads a checkpoint of another program; called with whether its checksums are to be compared. Blocks.

    Attributes:
        kind: ``"torch"``, ``"safetensors"``, ``"shards"`` for an index of such files, or ``"dcp"``.
        path: The path of the file, or of the directory of a checkpoint of ``torch.distributed.checkpoint``.
        reads: What reads it.
        left_out: What the directory has besides that may be a part of the checkpoint: an optimizer beside weights, say.
        reads_all: What reads that too, for a message.
    """

    kind: str
    path: str
    reads: Callable[[str, bool], Any]
    left_out: Sequence[str] = ()
    reads_all: str = ""

    def __call__(self, verify: bool) -> Any:
        """Read all of it.

        Raises:
            CheckpointError: If something would be left out without a word.
        """
        self.refuse_part()
        return self.reads(self.path, verify)

    def refuse_part(self) -> None:
        """Raise a CheckpointError if this is not all of the checkpoint."""
        if self.left_out:
            part = os.path.join(self.path, _METADATA) if self.kind == "dcp" else self.path
            raise CheckpointError(
                f"it is a checkpoint of several parts; reading {os.path.basename(part)} would leave out "
                f"{listed(self.left_out)}.",
                path=os.path.dirname(part),
                remedy=f"Pass the path of each part, such as {part}{self.reads_all}.",
            )


DAMAGED_ARCHIVE = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    zlib.error,
)
"""What zipfile raises for a damaged archive. Damaged flags say that a member is encrypted or compressed in odd ways."""

_MAX_INDEX_BYTES = 100 << 20
_START_BYTES = 64
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa850")
"""A pickle of protocol 2, and in it the number that files of ``torch.save`` began with before they were archives."""

_OTHERS = (
    (b"GGUF", "a GGUF file", "Read it with the package gguf."),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "Read it with h5py, or with the Keras that has written it."),
    (b"\x93NUMPY", "an array of NumPy", "Read it with numpy.load()."),
    (b"\x80", "a pickle, which can run any code", "Read it with pickle.load() if you trust its author."),
)
_OTHER_DIRECTORIES = (
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed", "Make one file of it with zero_to_fp32.py, and load that."),
    ("_model_states.pt", "a part of a checkpoint of DeepSpeed", "Read it with deepspeed.utils.zero_to_fp32."),
    (".data-00000-of-00001", "a checkpoint of TensorFlow", "Read it with tensorflow.train.load_checkpoint()."),
    ("model_index.json", "a pipeline of several models of diffusers", "Pass one of its directories, such as its unet."),
    ("pytorch_model_fsdp_0", "a checkpoint of Accelerate, in parts", "Pass one of them, such as pytorch_model_fsdp_0."),
)
_STATES = (".safetensors", ".bin", ".pt", ".pth", ".pth.tar", ".ckpt", ".pkl", ".pickle", ".distcp")
"""How files end that may have a part of a checkpoint in them."""

_NO_PARTS = (
    *(".*", "__pycache__", "runs", "logs", "*_logs", "mlruns", "wandb"),
    *("checkpoint*", "step[-_0-9]*", "epoch[-_0-9]*", "iter[-_0-9]*"),
    *("original", "onnx*", "openvino*", "coreml*", "*.mlpackage", "*.mlmodelc"),
    *("metal", "mlx*", "gguf*", "ggml*", "tflite*"),
)
"""Directories beside weights that are none of their parts: caches and logs, checkpoints of their own, and the same
weights for other programs. Any other directory with such files is one: no list can name the parts of all programs.

No rule tells these either: ``checkpoint-500`` and a module of Sentence Transformers both have a configuration and
weights. The names are those that transformers 5.24, accelerate 1.15, Lightning 2.6, diffusers 0.42, PEFT 0.21, timm 1.0
and Sentence Transformers 6.2 write, and those of hubs."""

_MOST_DIRECTORIES = 1000
"""How many directories a part is looked for in, from the top down. A guess: a tree with more is a data set."""

_SAME_WEIGHTS = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "consolidated*.safetensors", "consolidated*.pth")
"""Files that hubs have beside ``model.safetensors``: the same weights for other programs."""

_TORCH_WEIGHTS = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin")
"""Files of ``torch.save`` that ``save_pretrained`` of transformers, diffusers and PEFT left before safetensors."""

_OTHER_PROGRAMS = ("openvino_*.bin", "ggml-*.bin", "open_clip_*.bin", "open_clip_*.safetensors")
"""The same weights, beside those of any name."""

_VARIANTS = [
    name.replace("VARIANT", variant)
    for variant in ("fp16", "bf16", "fp32")
    for name in ("{}.VARIANT{}", "{}.VARIANT-*-of-*{}", "{}-*-of-*.VARIANT{}")
]
"""How ``save_pretrained(variant=...)`` calls the same weights in another precision, by a file's usual name."""

_ARGUMENTS = "training_args.bin"

_READ_ALL = (
    ("trainer_state.json", "; Trainer.train(resume_from_checkpoint=...) of transformers reads all"),
    ("random_states_*.pkl", "; Accelerator.load_state() of accelerate reads all"),
    ("meta.pt", "; Trainer.fit(ckpt_path=...) of Lightning reads all"),
    ("modules.json", "; SentenceTransformer() reads all"),
)
"""By a file that they leave: what reads all parts."""

_SHARD = re.compile(r"-(\d+)-of-0*([2-9]|[1-9]\d+)\b")
"""What the name of one of several files has that are one set of weights."""

_CHUNKS = re.compile(rb'"DCP_SHARDING_INFO"|saved_offsets\\": ?\[[0, ]*[1-9]')
_CHUNKS_FILE = "shard-"
"""How files of chunks are called by ``HuggingFaceStorageWriter(save_distributed=True)``."""

_METADATA = ".metadata"
_SAFETENSORS = ".safetensors"
_INDEX = ".safetensors.index.json"
_TORCH_INDEX = ".bin.index.json"


def recognize(path: str) -> Read | None:
    """Find out what is at a path that is not a checkpoint of aiostage. Blocks.

    Returns:
        What reads it; None if there is nothing, or nothing that is known.

    Raises:
        CheckpointError: If it is known and cannot be read here, with what it is and what reads it.
        OSError: If the system refuses.
    """
    if os.path.isdir(path):
        return _recognize_directory(path, sorted(os.listdir(path)))
    return _recognize_file(path) if os.path.isfile(path) else None


def _recognize_directory(path: str, names: list[str]) -> Read | None:
    read = _recognize_main(path, names)
    if read is not None:
        return _with_rest(path, names, read)
    if "_CHECKPOINT_METADATA" in names or "manifest.ocdbt" in names:
        raise _cannot(path, "a checkpoint of Orbax", "Read it with orbax-checkpoint.")
    for ending, what, remedy in _OTHER_DIRECTORIES:
        if any(name.endswith(ending) for name in names):
            raise _cannot(path, what, remedy)
    if any(name.endswith(".distcp") for name in names):
        raise _cannot(path, "a distributed checkpoint without its .metadata, whose save did not end", None)
    return None


def _recognize_main(path: str, names: list[str]) -> Read | None:
    """Find out what is in a directory of what may be several files that can be read."""
    if _METADATA in names:
        return Read("dcp", path, _read_distributed)
    if any(_is_ours(os.path.join(path, name)) for name in names if name.endswith(_SAFETENSORS)):
        # Its manifest is missing, and with it the checksums and what was not a tensor: that is a loss to report.
        return None
    for ending in (_INDEX, _SAFETENSORS, _TORCH_INDEX):
        found = [name for name in names if name.endswith(ending)]
        if found:
            return _recognize_file(os.path.join(path, _one(path, found)))
    found = [name for name in _TORCH_WEIGHTS if name in names]
    return _recognize_file(os.path.join(path, found[0])) if found else None


def _with_rest(path: str, names: list[str], read: Read) -> Read:
    """Return what reads one of the parts of a directory, with the others."""
    main = _METADATA if read.kind == "dcp" else os.path.basename(read.path)
    stem = main.removesuffix(_INDEX).removesuffix(_TORCH_INDEX).removesuffix(_SAFETENSORS)
    beside = ["*.distcp"] if read.kind == "dcp" else [f"{escape(stem)}.bin", f"{escape(stem)}-*-of-*.bin"]
    beside += _variants(stem.removesuffix(_SAFETENSORS).removesuffix(".bin"))
    if stem == "model":
        beside += (*_SAME_WEIGHTS, *_variants("pytorch_model"))
    known = (escape(main), _ARGUMENTS, *beside, *_OTHER_PROGRAMS)
    shards = shards_of(read.path).values() if read.kind == "shards" else ()
    rest = [
        name
        for name in sorted(set(names).difference(shards))
        if (name.endswith(_STATES) or _has_states(os.path.join(path, name), name)) and not _matches(name, known)
    ]
    programs = (reads for pattern, reads in _READ_ALL if any(fnmatchcase(name, pattern) for name in names))
    return replace(read, left_out=rest, reads_all=next(programs, "")) if rest else read


def _variants(stem: str) -> list[str]:
    """Return patterns of the files with the same weights in another precision."""
    return [pattern.format(escape(stem), ending) for pattern in _VARIANTS for ending in (_SAFETENSORS, ".bin")]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _has_states(path: str, name: str) -> bool:
    """Return whether an entry is a directory with more of the checkpoint."""
    if _matches(name, _NO_PARTS) or not os.path.isdir(path):
        return False
    directories = [path]
    # It grows meanwhile: what is nearer comes first.
    for directory in directories:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.endswith(_STATES) and not _matches(entry.name, _OTHER_PROGRAMS):
                        return True
                    # Links below the entry are not followed: they may lead in a circle, or to all of the disk.
                    if entry.is_dir(follow_symlinks=False) and not _matches(entry.name, _NO_PARTS):
                        directories.append(entry.path)
        except (PermissionError, FileNotFoundError):
            # Such as lost+found, and what was removed meanwhile.
            continue
        del directories[_MOST_DIRECTORIES:]
    return False


def _is_ours(path: str) -> bool:
    """Return whether a file was written as a part of a checkpoint of aiostage."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(HEADER_LENGTH_BYTES + len(METADATA))[HEADER_LENGTH_BYTES:] == METADATA


def _one(path: str, names: list[str]) -> str:
    """Return the one name that there is, or the usual one among several."""
    for usual in ("model.safetensors", f"model{_INDEX}", f"pytorch_model{_TORCH_INDEX}"):
        if usual in names:
            return usual
    if len(names) > 1:
        others = [pattern for name in names for pattern in _variants(name.removesuffix(_SAFETENSORS))]
        names = [name for name in names if not _matches(name, others)]
    if all(name.startswith(_CHUNKS_FILE) for name in names) and len(names) > 1:
        raise _chunks(path)
    if len(names) > 1:
        raise _cannot(path, f"a directory with {len(names)} such files: {', '.join(names)[:200]}", "Pass one of them.")
    if names[0].endswith(_SAFETENSORS) and (shard := _SHARD.search(names[0])):
        what = f"a directory with file {int(shard[1])} of {shard[2]} of some weights, without their index ({_INDEX})"
        raise _cannot(path, what, f"Fetch the others, or pass {os.path.join(path, names[0])} to read what it has.")
    return names[0]


def _recognize_file(path: str) -> Read | None:
    if os.path.basename(path) == _METADATA:
        return Read("dcp", os.path.dirname(path), _read_distributed)
    if os.path.lexists(path) and not os.path.isfile(path):
        # open() would wait for the other end of a FIFO.
        link = f"a link to {os.readlink(path)}, which is not there" if _dangles(path) else "not a regular file"
        raise CheckpointCorruptError(f"it is {link}.", path=path)
    if path.endswith((_INDEX, _TORCH_INDEX)):
        return Read("shards", path, _read_shards)
    with open(path, "rb") as file:
        start = file.read(_START_BYTES)
        nbytes = os.fstat(file.fileno()).st_size
    if not nbytes:
        raise _cannot(path, "an empty file", None)
    if start.startswith(b"PK"):
        return _recognize_archive(path)
    if start.startswith(_LEGACY_TORCH):
        return Read("torch", path, _read_torch)
    length = int.from_bytes(start[:HEADER_LENGTH_BYTES], "little")
    if start[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + 1] == b"{" and length <= nbytes - HEADER_LENGTH_BYTES:
        return Read("safetensors", path, _read_safetensors)
    for magic, what, remedy in _OTHERS:
        if start.startswith(magic):
            raise _cannot(path, what, remedy)
    return None


def _dangles(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _recognize_archive(path: str) -> Read:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointCorruptError(f"it is an archive that cannot be opened: {error}.", path=path) from error
    if "constants.pkl" in names:
        raise _cannot(path, "a TorchScript module, which is code", "Read it with torch.jit.load().")
    if "archive_format" in names:
        raise _cannot(path, "an exported program, which is code", "Read it with torch.export.load().")
    if "data.pkl" in names:
        return Read("torch", path, _read_torch)
    if any(name.endswith(".npy") for name in names):
        raise _cannot(path, "an archive of arrays of NumPy", "Read it with numpy.load().")
    raise _cannot(path, "an archive, but not one of torch.save", None)


def _cannot(path: str, what: str, remedy: str | None) -> CheckpointError:
    return CheckpointError(f"it is {what}, and no checkpoint that can be read here.", path=path, remedy=remedy)


def _read_distributed(path: str, verify: bool) -> Any:
    # By name, because few need it.
    return import_module("aiostage.checkpoint.foreign_dcp").read_dcp(path)


def _read_torch(path: str, verify: bool) -> Any:
    """Read a file of ``torch.save``, those of Lightning among them, without running what it names."""
    if verify and zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except DAMAGED_ARCHIVE as error:
            raise CheckpointCorruptError(f"it is a damaged archive: {error}.", path=path) from error
        if damaged is not None:
            raise CheckpointCorruptError(
                f"{damaged!r:.80} in it does not match its checksum.",
                path=path,
                remedy="If it was saved with set_crc32_options(False), it has none: pass verify=False.",
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        name = str(error).partition("GLOBAL ")[2].split(" ")[0]
        raise CheckpointError(
            f"it is a file of torch.save that needs {name[:80] or 'more than data'}, which weights_only=True refuses.",
            path=path,
            remedy="If you trust the file, declare that by torch.serialization.add_safe_globals([...]), or read it "
            "with torch.load(weights_only=False).",
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # A damaged pickle may ask for anything.
        raise CheckpointCorruptError(f"it is a damaged file of torch.save: {error!r:.200}.", path=path) from error


def _read_safetensors(path: str, verify: bool) -> dict[str, torch.Tensor]:
    """Read all tensors of a file. The format has no checksums; its header is checked always."""
    with open(path, "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if length > min(MAX_HEADER_BYTES, nbytes - HEADER_LENGTH_BYTES):
            raise CheckpointCorruptError(f"its header is said to be {length} bytes long.", path=path)
        header = file.read(length)
        records = read_header(header, nbytes - HEADER_LENGTH_BYTES - length, path=path)
        refuse_chunks(header, path)
        found: dict[str, torch.Tensor] = {}
        for record in records:
            memory = bytearray(record.stop - record.start)
            if file.readinto(memory) != len(memory):
                raise CheckpointCorruptError("it ended while it was read.", path=path)
            if memory:
                tensor = torch.frombuffer(memory, dtype=torch.uint8)
            else:
                tensor = torch.empty(0, dtype=torch.uint8, device="cpu")
            found[record.name] = tensor.view(DTYPES[record.dtype]).view(record.shape)
    return found


def refuse_chunks(header: bytes, path: str) -> None:
    """Refuse a file in which tensors are chunks of others, as ranks write them that have saved together.

    Args:
        header: The header of a safetensors file.
        path: The path of the file.

    Raises:
        CheckpointError: If it is one.
    """
    found = set(_CHUNKS.findall(header))
    if b'"DCP_SHARDING_INFO"' not in found:
        return
    directory, name = os.path.split(path)
    if len(found) > 1 or (
        name.startswith(_CHUNKS_FILE) and sum(each.startswith(_CHUNKS_FILE) for each in os.listdir(directory)) > 1
    ):
        raise _chunks(path)


def _chunks(path: str) -> CheckpointError:
    return _cannot(
        path,
        "of chunks of tensors that several ranks have saved together",
        "Read all of them with torch.distributed.checkpoint.load() and a HuggingFaceStorageReader.",
    )


def shards_of(path: str) -> dict[str, str]:
    """Return for each tensor the file beside an index that has it. Blocks.

    Raises:
        CheckpointCorruptError: If it is not an index.
        OSError: If the system refuses.
    """
    try:
        if os.path.getsize(path) > _MAX_INDEX_BYTES:
            raise ValueError("it is too long")
        with open(path, "rb") as file:
            where: dict[str, str] = json.load(file)["weight_map"]
        shards = set(where.values())
        if not all(isinstance(name, str) and os.path.basename(name) == name and name[0] != "." for name in shards):
            raise ValueError("it names files outside of its directory")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointCorruptError(f"it is not an index of shards: {error!r:.200}.", path=path) from error
    return where


def merge_shards(path: str, load: Callable[[str], Any]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Put together what the files have that an index names, as hubs have them. Blocks.

    Args:
        path: The path of the index.
        load: Called with the path of each file; returns its tensors by name, or something else if it is no such file.

    Returns:
        The paths of the files, and the tensors by name.

    Raises:
        CheckpointCorruptError: If the files do not fit the index.
        Exception: What ``load`` raises.
    """
    where = shards_of(path)
    found: dict[str, torch.Tensor] = {}
    shards = {name: os.path.join(os.path.dirname(path), name) for name in sorted(set(where.values()))}
    for shard, file in shards.items():
        try:
            loaded = load(file)
        except FileNotFoundError:
            raise CheckpointCorruptError("the index names it, and it is missing.", path=file) from None
        if not isinstance(loaded, dict):
            raise CheckpointCorruptError("the index names it, and it has no tensors by name.", path=file)
        for name, tensor in loaded.items():
            # Several shards may have a tensor of one name. The index says which of them counts.
            if where.get(name, shard) == shard:
                if name in found:
                    raise CheckpointCorruptError(
                        f"another shard has {name!r:.80} too, and the index does not name it.", path=file
                    )
                found[name] = tensor
    missing = [name for name in where if name not in found]
    if missing:
        raise CheckpointCorruptError(f"it names {missing[0]!r:.80}, which its shard does not have.", path=path)
    return list(shards.values()), found


def _read_shards(path: str, verify: bool) -> dict[str, torch.Tensor]:
    """Read the files that an index names."""

    def load(file: str) -> Any:
        read = _recognize_file(file)
        return read(verify) if read is not None else None

    return merge_shards(path, load)[1]
