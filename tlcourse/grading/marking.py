"""One submission from its bytes to its marks; what runs where is in :mod:`.attempt`."""

from __future__ import annotations

import json
from dataclasses import asdict

from tlcourse.grading import scoring
from tlcourse.grading.attempt import attempt
from tlcourse.grading.class_settings import Limits
from tlcourse.grading.plan import Plan
from tlcourse.grading.scoring import Outcome
from tlcourse.grading.submission import UnreadableError, parse


def make_job(plan: Plan, data: bytes, limits: Limits, walled: bool = True) -> bytes:
    """What a worker needs to run a submission; it holds no answer.

    Raises:
        UnreadableError: if the submission is not a notebook.
    """
    code = [cell for cell in parse(data).cells if cell.cell_type == "code"]
    cells = [
        {"check": plan.checks.get(cell.metadata.get("claims", ""), ""), "source": cell.source}
        for cell in code
    ]
    order = {
        "cells": cells,
        "questions": plan.asked,
        "inputs": plan.inputs,
        "preload": plan.preload,
        "walled": walled,
        "limits": asdict(limits),
    }
    return json.dumps(order).encode()


def mark(plan: Plan, data: bytes, limits: Limits, walled: bool = True) -> Outcome:
    """Grade one submission here and now.

    Raises:
        SandboxError: if there is no sandbox, or it fails.
    """
    try:
        job = make_job(plan, data, limits, walled)
    except UnreadableError as error:
        return scoring.unreadable(plan, str(error))
    return scoring.score(plan, json.loads(attempt(job)))
