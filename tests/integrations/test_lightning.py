from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_fabric.plugins.io import torch_io

import aiostage
from aiostage.integrations import lightning as integration
from aiostage.integrations.lightning import AiostageCheckpointIO, load_from_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

DATA = torch.utils.data.TensorDataset(
    torch.randn(64, 8, generator=torch.Generator().manual_seed(1)),
    torch.randn(64, 1, generator=torch.Generator().manual_seed(2)),
)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(8, 1)
        self.losses: list[float] = []

    def training_step(self, batch, index):
        loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def trainer(root: Path, plugin: AiostageCheckpointIO, epochs: int, **options):
    keep = ModelCheckpoint(root / "checkpoints", filename="{epoch}", save_top_k=2, monitor="epoch", mode="max")
    return lightning.Trainer(
        default_root_dir=root,
        max_epochs=epochs,
        accelerator="cpu",
        plugins=[plugin],
        callbacks=[keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loader():
    return torch.utils.data.DataLoader(DATA, batch_size=16)


class Epoch(lightning.Callback):
    """Gives ModelCheckpoint something to prefer later epochs by."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        pl_module.log("epoch", float(trainer.current_epoch))


def test_a_run_that_is_resumed_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    whole = Module()
    plugin = AiostageCheckpointIO()
    trainer(tmp_path / "whole", plugin, 6).fit(whole, loader())
    first = Module()
    begun = trainer(tmp_path / "parts", plugin, 3)
    begun.fit(first, loader())
    path = begun.checkpoint_callback.best_model_path
    assert Path(path, "manifest.json").is_file()
    second = Module()
    trainer(tmp_path / "parts", plugin, 6).fit(second, loader(), ckpt_path=path)
    assert first.losses + second.losses == whole.losses


def test_old_checkpoints_are_removed_and_the_files_are_ordinary(tmp_path: Path) -> None:
    module = Module()
    trainer(tmp_path, AiostageCheckpointIO(), 5).fit(module, loader())
    found = sorted((tmp_path / "checkpoints").iterdir())
    assert len(found) == 2
    from safetensors.torch import load_file

    weights = load_file(found[-1] / "model.safetensors")
    assert torch.equal(weights["state_dict.net.weight"], module.net.weight)


def test_a_failed_save_is_reported_at_the_end_at_the_latest(tmp_path: Path) -> None:
    plugin = AiostageCheckpointIO()
    blocked = tmp_path / "blocked"
    blocked.write_text("not a checkpoint")
    plugin.save_checkpoint({"weight": torch.ones(3)}, blocked)
    with pytest.raises(aiostage.CheckpointExistsError):
        plugin.teardown()
    plugin.save_checkpoint({"weight": torch.ones(3)}, tmp_path / "fine")
    assert torch.equal(plugin.load_checkpoint(tmp_path / "fine")["weight"], torch.ones(3))
    plugin.remove_checkpoint(tmp_path / "fine")
    plugin.teardown()
    assert not (tmp_path / "fine").exists()


def test_what_is_saved_may_change_at_once(tmp_path: Path) -> None:
    plugin = AiostageCheckpointIO()
    weight = torch.ones(1000)
    for number in range(5):
        plugin.save_checkpoint({"weight": weight}, tmp_path / str(number))
        weight += 1
    for number in range(5):
        assert plugin.load_checkpoint(tmp_path / str(number))["weight"][0] == number + 1
    assert plugin.load_checkpoint(tmp_path / "0", map_location="meta")["weight"].is_meta
    assert not plugin.load_checkpoint(tmp_path / "0", map_location=lambda storage, _: storage)["weight"].is_meta
    plugin.teardown()
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "x", storage_options={})


class Sized(Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.wide = torch.nn.Linear(width, 1)

    def validation_step(self, batch, index):
        self.log("loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))


def test_modules_are_made_of_checkpoints(tmp_path: Path) -> None:
    module = Sized(width=3)
    run = trainer(tmp_path, AiostageCheckpointIO(), 1)
    run.fit(module, loader())
    path = run.checkpoint_callback.best_model_path
    made = load_from_checkpoint(Sized, path)
    assert made.hparams.width == 3
    assert torch.equal(made.net.weight, module.net.weight)
    # Lightning's own files are read too.
    torch.save(aiostage.blocking.load(path), tmp_path / "theirs.ckpt")
    assert torch.equal(load_from_checkpoint(Sized, tmp_path / "theirs.ckpt").net.weight, module.net.weight)
    with pytest.raises(aiostage.CheckpointNotFoundError):
        load_from_checkpoint(Sized, tmp_path / "nothing")


def test_validating_a_checkpoint(tmp_path: Path) -> None:
    module = Sized(width=3)
    run = trainer(tmp_path, AiostageCheckpointIO(), 2)
    run.fit(module, loader())
    (after_training,) = run.validate(module, loader(), verbose=False)
    path = run.checkpoint_callback.best_model_path
    for ckpt_path in (path, "best"):
        (loaded,) = run.validate(module, loader(), ckpt_path=ckpt_path, verbose=False)
        assert loaded == after_training
    other = trainer(tmp_path / "other", AiostageCheckpointIO(), 2)
    (loaded,) = other.validate(Sized(width=3), loader(), ckpt_path=path, verbose=False)
    assert loaded == after_training


class OlderCheckpointIO(torch_io.TorchCheckpointIO):
    """As it is in Lightning 2.4."""

    def load_checkpoint(self, path, map_location=lambda storage, location: storage):
        return super().load_checkpoint(path, map_location)


def test_lightning_is_given_no_argument_that_its_older_releases_do_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"epoch": 3, "weight": torch.ones(2)}, tmp_path / "theirs.ckpt")
    monkeypatch.setattr(integration, "TorchCheckpointIO", OlderCheckpointIO)
    read = AiostageCheckpointIO().load_checkpoint(tmp_path / "theirs.ckpt", map_location="cpu")
    assert read["epoch"] == 3
    assert torch.equal(read["weight"], torch.ones(2))


def test_going_on_from_a_checkpoint_that_torch_wrote(tmp_path: Path) -> None:
    whole = Module()
    trainer(tmp_path / "whole", AiostageCheckpointIO(), 4).fit(whole, loader())
    keep = ModelCheckpoint(tmp_path / "theirs", filename="{epoch}", save_top_k=1, monitor="epoch", mode="max")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    first = Module()
    begun = lightning.Trainer(default_root_dir=tmp_path, max_epochs=2, callbacks=[keep, Epoch()], **options)
    begun.fit(first, loader())
    path = Path(begun.checkpoint_callback.best_model_path)
    assert path.is_file()
    second = Module()
    keep = ModelCheckpoint(tmp_path / "theirs", filename="{epoch}", save_top_k=1, monitor="epoch", mode="max")
    going_on = lightning.Trainer(
        default_root_dir=tmp_path,
        max_epochs=4,
        plugins=[AiostageCheckpointIO()],
        callbacks=[keep, Epoch()],
        **options,
    )
    going_on.fit(second, loader(), ckpt_path=path)
    assert first.losses + second.losses == whole.losses
    assert torch.equal(second.net.weight, whole.net.weight)
    plugin = AiostageCheckpointIO()
    plugin.remove_checkpoint(path)
    plugin.teardown()
    assert not path.exists()
    assert Path(going_on.checkpoint_callback.best_model_path, "manifest.json").is_file()
