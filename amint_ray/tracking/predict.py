"""What MLflow runs to ask a registered model; it needs mlflow, torch and numpy alone.

A copy of this file lies in the model's folder and is what `mlflow.pyfunc.load_model` and
`mlflow models serve` execute. It reads every other file of the folder once, compares it with
`hashes.json`, and unpickles nothing; docs/registered_model.md says what that is worth.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

WEIGHTS, CALIBRATION, PROGRAM = "model.safetensors", "calibration.safetensors", "program.pt2"
HASHES, PREPROCESSING = "hashes.json", "preprocessing.json"
SCORES = "membership_scores"

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TEXTS = {
    *("models/model.json", "archive_format", "archive_version", "byteorder"),
    *(".data/version", ".data/serialization_id"),
    *_CONFIGS,
}
_NO_SAMPLES = "data/sample_inputs/model.pt"


def read_checked(file: Path, expected: str) -> bytearray:
    """A file's bytes, once their SHA-256 is seen to be the expected one.

    Raises:
        ValueError: it is another.
        OSError: the file cannot be read.
    """
    content = bytearray(file.stat().st_size)
    with file.open("rb") as opened:
        read = opened.readinto(content)
    if read != len(content) or hashlib.sha256(content).hexdigest() != expected:
        raise ValueError(f"{file.name} is not what was registered: its SHA-256 is another")
    return content


def tensors_of(content: bytearray) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file: a length, a JSON header, then the numbers; no copies.

    Raises:
        ValueError: it is none.
    """
    try:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        data = torch.frombuffer(content, dtype=torch.uint8)[8 + length :]
        found = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = data[start:end].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        return found
    except (struct.error, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as bad:
        raise ValueError(f"no safetensors file: {bad}") from bad


def refuse_pickles(content: bytes | bytearray) -> None:
    """See that a `torch.export` archive has no entry that torch would unpickle.

    Of those that it may hold, only raw numbers and JSON are let through: no sample inputs, which
    are pickled, no weights (they lie in a file of their own), no tensors of classes of somebody's
    own, no TorchScript objects, no compiled code.

    Raises:
        ValueError: it has, or is no such archive.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise ValueError("it has two entries of one name")
            for name, entry in entries.items():
                number = name.removeprefix("data/constants/tensor_")
                plain = name in _TEXTS or (number != name and number.isdigit())
                if not plain and not (name == _NO_SAMPLES and entry.file_size == 0):
                    raise ValueError(f"its entry {name} may be a pickle")
            for name in _CONFIGS:
                for payload in json.loads(archive.read(entries[name]))["config"].values():
                    if payload["use_pickle"]:
                        raise ValueError(f"{name} names a pickle")
    except (zipfile.BadZipFile, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{PROGRAM} is no torch.export archive: {error}") from error
    except ValueError as error:
        raise ValueError(f"{PROGRAM} is refused: {error}") from error


def open_program(content: bytearray) -> torch.nn.Module:
    """The program of an archive without pickles.

    Raises:
        ValueError: it has some.
    """
    refuse_pickles(content)
    module: torch.nn.Module = torch.export.load(io.BytesIO(content)).module()
    return module


class AuditedModel(PythonModel):  # type: ignore[misc]  # MLflow has no types
    """An audited model as MLflow calls it."""

    def load_context(self, context: Any) -> None:
        """Read the folder that this file lies in.

        Raises:
            ValueError: a file is missing, or is not the one that was registered.
        """
        folder = Path(__file__).parent
        content = {}
        for name, expected in json.loads((folder / HASHES).read_text())["sha256"].items():
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing")
            content[name] = read_checked(folder / name, expected)
        self._weights = dict(sorted(tensors_of(content[WEIGHTS]).items()))
        self._calibration = tensors_of(content[CALIBRATION])[SCORES].numpy()
        self._program = open_program(content[PROGRAM])
        described = json.loads(content[PREPROCESSING])
        self._classes, self._code = len(described["class_names"]), described["code"]

    @torch.inference_mode()
    def predict(
        self,
        context: Any,
        model_input: np.ndarray,  # any other hint, or none, and MLflow warns
        params: dict[str, Any] | None = None,
    ) -> dict[str, npt.NDArray[Any]]:
        """What the model says of n images.

        Args:
            context: MLflow's; not used.
            model_input: (n, channels, height, width) uint8; or a dictionary with these as `images`
                and (n,) int64 `labels`, where the signature names both.
            params: none.

        Returns:
            `class_probabilities` (n, classes) float32; `membership_score` (n,) float32, the head's
            logit; `p_value` (n,) float64, which a model without a trained head has not. Of a head
            that says codes `code_logits` (n, bits) float32, and the score and p-value only if it
            says membership, too.
        """
        asked: Any = model_input
        given = asked if isinstance(asked, dict) else {"images": asked}
        inputs = [torch.from_numpy(np.array(given["images"], dtype=np.uint8))]
        if "labels" in given:
            inputs.append(torch.from_numpy(np.array(given["labels"], dtype=np.int64)))
        count = len(inputs[0])
        if any(len(values) != count for values in inputs):
            raise ValueError(f"there are {count} images and {len(inputs[1])} labels")
        if len(inputs) == 2 and not bool(((inputs[1] >= 0) & (inputs[1] < self._classes)).all()):
            raise ValueError(f"labels must be class indices from 0 to {self._classes - 1}")
        if count == 0:  # the program wants an image; what it says of this one is not passed on
            inputs = [torch.zeros(1, *x.shape[1:], dtype=x.dtype) for x in inputs]
        logits, membership = self._program(self._weights, *inputs)
        answer = {"class_probabilities": logits[:count].float().softmax(1).numpy()}
        said = membership[:count].float()
        if self._code is not None:
            bits = self._code["bits"]
            said, answer["code_logits"] = said[:, 0], said[:, said.shape[1] - bits :].numpy()
        if self._code is None or self._code["membership"]:
            answer["membership_score"] = said.numpy()
        if len(self._calibration):
            answer["p_value"] = p_values(answer["membership_score"], self._calibration)
        return answer


def p_values(
    scores: npt.NDArray[Any], calibration: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Conformal p-values against m sorted calibration scores: (1 + #{those ≥ score}) / (m + 1)."""
    below = np.searchsorted(calibration, scores.astype(np.float64), side="left")
    return (1 + len(calibration) - below) / (len(calibration) + 1)


if __name__ != "amint_ray.tracking.predict":
    # Python has just written a compiled copy beside this file: the folder stays as registered.
    with contextlib.suppress(OSError, NameError, TypeError):
        compiled = Path(__spec__.cached)  # type: ignore[arg-type]
        compiled.unlink()
        compiled.parent.rmdir()
    set_model(AuditedModel())
