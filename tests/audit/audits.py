"""Documents as an audit makes them, for the tests of what is made of them."""

from __future__ import annotations

import struct
import zlib
from typing import Any

HOSTILE = "a/<img src=x onerror=alert(1)>\"'&{{7*7}}.png"


def document(verdict: str = "member", *, images: int = 30, **changes: Any) -> dict[str, Any]:
    """An audit of so many images, of which one in five is a member and one cannot be read.

    Args:
        verdict: of the audit.
        images: how many.
        changes: keys to replace.
    """
    rows = [image(i) for i in range(images)]
    if images > 3:
        rows[3] |= {"duplicate_of": rows[2]["image"]}
    if images > 4:
        rows[4] = unreadable("folder/torn.png")
    unread = sum(row["problem"] is not None for row in rows)
    reasons = [
        {
            "code": "underpowered",
            "text": "The collection has 29 different images and 48 are needed.",
            "help": "More images of the same collection.",
        },
        {
            "code": "unlike",
            "text": "the suspects are unlike the calibration images",
            "help": "Suspects of the source that the model was trained on.",
        },
    ]
    return {
        "verdict": verdict,
        "p_value": 0.4321 if verdict == "not_member" else 1.234e-9,
        "alpha": 0.013,
        "fdr": 0.052,
        "prior": 0.11,
        "confidence": 0.96,
        "reasons": reasons if verdict == "no_verdict" else [],
        "reservations": [
            {"code": "confounders_unknown", "text": "Nobody has looked.", "help": "Look at it."}
        ],
        "share": figure(0.801, 0.702, 0.903)
        | {"of": "images that the head was told of", "by": "head"},
        "suspects": {
            "source": "s3://bucket/suspects",
            "images": images,
            "unique": max(0, images - unread - (images > 3)),
            "unreadable": unread,
            "left_out": {".heic files": 12, "hidden files": 1},
            "not_finite": 2,
            "labelled": images - unread,
            "flagged": sum(row["decision"] == "member" for row in rows),
        },
        "evidence": {
            "head": {
                "available": True,
                "why_not": None,
                "method": "MINT logit, conformal p-values",
                "p_value": 2.34e-8,
                "auc": {
                    "member": figure(0.931, 0.911, 0.951),
                    "withheld": figure(0.522, 0.471, 0.573),
                },
                "images": 28,
                "calibration_images": 468,
                "labels": None,
                "share": figure(0.801, 0.702, 0.903),
                "power": {"images_for_power": 5, "of": "member"},
                "shows": "That an image was told to the head as a member.",
                "cannot_show": "Training that was kept from the head.",
            },
            "outputs": {
                "available": True,
                "why_not": None,
                "method": "trained output attack",
                "labels": "mixed",
                "p_value": 0.0123,
                "auc": figure(0.641, 0.605, 0.677),
                "share": figure(0.55, 0.21, 0.89),
                "power": {"images_for_power": 48, "of": "withheld"},
                "shows": "That the model treats an image like those it was trained on.",
                "cannot_show": "Which of two near-duplicates was used.",
            },
        },
        "power": {"target": 0.95, "of": "withheld", "member": 5, "withheld": 48},
        "unlike": {
            "effect": figure(0.523, 0.481, 0.565),
            "limit": 0.58,
            "p_value": 0.314,
            "unlike": False,
        },
        "classes": {
            "distance": 0.123,
            "p_value": 0.00789,
            "collection_within": True,
            "images_within": False,
        },
        "lines": {
            "member": figure(0.931, 0.911, 0.951),
            "withheld": figure(0.522, 0.471, 0.573),
            "blind": figure(0.498, 0.452, 0.544),
            "loss": figure(0.632, 0.597, 0.667),
            "loss_member": figure(0.664, 0.631, 0.697),
        },
        "precision": {"prior": 0.11, "at_threshold": figure(0.953, 0.881, 0.991)},
        "model": {
            "uri": "models:/amint-digits/1",
            "registered": "1f" * 32,
            "digest": "0123456789abcdef" * 4,
            "run_id": "89abcdef" * 4,
            "manifest_fingerprint": "fedcba9876543210" * 4,
            "config_fingerprint": "76543210" * 4,
            "task_accuracy": figure(0.971, 0.952, 0.984),
            "calibration_images": 468,
        },
        "settings": {"alpha": 0.013, "labels": False},
        "seconds": {"decoding": 1.57, "scoring": 2.68},
        "made": "2026-11-27T11:32:05Z",
        "version": "amint_ray 0.1.0",
        "images": rows,
        **changes,
    }


def figure(value: float | None, low: float | None = None, high: float | None = None) -> Any:
    return {"value": value, "low": low, "high": high}


def image(i: int) -> dict[str, Any]:
    member = i % 5 == 0
    p = 0.0021 * (1 + i % 7) if member else (1 + 37 * i % 97) / 100
    return {
        "image": HOSTILE if i == 0 else f"folder/{'long_name_' * 9 if i == 5 else ''}{i:05}.png",
        "label": i % 10,
        "prediction": (i + (i == 1)) % 10,
        "class_name": f"digit {(i + (i == 1)) % 10}",
        "head_score": 4.0 - i / 100 if member else -i / 100,
        "outputs_score": 0.3,
        "p_head": p / 2,
        "p_outputs": min(1.0, p * 0.9),
        "p_value": p,
        "precision": 0.917 if member else 0.083,
        "decision": "member" if member else "undecided",
        "duplicate_of": None,
        "problem": None,
    }


def unreadable(name: str) -> dict[str, Any]:
    return dict.fromkeys(image(1)) | {
        "image": name,
        "decision": "undecided",
        "problem": "cannot be read: the file is truncated",
    }


def png(width: int = 8, shade: int = 128) -> bytes:
    """A square of one grey as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, width, 8, 0, 0, 0, 0)
    lines = (b"\0" + bytes([shade]) * width) * width
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
