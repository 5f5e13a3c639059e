"""What a machine of the run does, every few seconds, in the names that MLflow uses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import psutil
import torch

_MEGABYTE = 1e6


class Machine:
    """This machine's processor, memory, disk and network."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer means nothing
        self._network = psutil.net_io_counters()

    def values(self) -> dict[str, float]:
        """Percentages and megabytes; the network's since this object was made."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
        network = psutil.net_io_counters()
        received = network.bytes_recv - self._network.bytes_recv
        sent = network.bytes_sent - self._network.bytes_sent
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_megabytes": disk.used / _MEGABYTE,
            "disk_usage_percentage": disk.percent,
            "network_receive_megabytes": received / _MEGABYTE,
            "network_transmit_megabytes": sent / _MEGABYTE,
        }


def gpu_values(device: torch.device, number: int) -> dict[str, float]:
    """Of the one GPU that a worker has.

    Args:
        device: it, as torch calls it in this process.
        number: what to call it, unique on the machine.
    """
    free, total = torch.cuda.mem_get_info(device)
    values = {
        f"gpu_{number}_memory_usage_megabytes": (total - free) / _MEGABYTE,
        f"gpu_{number}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(ModuleNotFoundError):  # torch asks pynvml, which may be absent
        values[f"gpu_{number}_utilization_percentage"] = torch.cuda.utilization(device)
    return values


@contextlib.contextmanager
def watched(
    seconds: float,
    tell: Callable[[Mapping[str, float]], None],
    *,
    device: torch.device,
    local_rank: int,
) -> Iterator[None]:
    """Tell what this worker's GPU, and by its first worker this machine, do while the body runs.

    Args:
        seconds: between two looks; 0: never.
        tell: is called in a thread of its own; what it raises ends the watch, not the run.
        device: of this worker.
        local_rank: which of the machine's workers it is.
    """
    if not seconds or (local_rank != 0 and device.type != "cuda"):
        yield
        return
    stop = threading.Event()

    def watch() -> None:
        with contextlib.suppress(Exception):  # no figure of the machine is worth a run
            machine = Machine() if local_rank == 0 else None
            while not stop.wait(seconds):
                values = {} if machine is None else machine.values()
                if device.type == "cuda":
                    values |= gpu_values(device, local_rank)
                tell(values)

    thread = threading.Thread(target=watch, daemon=True, name="machine")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
