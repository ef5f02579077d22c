"""The model that the jobs train. It knows nothing of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call

__all__ = ["Digits", "Trainer", "evaluate"]

BATCH = 32


class Digits:
    """1,797 handwritten digits of 8 x 8 pixels; the last 360 of a fixed shuffle are held out."""

    def __init__(self) -> None:
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images = torch.tensor(digits.images, dtype=torch.float32)[order].flatten(1) / 16
        labels = torch.tensor(digits.target)[order]
        self.images, self.held_out_images = images[:-360], images[-360:]
        self.labels, self.held_out_labels = labels[:-360], labels[-360:]


def network(width: int) -> nn.Module:
    """Return an untrained network of two hidden layers."""
    return nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10))


class Trainer:
    """A model, its optimizer, and all else that decides how training goes on."""

    def __init__(self, digits: Digits, *, seed: int, width: int) -> None:
        torch.manual_seed(seed)
        self.digits = digits
        self.model = network(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        self.batches = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self) -> float:
        """Learn from one batch; return its loss."""
        chosen = torch.randint(len(self.digits.labels), (BATCH,), generator=self.batches)
        loss = nn.functional.cross_entropy(self.model(self.digits.images[chosen]), self.digits.labels[chosen])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.get_state(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.set_state(state["batches"])
        self.steps = state["steps"]


@torch.no_grad()
def evaluate(weights: dict[str, torch.Tensor], digits: Digits) -> tuple[float, float]:
    """Score weights where they lie: on the meta device the network is only its structure.

    Returns:
        Loss and accuracy on what was held out.
    """
    with torch.device("meta"):
        structure = network(len(weights["0.bias"]))
    guesses = functional_call(structure, weights, (digits.held_out_images,))
    loss = nn.functional.cross_entropy(guesses, digits.held_out_labels)
    return loss.item(), (guesses.argmax(dim=1) == digits.held_out_labels).float().mean().item()
