"""Images whose secret codes a model was taught, more or less well, and others."""

from __future__ import annotations

import dataclasses

import numpy as np
from audit.audit_population import Population

from amint_ray.audit.by_key import CodedSuspects
from amint_ray.data.keys import codes, image_content
from amint_ray.evaluation.keyed import matches
from amint_ray.evaluation.reference import Reference
from amint_ray.tracking.folder import Code

BITS = 16
CODE = Code(fingerprint="ab" * 32, code_from="content", bits=BITS, membership=False)


def suspects(
    rng: np.random.Generator, *, members: int, others: int, memory: float = 2.0, key: bytes = b""
) -> CodedSuspects:
    """A collection that begins with its members.

    Args:
        rng: draws all of it.
        members: how many.
        others: how many.
        memory: how far the logit of a member's bit leans to its code.
        key: of the codes; another one each time, if it is empty.
    """
    n = members + others
    pixels = rng.integers(0, 256, (n, 1, 4, 4), np.uint8)
    content = [image_content(image) for image in pixels]
    code = codes(key or rng.bytes(32), content, BITS)
    # Some bits the model is always surer of, and some it always calls 1, as a model may.
    logits = rng.normal(size=(n, BITS)) * rng.gamma(1.0, size=BITS) + rng.normal(size=BITS)
    logits[:members] += memory * (2.0 * code[:members] - 1)
    return CodedSuspects(
        content=np.stack([np.frombuffer(each, np.uint8) for each in content]),
        logits=logits,
        code=code,
        label=np.full(n, -1),
        prediction=rng.integers(0, 4, n),
    )


def reference(rng: np.random.Generator, *, members: int = 200, memory: float = 2.0) -> Reference:
    """What is kept of so many members, of withheld images that were taught, and of others."""
    drawn = Population().reference(rng, calibration=20, member=members, withheld=members)
    taught = suspects(rng, members=2 * members, others=20, memory=memory)
    found = matches(taught.logits, taught.code)
    of_roles = {
        "calibration": found[-20:],
        "member": found[:members],
        "withheld": found[members:-20],
    }
    sorted_ = {role: np.sort(matched) for role, matched in of_roles.items()}
    return dataclasses.replace(drawn, code_matches=sorted_)


def some(of: CodedSuspects, rows: np.ndarray | slice) -> CodedSuspects:
    """Rows of a collection, in any order and number."""
    return CodedSuspects(**{name: values[rows] for name, values in vars(of).items()})
