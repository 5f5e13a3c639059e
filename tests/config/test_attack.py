"""What `amint attack` may be told: its own keys, and those that are the run's."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from amint_ray.config.attack import AttackSettings, load_attack
from amint_ray.contracts import UserError


def test_every_key_is_set_by_its_name_and_later_ones_win() -> None:
    told = {
        "shadows": 4,
        "shadow_loss": "plain",
        "compare_plain": False,
        "snapshots": True,
        "edits": False,
        "known": 20,
        "seed": 3,
        "gpus": 0.5,
        "retries": 0,
    }
    assert told.keys() == AttackSettings.model_fields.keys()
    assert not {key for key, value in told.items() if getattr(AttackSettings(), key) == value}
    overrides = ["attack.seed=9", *(f"attack.{key}={value}" for key, value in told.items())]
    settings, rest = load_attack(overrides)
    assert settings.model_dump() == told
    assert rest == []
    assert load_attack(["attack={shadows: 4, edits: false}", "attack.shadows=6"])[0] == (
        AttackSettings(shadows=6, edits=False)
    )


def test_the_rest_is_the_runs_and_passed_on_in_order() -> None:
    elsewhere = ["storage.path=s3://b/a", "data.path=attack.d", "attacks.seed=1", "nonsense"]
    settings, rest = load_attack([elsewhere[0], "attack.shadows=2", *elsewhere[1:]])
    assert (settings, rest) == (AttackSettings(shadows=2), elsewhere)
    assert load_attack([]) == (AttackSettings(), [])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("attack.shadow=3", "unknown key 'shadow' (value 3), did you mean 'shadows'"),
        ("attack.compare=false", "did you mean 'compare_plain'; keys at the top level: shadows,"),
        ("attack.shadows=1", "shadows = 1: models that trained on an image are compared with"),
        ("attack.shadows=-1", "shadows = -1: input should be greater than or equal to 0"),
        ("attack.shadows=100001", "shadows = 100001: input should be less than or equal to 100000"),
        ("attack.shadows=many", "shadows = 'many': input should be a valid integer"),
        ("attack.shadows.x=1", "shadows = {'x': 1}: input should be a valid integer"),
        ("attack.shadow_loss=none", "'none': input should be 'same' or 'plain'"),
        ("attack.known=9", "known = 9: input should be greater than or equal to 10"),
        ("attack.gpus=0", "gpus = 0: input should be greater than 0"),
        ("attack.gpus=1.5", "gpus = 1.5: input should be less than or equal to 1"),
        ("attack.retries=-1", "retries = -1: input should be greater than or equal to 0"),
        ("attack=3", "attack: input should be a mapping of keys to values"),
        ("attack.seed", "override 'attack.seed' is not of the form key.path=value"),
        ("attack.seed=", "seed = None: input should be a valid integer"),
        ("attack.seed=???", "override 'attack.seed=???' gives no value"),
        ("attack.seed=[1", "override 'attack.seed=[1': "),
    ],
)
def test_a_mistake_is_told_in_one_line(override: str, says: str) -> None:
    with pytest.raises(UserError) as told:
        load_attack([override])
    assert says in str(told.value)
    assert "\n" not in str(told.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        AttackSettings().seed = 3  # type: ignore[misc]
