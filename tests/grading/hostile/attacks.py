"""All attacks, by group."""

from __future__ import annotations

from tests.grading.hostile import honest, on_files, on_limits, on_marks, on_world
from tests.grading.hostile.scene import Attack

_parts = (on_limits, on_files, on_marks, on_world, honest)
ATTACKS: list[Attack] = sorted(
    (attack for part in _parts for attack in part.ATTACKS), key=lambda attack: attack.group
)
