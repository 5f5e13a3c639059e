"""What a machine of the run does, every few seconds, in the names that MLflow uses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import psutil
import torch

_MEGABYTE = 1e6


class Machine:
    """This machine's processor, memory, disk, network and GPUs."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer means nothing
        self._network = psutil.net_io_counters()

    def values(self) -> dict[str, float]:
        """Percentages and megabytes; the network's since this object was made."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        network = psutil.net_io_counters()
        received = network.bytes_recv - self._network.bytes_recv
        sent = network.bytes_sent - self._network.bytes_sent
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "network_receive_megabytes": received / _MEGABYTE,
            "network_transmit_megabytes": sent / _MEGABYTE,
        }
        for gpu in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(gpu)
            values[f"gpu_{gpu}_memory_usage_megabytes"] = (total - free) / _MEGABYTE
            values[f"gpu_{gpu}_memory_usage_percentage"] = 100 * (total - free) / total
            with contextlib.suppress(ModuleNotFoundError):  # torch asks pynvml, which may be absent
                values[f"gpu_{gpu}_utilization_percentage"] = torch.cuda.utilization(gpu)
        return values


@contextlib.contextmanager
def watched(seconds: float, tell: Callable[[Mapping[str, float]], None]) -> Iterator[None]:
    """Tell what this machine does while the body runs.

    Args:
        seconds: between two looks.
        tell: is called in a thread of its own; what it raises ends the watch, not the run.
    """
    stop = threading.Event()

    def watch() -> None:
        machine = Machine()
        with contextlib.suppress(Exception):  # no figure of the machine is worth a run
            while not stop.wait(seconds):
                tell(machine.values())

    thread = threading.Thread(target=watch, daemon=True, name="machine")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
