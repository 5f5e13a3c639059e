"""`amint prepare`: writing a source as Parquet files, a Ray task each."""

from __future__ import annotations

import os
import time
from pathlib import Path, PurePath
from typing import Any

from amint_ray.config.data_schema import Data
from amint_ray.config.schema import Config
from amint_ray.contracts import RunError, UserError, Watcher, first_line
from amint_ray.data.preparing import (
    Output,
    Written,
    already_written,
    mark_finished,
    mark_unfinished,
    plan_fingerprint,
    plan_outputs,
    remove_drafts,
    sole_writer,
    write_output,
)
from amint_ray.data.quarantine import bad_fraction
from amint_ray.data.sources import Source, count, open_source
from amint_ray.launch.cluster import address_of, connect
from amint_ray.launch.knock import check_address
from amint_ray.storage import Location, locate, writable_folder


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
        and `seconds`; all but `seconds` is stored in the folder as `prepared.json`, which is there
        as long as all the files are.

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
    location = _destination(config.data, destination)
    watcher.phase(f"opening {config.data.source}")
    source = open_source(config.data)
    for note in source.notes:
        watcher.notice(f"data: {note}")
    outputs = plan_outputs(source, file_mib)
    fingerprint = plan_fingerprint(source, config.data, outputs)
    with sole_writer(location):
        written = already_written(location, outputs, fingerprint)
        resumed = len(written)
        if resumed:
            watcher.notice(f"{resumed} of {len(outputs)} files are there already")
        if resumed < len(outputs):
            mark_unfinished(location)
            remove_drafts(location, outputs)
            watcher.phase("starting Ray")
            try:
                with connect(address, verbose=verbose):
                    missing = [output for output in outputs if output.name not in written]
                    _write(config.data, source, missing, location, fingerprint, written, watcher)
            finally:  # tasks that were killed leave theirs
                remove_drafts(location, outputs)
        _check_enough(config.data, destination, written, source, location)
        document = _summary(config.data, destination, written, resumed, source)
        mark_finished(location, document)
    return document | {"seconds": time.perf_counter() - started}


def _destination(config: Data, destination: str) -> Location:
    """Where to write.

    Raises:
        UserError: not there, or it would mix with the source.
    """
    location = locate(destination, "DEST", seconds=config.timeout_seconds)
    if "://" not in destination:
        if Path(location.path).is_file():
            raise UserError(f"DEST = {destination!r}: is a file; name a folder")
        writable_folder(destination, "DEST")
    if config.source in ("folder", "parquet"):
        assert config.path is not None
        source = locate(config.path, "data.path", seconds=config.timeout_seconds)
        how = _overlap(location, source)
        if how is not None:
            raise UserError(
                f"DEST = {destination!r}: {how} the source, data.path={config.path}; what is "
                "written would mix with it: name a folder that is apart from it"
            )
    return location


def _overlap(destination: Location, source: Location) -> str | None:
    """What a destination has to do with a source; None: nothing."""
    remote = ["://" in place.uri for place in (destination, source)]
    if remote[0] != remote[1]:
        return None
    here, there = (
        PurePath(place.path if remote[0] else os.path.realpath(place.path))
        for place in (destination, source)
    )
    if here == there:
        return "is"
    if here.is_relative_to(there):
        return "lies in"
    return "holds" if there.is_relative_to(here) else None


def _write(
    config: Data,
    source: Source,
    missing: list[Output],
    location: Location,
    fingerprint: str,
    written: dict[str, Written],
    watcher: Watcher,
) -> None:
    """Write files on the cluster that is connected, adding to `written` what they hold.

    Raises:
        RunError: one could not be written.
    """
    import ray

    watcher.phase(f"writing {count(source):,} images")
    write = ray.remote(num_cpus=1)(write_output)
    shared = [ray.put(value) for value in (source, config)]
    waiting = {write.remote(*shared, output, location, fingerprint): output for output in missing}
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


def _check_enough(
    config: Data,
    destination: str,
    written: dict[str, Written],
    source: Source,
    location: Location,
) -> None:
    """Whether too much had to be left out; then nothing may look finished.

    Raises:
        UserError: so it is.
    """
    quarantine = _quarantine(written, source)
    bad = len(quarantine) - len(source.unreadable)
    if bad_fraction(source, bad / max(count(source), 1)) <= config.max_bad_fraction:
        return
    mark_unfinished(location)
    files = f" and {len(source.unreadable)} whole files" if source.unreadable else ""
    raise UserError(
        f"prepare: {bad:,} of {count(source):,}{files} cannot be used, more than "
        f"data.max_bad_fraction = {config.max_bad_fraction:g} allows; the first: "
        f"{quarantine[0][0]}: {quarantine[0][1]}; what could be used is in {destination}, "
        "mend the others, or allow more and run the command again to have it confirmed"
    )


def _quarantine(written: dict[str, Written], source: Source) -> list[tuple[str, str]]:
    """(Name, reason) of what was left out: whole files, then images."""
    files = [(file.name, file.reason) for file in source.unreadable]
    return files + [pair for name in sorted(written) for pair in written[name].quarantine]


def _summary(
    config: Data, destination: str, written: dict[str, Written], resumed: int, source: Source
) -> dict[str, Any]:
    """What was written."""
    quarantine = _quarantine(written, source)
    return {
        "source": config.source,
        "destination": destination,
        "files": len(written),
        "resumed": resumed,
        "count": sum(file.rows for file in written.values()),
        "classes": source.class_names,
        "quarantined": [{"sample_id": name, "reason": reason} for name, reason in quarantine],
    }
