"""`amint prepare`: writing a source as Parquet files, a Ray task each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from amint_ray.config.schema import Config
from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.data.preparing import (
    Written,
    already_written,
    plan_fingerprint,
    plan_outputs,
    write_output,
)
from amint_ray.data.sources import Source, count, open_source
from amint_ray.launch.cluster import address_of, check_address, connect
from amint_ray.storage import locate, writable_folder, write_atomically

SUMMARY = "prepared.json"


def prepare_data(
    config: Config, destination: str, *, file_mib: float, watcher: Watcher, verbose: bool
) -> dict[str, Any]:
    """Write the source of a configuration as Parquet files; go on where an earlier call stopped.

    Args:
        config: tells the source.
        destination: folder, local or `s3://`.
        file_mib: about how large a file is.
        watcher: is told how far it is.
        verbose: let Ray talk.

    Returns:
        `destination`, `files`, `resumed` (files that were there), `count`, `quarantined`, `classes`
        and `seconds`; all but `seconds` is stored in the folder as `prepared.json`.

    Raises:
        UserError: a mistake of the user's.
        RunError: a file could not be written.
    """
    if config.data.external.source is not None:
        raise UserError("prepare: one source at a time: leave data.external out")
    started = time.perf_counter()
    address = address_of(config.cluster)
    if address is not None:
        check_address(address)
    location = locate(destination, "DEST", seconds=config.data.timeout_seconds)
    if "://" not in destination:
        if Path(location.path).is_file():
            raise UserError(f"DEST = {destination!r}: is a file; name a folder")
        writable_folder(destination, "DEST")
    watcher.phase(f"opening {config.data.source}")
    source = open_source(config.data)
    for note in source.notes:
        watcher.notice(f"data: {note}")
    outputs = plan_outputs(source, file_mib)
    fingerprint = plan_fingerprint(source, config.data, outputs)
    written = already_written(location, outputs, fingerprint)
    resumed = len(written)
    if resumed:
        watcher.notice(f"{resumed} of {len(outputs)} files are there already")
    if resumed < len(outputs):
        watcher.phase("starting Ray")
        with connect(address, verbose=verbose):
            import ray

            watcher.phase(f"writing {count(source):,} images")
            write = ray.remote(num_cpus=1)(write_output)
            shared = [ray.put(value) for value in (source, config.data)]
            waiting = {
                write.remote(*shared, output, location, fingerprint): output
                for output in outputs
                if output.name not in written
            }
            while waiting:
                watcher.heartbeat()
                for task in ray.wait(list(waiting), timeout=0.5)[0]:
                    output = waiting.pop(task)
                    try:
                        written[output.name] = ray.get(task)
                    except ray.exceptions.RayError as error:
                        cause = first_line(getattr(error, "cause", error))
                        raise RunError(
                            f"prepare: {output.name}: {cause}; the same command goes on"
                        ) from error
                    done = sum(file.rows + len(file.quarantine) for file in written.values())
                    watcher.event({"phase": "read", "done": done, "total": count(source)})
    document = _summary(config, destination, written, resumed, source)
    return document | {"seconds": time.perf_counter() - started}


def _summary(
    config: Config,
    destination: str,
    written: dict[str, Written],
    resumed: int,
    source: Source,
) -> dict[str, Any]:
    """What was written, also into the folder; last, so that it stands for all of it.

    Raises:
        UserError: too much had to be left out.
    """
    quarantine = [(file.name, file.reason) for file in source.unreadable]
    quarantine += [pair for name in sorted(written) for pair in written[name].quarantine]
    most = config.data.max_bad_fraction * count(source)
    if len(quarantine) > most or (source.unreadable and not config.data.max_bad_fraction):
        raise UserError(
            f"prepare: {len(quarantine):,} of {count(source):,} cannot be used, more than "
            f"data.max_bad_fraction = {config.data.max_bad_fraction:g} allows; the first: "
            f"{quarantine[0][0]}: {quarantine[0][1]}; what could be used is in {destination}, "
            "mend the others, or allow more and run the command again to have it confirmed"
        )
    document = {
        "source": config.data.source,
        "destination": destination,
        "files": len(written),
        "resumed": resumed,
        "count": sum(file.rows for file in written.values()),
        "classes": source.class_names,
        "quarantined": [{"sample_id": name, "reason": reason} for name, reason in quarantine],
    }
    location = locate(destination, "DEST", seconds=config.data.timeout_seconds)
    with write_atomically(location, SUMMARY) as file:
        file.write(json.dumps(document, indent=2).encode())
    return document
