"""Which columns of a Parquet file hold images and labels, and what is said where none does."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from amint_ray.contracts import UserError


@dataclass(frozen=True)
class Columns:
    """The columns that were asked for.

    Attributes:
        image: None: the only one that holds images.
        label: None: none is read.
        where: section of the configuration, for errors.
    """

    image: str | None
    label: str | None
    where: str

    def check(self, schema: pa.Schema, name: str) -> str:
        """The image column.

        Raises:
            UserError: a column is not there or is of another kind.
        """
        there = " ".join(", ".join(schema.names).split())
        if several := [n for n in (self.image, self.label) if schema.names.count(n) > 1]:
            raise UserError(
                f"{self.where}: {name} has several columns {several[0]!r}; give each a name of its "
                f"own; columns: {there}"
            )
        if self.label is not None:
            if self.label not in schema.names:
                raise UserError(
                    f"{self.where}: {name} has no column {self.label!r} "
                    f"({self.where}.label_column); it has: {there}"
                )
            kind = schema.field(self.label).type
            if not holds_indices(kind):
                raise UserError(
                    f"{self.where}: {name}: column {self.label!r} must hold class indices, it "
                    f"holds {kind}; name another with {self.where}.label_column=NAME, columns: "
                    f"{there}"
                )
        if self.image is None:
            found = [field.name for field in schema if _holds_images(field.type, struct_only=True)]
            if len(found) != 1 or schema.names.count(found[0]) != 1:
                if not any(_holds_images(kind, struct_only=False) for kind in schema.types):
                    raise UserError(
                        f"{self.where}: {name} holds no images: no column is of the form "
                        f"{{bytes, path}}, and none binary; columns: {there}"
                    )
                raise UserError(
                    f"{self.where}: {name} has {len(found)} columns of the form {{bytes, path}}; "
                    f"name one with {self.where}.image_column=NAME; columns: {there}"
                )
            return str(found[0])
        if self.image not in schema.names:
            raise UserError(
                f"{self.where}: {name} has no column {self.image!r} ({self.where}.image_column); "
                f"it has: {there}"
            )
        if not _holds_images(schema.field(self.image).type, struct_only=False):
            raise UserError(
                f"{self.where}: {name}: column {self.image!r} holds "
                f"{schema.field(self.image).type}, no encoded images; columns: {there}"
            )
        return self.image


def holds_indices(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold class indices."""
    return bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def _holds_images(kind: pa.DataType, *, struct_only: bool) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    return not struct_only and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
