"""The demo from nothing in a folder of its own: the closing table, seconds and peak memory of each stage."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_result


def main() -> None:
    """Build the demo as a user would, and write down what it gave."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "groundup", "build", "demo", "--runs", folder], check=False)
        seconds = time.perf_counter() - start
        run = Path(folder) / "demo"
        manifests = sorted(run.rglob("stage.json"))
        stages = {path.parent.relative_to(run).as_posix(): json.loads(path.read_text()) for path in manifests}
        scores = json.loads((run / "evaluate" / "scores.json").read_text())
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        write_result(
            "demo",
            {
                "exit_code": done.returncode,
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "stages": {
                    name: {"seconds": stage["seconds"], "summary": stage["summary"]} for name, stage in stages.items()
                },
                "rows": scores["rows"],
                "by_kind": scores["by_kind"],
            },
        )


if __name__ == "__main__":
    main()
