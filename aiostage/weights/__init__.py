"""Weights for other processes: a publisher in the trainer, subscribers wherever the model runs."""

from aiostage.weights.inbox import WeightVersion
from aiostage.weights.publisher import WeightPublisher
from aiostage.weights.sender import SubscriberInfo
from aiostage.weights.subscriber import WeightSubscriber

__all__ = ["SubscriberInfo", "WeightPublisher", "WeightSubscriber", "WeightVersion"]
