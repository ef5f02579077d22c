"""Weights for other processes: a publisher in the trainer, subscribers where the model runs.

Read in this order. `publisher` and `subscriber` are the two public ends; `hosted` opens and closes both. `inbox` is
where a subscriber's versions arrive. On one machine, `sender` and `receiver` use `sockets`, and send what `description`
makes: an index of shared memory. On several, `stored` does the same with checkpoints in a storage. `signal` wakes tasks
when something has changed.
"""

from aiostage.weights.inbox import WeightVersion
from aiostage.weights.publisher import WeightPublisher
from aiostage.weights.sender import SubscriberInfo
from aiostage.weights.subscriber import WeightSubscriber

__all__ = ["SubscriberInfo", "WeightPublisher", "WeightSubscriber", "WeightVersion"]
