from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import aiostage
from aiostage import dcp
from aiostage_command import main
from tests.patience import seconds


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tied = torch.ones(3)
    state: dict[str, Any] = {
        "step": 3,
        "model": {"weight": torch.zeros(2, 4, dtype=torch.bfloat16), "layers": [tied, tied]},
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "text": "x" * 1000,
        "bytes": b"abc",
        "sparse": torch.eye(3).to_sparse(),
    }
    state["itself"] = state
    return asyncio.run(aiostage.save(state, tmp_path / "checkpoint")).path


def damage(checkpoint: Path, offset: int = -1) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(b"\x7f")


def test_inspect(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{checkpoint}: 5 tensors, 96 B"
    assert re.match(r"  model.safetensors +4\.1 KiB +5 tensors  xxh3_64:[0-9a-f]{16}$", shown[1])
    assert shown[2:] == [
        "",
        ".: dict of 7",
        "step = 3",
        "model: dict of 2",
        "model.weight: tensor BF16 (2, 4) 16 B",
        "model.layers: list of 2",
        "model.layers.0: tensor F32 (3,) 12 B",
        "model.layers.1 is model.layers.0",
        "parameter: Parameter F32 (2,) 8 B",
        "text = '" + "x" * 58 + "…",
        "bytes: bytes 'YWJj'",
        "sparse: sparse [3, 3]",
        "itself is .",
    ]
    assert main(["inspect", "--files", str(checkpoint)]) == 0
    assert capsys.readouterr().out.splitlines() == shown[:2]


def test_inspect_spells_keys_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys: list[Any] = [1, None, 1.5, (1, "a"), b"raw", 10**30, torch.float32, frozenset((1,)), ((1,),)]
    path = asyncio.run(aiostage.save(dict.fromkeys(keys, 0), tmp_path / "keys")).path
    assert main(["inspect", str(path)]) == 0
    shown = [line.removesuffix(" = 0") for line in capsys.readouterr().out.splitlines()[4:]]
    assert shown[:7] == ["1", "None", "1.5", "(1, 'a')", "b'raw'", str(10**30), "torch.float32"]
    assert [re.sub(r"\d+", "N", line) for line in shown[7:]] == ["<frozenset N>", "<tuple N>"]


def test_inspect_reads_no_elements(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 3 << 23
    path = asyncio.run(aiostage.save({"a": torch.zeros(size, dtype=torch.uint8)}, checkpoint.parent / "large")).path
    damage(path)
    assert main(["inspect", str(path)]) == 0
    assert f"a: tensor U8 ({size},) 24.0 MiB" in capsys.readouterr().out


def test_verify(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(checkpoint), str(checkpoint), "--progress"]) == 0
    shown = capsys.readouterr()
    whole = f"{checkpoint}: 1 file, 4,192 bytes, all as they were written\n"
    assert shown.out == whole * 2 + "2 checkpoints: 2 whole\n"
    assert "verifying checkpoint: 100%" in shown.err
    damage(checkpoint)
    assert main(["verify", str(checkpoint)]) == 1
    shown = capsys.readouterr()
    assert not shown.err
    assert shown.out.splitlines() == [
        f"{checkpoint}: damaged",
        "  model.safetensors: bytes 0 to 4192 do not match their checksum.",
        "    touches sparse, parameter, model.layers.0, model.weight",
    ]


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_what_is_no_checkpoint(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 3
    assert main([command, "--json", str(tmp_path / "nowhere")]) == 3
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 2
    assert (
        shown.err.splitlines(keepends=True)[0]
        == f"aiostage {command}: {tmp_path / 'nowhere'}: there is no checkpoint, and none below it.\n"
    )


async def make_run(root: Path) -> None:
    tower, adapter = torch.arange(1_000_000), torch.zeros(1000)
    async with aiostage.Checkpointer(root / "lora", incremental=True, keep=2) as checkpoints:
        for step in range(4):
            adapter.add_(1)
            await (await checkpoints.save(step, {"adapter": adapter, "tower": tower})).committed()
    await aiostage.save({"a": 1}, root / "best")


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(make_run(tmp_path))
    lora = tmp_path / "lora"
    removed = "removed; other checkpoints still refer to its files"
    assert {path.name for path in lora.iterdir()} == {
        "step-00000000",
        "step-00000000.removed",
        "step-00000002",
        "step-00000003",
    }
    assert main(["inspect", str(lora)]) == 0
    line = "2 tensors     7.6 MiB  incremental, 653.3 KiB of its own, refers to step-00000000"
    listed = capsys.readouterr().out
    assert re.sub(r"\d+ s ", "0 s ", listed).splitlines() == [
        f"{lora}: 2 checkpoints",
        f"  step-00000002                 0 s        {line}",
        f"  step-00000003                 0 s        {line}",
        f"  step-00000000            {removed}",
    ]
    assert main(["ls", str(lora)]) == 0
    assert re.sub(r"\d+ s ", "0 s ", capsys.readouterr().out) == re.sub(r"\d+ s ", "0 s ", listed)
    # From further above, and through a URL.
    assert main(["inspect", f"file://{tmp_path}"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "best",
        "lora/step-00000002",
        "lora/step-00000003",
        "lora/step-00000000",
    ]
    assert main(["inspect", "--files", str(lora / "step-00000003")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{lora}/step-00000003: 2 tensors, 7.6 MiB"
    assert shown[2:] == [
        "       7.0 MiB in step-00000000/model.safetensors",
        "     652.4 KiB in model.safetensors.00001",
    ]
    for name in ("step-00000000", "step-00000000.removed"):
        assert main(["inspect", str(lora / name)]) == 3
        assert capsys.readouterr().err == f"aiostage inspect: {lora / name}: it was {removed}.\n"


def test_verifying_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(make_run(tmp_path))
    lora = tmp_path / "lora"
    assert main(["verify", str(lora)]) == 0
    whole = "1 file, 8,008,096 bytes, all as they were written"
    lines = [f"{lora}/step-00000002: {whole}", f"{lora}/step-00000003: {whole}", "2 checkpoints: 2 whole"]
    assert capsys.readouterr().out.splitlines() == lines
    # As a shell says step-*.
    assert main(["verify", *sorted(str(path) for path in lora.iterdir())]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[2:] == lines
    assert all(line.endswith("removed; other checkpoints still refer to its files") for line in shown[:2])
    # References are followed.
    damage(lora / "step-00000000", 3_000_000)
    assert main(["verify", str(lora)]) == 1
    damaged = "  model.safetensors: bytes 0 to 8008096 do not match their checksum."
    damaged += " (stored in step-00000000/model.safetensors)"
    assert capsys.readouterr().out.splitlines() == [
        f"{lora}/step-00000002: damaged",
        damaged,
        "    touches tower, adapter",
        f"{lora}/step-00000003: damaged",
        damaged,
        "    touches tower, adapter",
        "2 checkpoints: 0 whole, 2 damaged, with 4 tensors touched",
    ]
    (lora / "step-00000003" / "manifest.json").write_text("{}")
    assert main(["inspect", str(lora)]) == 1
    assert "step-00000003/manifest.json: it is not a manifest" in capsys.readouterr().out


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--mebibytes", "1", "--tensors", "3", "--rounds", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("3 tensors, 1 MiB in host memory")
    assert [line[:30].rstrip() for line in shown[1:-1]] == [
        "plain copy into warm memory",
        "first staging",
        "later stagings",
        "save to disk",
        "load in place, verified",
    ]
    for line in shown[1:-1]:
        assert re.search(r"\d+\.\d ms +\d+\.\d\d GB/s   worst \d+\.\d ms$", line)


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["bench", "--rounds", "0"], ["unknown"]])
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: aiostage" in capsys.readouterr().err


def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "aiostage", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=seconds(60), check=False, **options)


@pytest.mark.slow
def test_the_reader_of_the_output_is_gone(tmp_path: Path) -> None:
    path = asyncio.run(aiostage.save([f"value {number}" * 5 for number in range(5000)], tmp_path / "many")).path
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as broken:
        outcome = run("inspect", path, stdout=broken)
    assert (outcome.returncode, outcome.stderr) == (141, b"")


@pytest.mark.slow
def test_output_that_the_shell_has_closed(checkpoint: Path) -> None:
    line = f'exec "{sys.executable}" -m aiostage verify "$0" >&-'
    found = subprocess.run(["sh", "-c", line, checkpoint], stderr=subprocess.PIPE, timeout=seconds(60), check=False)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.slow
def test_what_the_terminal_cannot_show(tmp_path: Path) -> None:
    path = asyncio.run(aiostage.save({"Höhe": 1, "\ud800": torch.ones(1)}, tmp_path / "odd")).path
    for encoding, height in (("ascii", b"H\\xf6he"), ("utf-8", "Höhe".encode())):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        outcome = run("inspect", path, stdout=subprocess.PIPE, env=environment)
        assert outcome.stdout.splitlines()[-2:] == [height + b" = 1", b"\\ud800: tensor F32 (1,) 4 B"]
        assert outcome.returncode == 0


def test_a_checkpoint_of_many_ranks_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        saving = dcp.save(
            {"a": torch.ones(1)}, checkpoint_id="one", storage_writer=dcp.StorageWriter(tmp_path), no_dist=True
        )
        asyncio.run(saving)
    for command in (["verify", str(tmp_path / "one")], ["verify", str(tmp_path)], ["inspect", str(tmp_path / "one")]):
        assert main(command) == 0
        assert f"{tmp_path / 'one'}: " in capsys.readouterr().out
    with pytest.raises(aiostage.CheckpointCorruptError, match=r"it is of a checkpoint of aiostage\.dcp"):
        asyncio.run(aiostage.load(tmp_path / "one"))


def test_as_a_program(checkpoint: Path) -> None:
    damage(checkpoint)
    outcome = subprocess.run(
        [sys.executable, "-m", "aiostage", "verify", str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=seconds(60),
        check=False,
    )
    assert outcome.returncode == 1
    assert "do not match their checksum" in outcome.stdout
