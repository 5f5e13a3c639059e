"""amint_ray: image classifiers that can be asked what they were trained on.

`amint_ray.load(uri)` gives a registered model. Everything else is reached through the `amint`
command or the rooms below; importing this package imports none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amint_ray.tracking.registered import RegisteredModel
    from amint_ray.tracking.registry import load

__all__ = ["RegisteredModel", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch and timm take seconds to import; `amint --help` should not.
    if name == "load":
        from amint_ray.tracking.registry import load

        return load
    if name == "RegisteredModel":
        from amint_ray.tracking.registered import RegisteredModel

        return RegisteredModel
    raise AttributeError(f"module 'amint_ray' has no attribute {name!r}")
