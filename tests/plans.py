"""Plans with something changed."""

from dataclasses import replace
from typing import Any

from offload.scheduler.plan import Plan


def edited(plan: Plan, section: str, **changes: Any) -> Plan:
    return replace(plan, **{section: replace(getattr(plan, section), **changes)})
