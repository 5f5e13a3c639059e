"""Bringing a spool's records to MLflow, in order, for as long as it takes.

Each record may be sent twice without harm: MLflow keeps one of two metrics that agree in name,
step, time and value; tags, status, files and inputs are what they were; and a model is registered
once for a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from amint_ray.contracts import first_line
from amint_ray.tracking.run_log import ATTEMPT, be_brief
from amint_ray.tracking.spool import Record, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

_METRICS_A_CALL = 500
"""MLflow takes 1,000, and a megabyte."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
"""Seconds before a record that did not arrive is sent again."""


class MLflowSender:
    """Tells one MLflow run what records say.

    Attributes:
        versions: of the registered models that came of it: the number by name.
    """

    def __init__(self, uri: str, spool: Spool) -> None:
        import mlflow

        be_brief()
        self.versions: dict[str, str] = {}
        self._spool = spool
        self._run_id = spool.run.run_id
        mlflow.set_tracking_uri(uri)  # the model's files go where this says
        self._client: MlflowClient = mlflow.MlflowClient(uri)
        self._known: dict[str, set[int]] | None = None

    def be_careful_if_stale(self) -> None:
        """Where the run went on elsewhere since, send only metrics that it lacks, and no status.

        Raises:
            Exception: MLflow's or the network's.
        """
        current = self._client.get_run(self._run_id).data.tags.get(ATTEMPT, "1")
        if int(current) > self._spool.run.attempt:
            self._known = {}

    def _lacking(self, record: Record) -> dict[str, float]:
        """A record's metrics that are to be sent."""
        values: dict[str, float] = record["values"]
        if self._known is None:
            return values
        for name in values.keys() - self._known.keys():
            points = self._client.get_metric_history(self._run_id, name)
            self._known[name] = {point.step for point in points}
        return {k: v for k, v in values.items() if record["step"] not in self._known[k]}

    def __call__(self, records: Sequence[Record]) -> int:
        """Send the first of these, and those behind it that go in the same call.

        Returns:
            How many were sent.

        Raises:
            Exception: whatever MLflow, the network or the disk does; nothing counts as sent then.
        """
        first = records[0]
        match first["kind"]:
            case "metrics":
                return self._metrics(list(takewhile(lambda r: r["kind"] == "metrics", records)))
            case "tags":
                self._tags(first)
            case "dataset":
                self._dataset(first)
            case "files":
                self._files(first)
            case "model":
                self._model(first)
            case "status":
                self._status(first)
            case kind:
                raise ValueError(f"a record of kind {kind!r}, of a newer version of amint_ray")
        return 1

    def _metrics(self, records: Sequence[Record]) -> int:
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        count = 0
        for record in records:
            if count and len(metrics) + len(record["values"]) > _METRICS_A_CALL:
                break
            count += 1
            metrics += [
                Metric(key, value, record["time"], record["step"])
                for key, value in self._lacking(record).items()
            ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _METRICS_A_CALL])
        return count

    def _tags(self, record: Record) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in record["values"].items()]
        self._client.log_batch(self._run_id, tags=tags)

    def _dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        fields: dict[str, Any] = record["fields"]
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self._run_id, datasets=[DatasetInput(Dataset(**fields), tags)])

    def _files(self, record: Record) -> None:
        folder = self._spool.folder_of(record)
        if folder.is_dir():  # it goes once all is sent
            self._client.log_artifacts(self._run_id, str(folder))

    def _model(self, record: Record) -> None:
        from amint_ray.tracking import registry
        from amint_ray.tracking.versions import mark_challenger

        version = registry.register(
            self._spool.folder_of(record),
            record["name"],
            run_id=self._run_id,
            tags=record["tags"],
            description=record["description"],
        )
        mark_challenger(self._client, record["name"], version)
        self.versions[record["name"]] = version

    def _status(self, record: Record) -> None:
        if self._known is not None:
            return
        if record["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, record["status"], record["time"])


class Delivery:
    """A daemon thread that sends a spool's records, and does not give up.

    What it meets is told by `news`, for whoever follows the run to read in a thread of his own.
    """

    def __init__(
        self, spool: Spool, sender: Callable[[Sequence[Record]], int], *, to: str = "MLflow"
    ) -> None:
        """Begin.

        Args:
            spool: its records.
            sender: sends the first of the records it is given, or more, and tells how many.
            to: what news call the other end.
        """
        self._spool, self._sender, self._to = spool, sender, to
        self._stop = threading.Event()
        self._news: list[str] = []
        self._failing_since: float | None = None
        self._reason = ""
        self._thread = threading.Thread(target=self._work, daemon=True, name="delivery")
        self._thread.start()

    @property
    def failing(self) -> tuple[float, str]:
        """For how many seconds nothing has arrived that was sent, and why."""
        since = self._failing_since
        return (0.0 if since is None else time.monotonic() - since), self._reason

    def say(self, text: str) -> None:
        """Add to the news."""
        self._news.append(text)

    def news(self) -> Iterator[str]:
        """What happened since this was asked last."""
        while self._news:
            yield self._news.pop(0)

    def stop(self, seconds: float) -> bool:
        """Send nothing more; waits so long for a call that is under way, and tells if it ended."""
        self._stop.set()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        pause = _SHORTEST_PAUSE
        while not self._stop.is_set():
            self._spool.wait_for_records(0.2)
            records = self._spool.waiting()
            if not records:
                continue
            try:
                count = self._sender(records)
            except Exception as error:  # whatever it is, what was to be sent must not be lost
                self._failed(first_line(error))
                self._stop.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self._spool.sent(count)
            pause = _SHORTEST_PAUSE
            if self._failing_since is not None:
                self._failing_since = None
                self._news.append(f"{self._to} takes records again")

    def _failed(self, reason: str) -> None:
        self._reason = reason
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            self._news.append(
                f"{self._to} takes no records ({reason}); they wait in {self._spool.folder}, "
                "and the run goes on"
            )
