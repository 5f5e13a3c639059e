"""The key in an audit. Only the driver ever has it: what the processes leave serves with any key.

They keep what the model says of codes, and what of each image its code is made from; which code
that is follows here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amint_ray.audit.by_key import CodedSuspects, judge_by_key
from amint_ray.audit.suspects import Settings
from amint_ray.audit.verdict import Judgement
from amint_ray.config.audit import AuditSettings
from amint_ray.contracts import UserError, Watcher
from amint_ray.data.keys import codes, key_fingerprint
from amint_ray.launch.attack_parts import read_arrays
from amint_ray.launch.audit_worker import CODE_CONTENT, CODE_LOGITS
from amint_ray.launch.codes import take_key
from amint_ray.storage import Location
from amint_ray.tracking.registered import RegisteredModel

_SHOWN = 16


def given_key(*, key_file: str | None, key_env: str | None) -> bytes | None:
    """The key that the user named; None: none was named.

    Raises:
        UserError: both were, or what was named is no key.
    """
    if key_file is None and key_env is None:
        return None
    if key_file is not None and key_env is not None:
        raise UserError("both --key-file and --key-env name a key; give one of them")
    if key_file == "" or key_env == "":
        option = "--key-file" if key_env is None else "--key-env"
        raise UserError(f"{option} is empty; give the name of what holds the key, or leave it out")
    return take_key(key_file=key_file, key_env=key_env)


def check_key(
    key: bytes | None,
    model: RegisteredModel,
    settings: AuditSettings,
    watcher: Watcher,
    *,
    uri: str,
) -> None:
    """See that this key can ask this model, and what can be asked without one.

    Args:
        key: as it was given.
        model: the audited one.
        settings: tell what else is asked.
        watcher: is told where the head cannot be asked.
        uri: of the model.

    Raises:
        UserError: it is another key, or none is needed, or there is nothing to ask without one.
    """
    code = model.preprocessing.code
    if key is not None and code is None:
        raise UserError(
            f"{uri}: its head learned no codes (mint.objective = binary, or "
            "loss.lambda_mint = 0), so a key asks it nothing; "
            "leave --key-file and --key-env out"
        )
    if key is not None and code is not None and key_fingerprint(key) != code.fingerprint:
        raise UserError(
            f"{uri}: it was trained with the key whose fingerprint begins with "
            f"{code.fingerprint[:_SHOWN]}, and that of the one given with "
            f"{key_fingerprint(key)[:_SHOWN]}; bring the key that belongs to it"
        )
    if key is None and code is not None and not code.membership:
        silent = f"{uri}: its head says secret codes alone, which give no p-value without their key"
        if settings.evidence == "head":
            raise UserError(
                f"{silent}; give --key-file, or leave audit.evidence=head out: then its outputs "
                "are looked at"
            )
        watcher.notice(f"{silent}: only its outputs are looked at; --key-file asks the head")


def judge_codes(
    place: Location,
    parts: Sequence[str],
    key: bytes,
    model: RegisteredModel,
    judged: Settings,
    lines: Mapping[str, Any],
) -> Judgement:
    """The verdict by the key, of what the processes left.

    Args:
        place: of the files.
        parts: their names.
        key: its bytes; `check_key` had nothing against it.
        model: the audited one.
        judged: how sure to be.
        lines: figures of the model that the document shows as they are.

    Raises:
        RunError: a file is damaged, or storage does not answer.
    """
    code = model.preprocessing.code
    assert code is not None
    assert model.reference is not None
    return judge_by_key(
        coded_suspects(place, parts, key, bits=code.bits),
        model.reference,
        judged,
        code=code,
        head="fixed" if model.model.architecture.head.fixed else "learned",
        lines=lines,
    )


def coded_suspects(
    place: Location, parts: Sequence[str], key: bytes, *, bits: int
) -> CodedSuspects:
    """What the processes left of all images that could be read, and their codes.

    Args:
        place: of the files.
        parts: their names.
        key: its bytes.
        bits: of a code.

    Raises:
        RunError: a file is damaged, or storage does not answer.
    """
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for name in parts:
        part = read_arrays(place, name)
        usable = part["problem"] == ""
        if not usable.any():
            continue
        label = part["label"][usable]
        prediction = part.get("prediction", np.full_like(label, -1))
        for column, values in (
            ("label", label),
            ("prediction", prediction),
            ("logits", part[CODE_LOGITS]),
            ("content", part[CODE_CONTENT]),
        ):
            columns.setdefault(column, []).append(values)
    content, logits, label, prediction = (
        np.concatenate(columns[name]) for name in ("content", "logits", "label", "prediction")
    )
    code = codes(key, [row.tobytes() for row in content], bits)
    return CodedSuspects(content, logits.astype(np.float64), code, label, prediction)
