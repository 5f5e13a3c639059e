"""The first pass kept on disk or object storage: shared, interrupted, and used again."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from amint_ray.config.data_schema import Data
from amint_ray.contracts import RunError, first_line
from amint_ray.data.index import SCHEMA, Hashes, Index, chunks, examine_chunk, settle
from amint_ray.data.sources import Source
from amint_ray.storage import Location, list_files, open_input, write_atomically

_VERSION = 3
_AGAIN = b"amint_ray.again"
"""Key of the metadata of a part that serves the run which wrote it and is not used again."""
_BROKEN = (OSError, ValueError, pa.lib.ArrowException)  # what pyarrow raises for a damaged part
_LOOKS_AT_ONCE = 16


class IndexFolder:
    """Parts of an index, each written by whoever is free."""

    def __init__(
        self, storage: Location, source: Source, config: Data, hashes: Hashes = "roles"
    ) -> None:
        """Name the folder by all that the parts depend on.

        Args:
            storage: where indexes are kept; all readers must see it.
            source: what is indexed.
            config: tells what the parts depend on beside the source.
            hashes: which are wanted.
        """
        self._hashes: Hashes = hashes
        asked = [_VERSION, source.identity, config.max_megapixels, config.near_duplicates is None]
        if hashes != "roles":
            views = config.model_dump(include={"image_size", "crop_pct", "channels"})
            asked += [hashes, *sorted(views.items())]
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
        self.location = storage.below(f"indexes/{key}")
        self._chunks = chunks(source)
        self._rows = [sum(source.shards[s].rows for s in chunk) for chunk in self._chunks]

    def missing(self) -> list[int]:
        """Chunks to be examined: nobody did, or the part is damaged, or an image was absent.

        Raises:
            OSError: the folder cannot be listed.
        """
        there = {entry.name for entry in list_files(self.location, ".parquet")}
        everything = range(len(self._chunks))
        written = [chunk for chunk in everything if _name(chunk) in there]
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            good = list(pool.map(self._is_settled, written))
        settled = {chunk for chunk, is_good in zip(written, good, strict=True) if is_good}
        return [chunk for chunk in everything if chunk not in settled]

    def _is_settled(self, chunk: int) -> bool:
        try:
            with open_input(self.location, _name(chunk)) as file:
                footer = pq.read_metadata(file)
        except _BROKEN:
            return False
        return footer.num_rows == self._rows[chunk] and _AGAIN not in (footer.metadata or {})

    def rows(self, chunk: int) -> int:
        """How many images a chunk has."""
        return self._rows[chunk]

    def write(self, chunk: int, source: Source, config: Data) -> None:
        """Examine a chunk and keep what was found.

        Raises:
            OSError: a shard, or a file of it, cannot be read now; or the part not be written.
        """
        table = examine_chunk(source, self._chunks[chunk], config, self._hashes)
        if pc.any(table["passing"]).as_py():
            table = table.replace_schema_metadata({_AGAIN: b"an image could not be had"})
        with write_atomically(self.location, _name(chunk)) as file:
            pq.write_table(table, file, write_page_checksum=True)

    def read(self, source: Source, config: Data) -> Index:
        """All parts together; one that got damaged is made anew.

        Raises:
            UserError: nothing in the source can be used.
            RunError: storage does not answer.
        """
        try:
            with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
                everything = range(len(self._chunks))
                parts = list(pool.map(lambda c: self._read(c, source, config), everything))
        except OSError as error:
            raise RunError(f"data: cannot be read now: {first_line(error)}") from error
        return settle(source, parts, config)

    def _read(self, chunk: int, source: Source, config: Data) -> pa.Table:
        try:
            with (
                open_input(self.location, _name(chunk)) as opened,
                pq.ParquetFile(opened, page_checksum_verification=True) as file,
            ):
                table = file.read()
            if table.schema.equals(SCHEMA) and len(table) == self._rows[chunk]:
                return table
        except _BROKEN:
            pass
        return examine_chunk(source, self._chunks[chunk], config, self._hashes)


def _name(chunk: int) -> str:
    return f"part-{chunk:06d}.parquet"
