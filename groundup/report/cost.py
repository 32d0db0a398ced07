"""What a run cost: time, FLOPs, and an estimate of its energy.

Nothing here was measured with a meter. Energy is wall-clock time × the power of what was computed on: of an accelerator
the most that its maker names (`data/devices.toml`), of a CPU an assumed figure for each thread.
"""

from __future__ import annotations

from typing import NamedTuple

from groundup.environment import device_table
from groundup.report.format import is_number
from groundup.report.picture import format_seconds
from groundup.report.record import RunRecord, StageRecord

WATTS_A_THREAD = 10.0
"""Assumed: a core with its share of memory and board; a desktop's takes more, one of a large server less."""
HOW = (
    "Energy is estimated, not measured: time × power, cooling and idle time not counted. The power of a CPU is assumed "
    f"to be {WATTS_A_THREAD:g} W for each thread; that of an accelerator is the most that its maker names, and dollars "
    "are what such a one costs to rent. FLOPs are those of training, by the model's shape."
)


class Cost(NamedTuple):
    """Of a stage, or of several; 0 where it is not known."""

    seconds: float = 0.0
    flops: float = 0.0
    kwh: float = 0.0
    dollars: float = 0.0

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        """Both together."""
        return Cost(*map(sum, zip(self, other, strict=True)))

    def told(self) -> tuple[str, str, str]:
        """As text: time, FLOPs, energy and rent."""
        energy = f"{self.kwh:,.2g} kWh" if self.kwh >= 1 else f"{1000 * self.kwh:,.2g} Wh" if self.kwh else ""
        rent = f", ${self.dollars:,.2f}" if self.dollars else ""
        return format_seconds(self.seconds), f"{self.flops:.2g}" if self.flops else "", energy + rent


def costs(record: RunRecord) -> dict[str, Cost]:
    """Of each stage that is done, evaluations as one; "all" last."""
    found = {"all": Cost()}
    for stage in record.stages.values():
        if stage.seconds is not None:
            watts, price = _power(stage)
            flops, hours = stage.summary.get("flops"), stage.seconds / 3600
            one = Cost(stage.seconds, flops if is_number(flops) else 0.0, watts * hours / 1000, price * hours)
            for name in (stage.name.partition("/")[0], "all"):
                found[name] = found.get(name, Cost()) + one
    return {**found, "all": found.pop("all")} if len(found) > 1 else {}


def _power(stage: StageRecord) -> tuple[float, float]:
    """Watts, and dollars an hour, of what a stage was computed on; 0: not known."""
    made_on = stage.manifest.environment if stage.manifest else {}
    threads, processes = (float(n) if is_number(n := made_on.get(key)) else 1.0 for key in ("threads", "processes"))
    if "device" not in made_on:
        return processes * WATTS_A_THREAD * threads, 0.0
    # "a100-80" is "A100-SXM4-80GB": all its parts stand in the device's name.
    name = str(made_on["device"]).lower().replace(" ", "")
    fitting = [known for known in device_table() if all(part in name for part in known.split("-"))]
    known = device_table()[max(fitting, key=len)] if fitting else {}
    return processes * known.get("power", 0.0), processes * known.get("price", 0.0)
