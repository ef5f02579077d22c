"""The state of the service in the text format of Prometheus, read off the supervisor at each scrape."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from supervisor import Supervisor

__all__ = ["render"]


class _Collector:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def collect(self) -> list[Metric]:
        supervisor = self._supervisor
        steps = GaugeMetricFamily("orchestrator_job_step", "Training steps done", labels=["job"])
        running = GaugeMetricFamily("orchestrator_job_running", "1 while the job trains", labels=["job"])
        restarts = CounterMetricFamily("orchestrator_job_restarts", "Times that it was started again", labels=["job"])
        age = GaugeMetricFamily(
            "orchestrator_job_last_commit_timestamp_seconds", "When the last checkpoint was committed", labels=["job"]
        )
        seconds = GaugeMetricFamily(
            "orchestrator_checkpoint_seconds", "Seconds from asking to a stage", labels=["job", "stage"]
        )
        delay = GaugeMetricFamily(
            "orchestrator_job_loop_delay_seconds", "How late the worker's event loop was at worst", labels=["job"]
        )
        for job in supervisor.jobs.values():
            steps.add_metric([job.name], job.step)
            running.add_metric([job.name], job.state == "running")
            restarts.add_metric([job.name], job.restarts)
            committed = [checkpoint for checkpoint in job.checkpoints if checkpoint.stage == "committed"]
            if committed:
                last = committed[-1]
                age.add_metric([job.name], last.at["committed"])
                begin = min(last.at.values())
                for stage in {"captured", "committed"} & last.at.keys():
                    seconds.add_metric([job.name, stage], last.at[stage] - begin)
            if job.delays:
                delay.add_metric([job.name], job.delays[-1][1])
        totals = CounterMetricFamily("orchestrator_checkpoints", "Checkpoints by how they ended", labels=["outcome"])
        totals.add_metric(["committed"], supervisor.committed)
        totals.add_metric(["failed"], supervisor.failed)
        watchers = GaugeMetricFamily("orchestrator_watchers", "Open event streams", value=len(supervisor.feed))
        return [steps, running, restarts, age, seconds, delay, totals, watchers]


def render(supervisor: Supervisor) -> bytes:
    """Return the metrics as text."""
    registry = CollectorRegistry()
    registry.register(_Collector(supervisor))
    return generate_latest(registry)
