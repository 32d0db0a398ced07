"""What a run cost: time, FLOPs, and an estimate of its energy; and all that it takes to build it once more.

Nothing here was measured with a meter. Energy is wall-clock time × the power of what was computed on: of an accelerator
the most that its maker names (`data/devices.toml`), of a CPU an assumed figure for each thread.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from groundup.report.format import is_number
from groundup.report.picture import format_seconds
from groundup.report.record import RunRecord, StageRecord

WATTS_A_THREAD = 10.0
"""Assumed: a core with its share of memory and board; a desktop's takes more, one of a large server less."""


def cost_rows(record: RunRecord) -> list[dict[str, Any]]:
    """Each stage that is done, evaluations as one: "name", "seconds", "flops", "kwh", "dollars"; None: not known."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in record.stages.values():
        if stage.seconds is not None:
            watts, price = _power(stage)
            flops = stage.summary.get("flops")
            name = stage.name.partition("/")[0]
            one = {
                "name": name,
                "seconds": stage.seconds,
                "flops": flops if is_number(flops) else None,
                "kwh": None if watts is None else watts * stage.seconds / 3.6e6,
                "dollars": None if price is None else price * stage.seconds / 3600,
            }
            rows[name] = _sum(name, (rows[name], one)) if name in rows else one
    return list(rows.values())


def total_cost(record: RunRecord) -> dict[str, Any]:
    """The sum of these rows."""
    return _sum("all", cost_rows(record))


def cost_table(record: RunRecord) -> dict[str, Any] | None:
    """The rows as text, their sum last, and how the energy was estimated; None before anything is done."""
    rows = cost_rows(record)
    if not rows:
        return None
    total = total_cost(record)
    devices = {device for stage in record.stages.values() if (device := _device_name(stage))}
    how = "Energy is estimated, not measured: time × " + (
        f"the most power that the maker of {' and '.join(sorted(devices))} names"
        if devices
        else f"{WATTS_A_THREAD:g} W for each CPU thread, an assumption"
    )
    return {
        "rows": [(row["name"], *cost_told(row)) for row in (*rows, total)],
        "how": f"{how}; cooling and idle time are not counted. FLOPs are those of training, by the model's shape; "
        "dollars are what such devices cost to rent (`data/devices.toml`).",
    }


def cost_told(row: dict[str, Any]) -> tuple[str, str, str]:
    """Time, FLOPs, energy and rent as text."""
    energy = "" if row["kwh"] is None else format_energy(row["kwh"])
    return (
        format_seconds(row["seconds"] or 0.0),
        "" if row["flops"] is None else f"{row['flops']:.2g}",
        energy if row["dollars"] is None else f"{energy}, ${row['dollars']:,.2f}",
    )


def outside_digests(record: RunRecord) -> list[tuple[str, str]]:
    """Digests of what each stage read from outside the run; of equal ones, one."""
    return [
        (f"{stage.name}, {what}", digest)
        for stage in record.stages.values()
        for what, digest in (stage.manifest.outside.items() if stage.manifest else ())
        if digest
    ]


def _sum(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: [row[key] for row in rows if row[key] is not None] for key in ("seconds", "flops", "kwh", "dollars")}
    return {"name": name, **{key: sum(values) if values else None for key, values in sums.items()}}


def format_energy(kwh: float) -> str:
    """`2.1 kWh`, `14 Wh`."""
    return f"{kwh:,.2g} kWh" if kwh >= 1 else f"{1000 * kwh:,.2g} Wh"


def _device_name(stage: StageRecord) -> str:
    return str(stage.manifest.environment.get("device", "")) if stage.manifest else ""


def _power(stage: StageRecord) -> tuple[float | None, float | None]:
    """Watts, and dollars an hour, of what a stage was computed on; None: an accelerator that the table has not."""
    made_on = stage.manifest.environment if stage.manifest else {}
    threads, processes = (float(n) if is_number(n := made_on.get(key)) else 1.0 for key in ("threads", "processes"))
    if not _device_name(stage):
        return processes * WATTS_A_THREAD * threads, None
    known = _device(_device_name(stage))
    return (None, None) if known is None else (processes * known["power"], processes * known["price"])


@functools.cache
def _device(name: str) -> dict[str, float] | None:
    """The entry of `data/devices.toml` all of whose parts stand in a device's name: "a100-80" in "A100-SXM4-80GB"."""
    table = tomllib.loads(resources.files("groundup").joinpath("data", "devices.toml").read_text(encoding="utf-8"))
    plain = name.lower().replace(" ", "")
    fitting = [known for known in table if all(part in plain for part in known.split("-"))]
    return table[max(fitting, key=len)] if fitting else None
