"""The doctor finds nothing on a healthy machine, each fault on a faulty one, and says what to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from groundup.cli.doctor import Arithmetic, Finding, Machine, examine, look, render, to_json
from groundup.environment import container_limits
from groundup.recipe import parse_recipe

GIB = 1 << 30
TORCH = Arithmetic(
    version="2.13.0",
    threads=4,
    gpus=(),
    unused_device=None,
    bfloat16=(True, "AVX512-BF16"),
    float32_flops=200e9,
    bfloat16_flops=800e9,
)
HEALTHY = Machine(
    python=(3, 12, 1),
    groundup="0.1.0",
    broken_imports={},
    torch=TORCH,
    tokens_per_second=20_000.0,
    cpu="Some CPU",
    cores=4,
    core_quota=None,
    load=0.1,
    omp_threads=None,
    memory_total=16 * GIB,
    memory_free=12 * GIB,
    memory_limit=None,
    compiler="/usr/bin/g++",
    python_headers=True,
    runs=Path("/somewhere/runs"),
    runs_writable=True,
    disk_free=50 * GIB,
    language_model=True,
)


def found(**changes: Any) -> dict[str, Finding]:
    """What is found on a machine that is healthy but for these facts."""
    torch_fields = {field.name for field in dataclasses.fields(Arithmetic)} - {"version"}
    of_torch = {name: changes.pop(name) for name in list(changes) if name in torch_fields}
    if of_torch:
        changes["torch"] = dataclasses.replace(TORCH, **of_torch)
    return {finding.name: finding for finding in examine(dataclasses.replace(HEALTHY, **changes))}


def test_a_healthy_machine_is_healthy() -> None:
    findings = found()
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert findings["python"].value == "3.12.1"
    assert findings["cpu"].value == "Some CPU, 4 cores"
    assert "of which this container may use 1.5" in found(core_quota=1.5)["cpu"].value
    assert "4.0 times" in findings["precision"].value


@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({"python": (3, 10, 9)}, "python", "fail", "3.11"),
        ({"broken_imports": {"groundup.model": "ImportError: gone"}}, "groundup", "fail", "make clean demo"),
        ({"torch": None, "broken_imports": {"torch": "OSError: libgomp"}}, "torch", "fail", "make clean demo"),
        ({"core_quota": 1.5}, "threads", "warn", "More than the 1 core there are: --set threads=1"),
        ({"threads": 8}, "threads", "warn", "--set threads=4"),
        ({"threads": 8, "omp_threads": "8"}, "threads", "warn", "unset OMP_NUM_THREADS"),
        ({"threads": 1, "omp_threads": "1"}, "threads", "warn", "3 of 4 cores would stand idle"),
        ({"omp_threads": "many"}, "threads", "warn", "unset it"),
        ({"omp_threads": "0"}, "threads", "warn", "unset it"),
        ({"omp_threads": ""}, "threads", "warn", "unset it"),
        ({"omp_threads": "²"}, "threads", "warn", "unset it"),
        ({"memory_free": GIB}, "memory", "warn", "micro_batch_size"),
        ({"memory_limit": GIB}, "memory", "warn", "container"),
        ({"bfloat16_flops": 100e9}, "precision", "warn", "precision=float32"),
        ({"unused_device": "Apple's GPU"}, "gpu", "warn", "runs on the CPU"),
        ({"compiler": None}, "compiler", "warn", "g++"),
        ({"python_headers": False}, "compiler", "warn", "python3-dev"),
        ({"runs_writable": False}, "disk", "fail", "--runs"),
        ({"disk_free": 1 << 20}, "disk", "fail", "--runs"),
        ({"language_model": False}, "languages", "fail", "corpus.languages=[]"),
        ({"tokens_per_second": 2_000.0}, "expect", "warn", "Slow"),
        ({"tokens_per_second": None}, "expect", "fail", "Fix"),
    ],
)
def test_a_fault_is_found_with_what_to_do(changes: dict[str, Any], name: str, status: str, words: str) -> None:
    findings = found(**changes)
    assert findings[name].status == status
    assert words in findings[name].advice
    others = {finding.status for finding in findings.values() if finding.name not in (name, "expect")}
    assert others == {"ok"}, "a fault was found where there is none"


@pytest.mark.parametrize(
    "changes",
    [
        {"core_quota": 4.0},
        {"core_quota": 2.0, "threads": 2, "omp_threads": "2"},
        {"core_quota": 16.0},
        {"memory_limit": 64 * GIB},
        {"memory_limit": 4 * GIB},
        {"threads": 4, "omp_threads": "4"},
        {"threads": 3, "omp_threads": "3"},
        {"threads": 2},
        {"bfloat16": (False, "no such unit"), "bfloat16_flops": 10e9},
        {"gpus": ("H200",)},
    ],
)
def test_a_difference_that_is_no_fault_is_none(changes: dict[str, Any]) -> None:
    assert {finding.status for finding in found(**changes).values()} == {"ok"}


def test_every_warning_and_failure_says_what_to_do() -> None:
    everything = found(
        python=(3, 8, 0),
        torch=None,
        broken_imports={"torch": "x", "groundup.model": "y"},
        tokens_per_second=None,
        core_quota=0.5,
        omp_threads="x",
        memory_free=0,
        compiler=None,
        disk_free=0,
        language_model=False,
    )
    assert all(finding.advice for finding in everything.values() if finding.status != "ok")
    assert {name for name, finding in everything.items() if finding.status == "ok"} == {"cpu"}


def test_the_precision_follows_the_hardware_and_gives_its_reason() -> None:
    assert found()["precision"].value.startswith("bfloat16: AVX512-BF16")
    assert found(bfloat16=(False, "no such unit"))["precision"].value.startswith("float32: no such unit")


def test_a_faster_machine_is_promised_a_shorter_demo() -> None:
    def minutes(rate: float) -> int:
        return int(found(tokens_per_second=rate)["expect"].value.rpartition("about ")[2].removesuffix(" min"))

    assert minutes(10_000) == pytest.approx(2 * minutes(20_000), abs=1)
    assert minutes(1e9) == 1
    assert found(tokens_per_second=100.0)["expect"].value.endswith(" h")


def test_an_estimate_from_a_busy_machine_says_so() -> None:
    assert "busy" in found(load=3.2)["expect"].value
    assert "busy" not in found(load=0.2)["expect"].value


# --- Showing it


def test_json_says_whether_anything_failed() -> None:
    healthy = json.loads(json.dumps(to_json(list(found().values()))))
    assert healthy["ok"] is True
    assert healthy["findings"][0] == {"name": "python", "value": "3.12.1", "status": "ok", "advice": ""}
    assert to_json(list(found(compiler=None).values()))["ok"] is True
    assert to_json(list(found(runs_writable=False).values()))["ok"] is False


def test_the_table_shows_every_finding_as_it_is_written(tmp_path: Path) -> None:
    findings = list(found(runs=tmp_path / "[red]not markup[/red]", compiler=None).values())
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(findings))
    shown = captured.get()
    assert "[red]not markup[/red]" in shown
    for finding in findings:
        assert finding.name in shown
        assert finding.value in shown
        assert finding.advice in shown


# --- Looking

Tree = Callable[[dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    def plant(files: dict[str, str]) -> Path:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content + "\n")
        return tmp_path

    return plant


def test_limits_of_control_groups_version_2(tree: Tree) -> None:
    root = tree(
        {
            "proc/self/cgroup": "0::/pod/container",
            "sys/fs/cgroup/pod/cpu.max": "300000 100000",
            "sys/fs/cgroup/pod/memory.max": str(4 * GIB),
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/container/memory.max": str(8 * GIB),
            "sys/fs/cgroup/elsewhere/cpu.max": "1 100000",
        }
    )
    assert container_limits(root) == (3.0, 4 * GIB)


def test_limits_of_control_groups_version_1(tree: Tree) -> None:
    root = tree(
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "150000",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        }
    )
    assert container_limits(root) == (1.5, 2 * GIB)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/"},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000", "sys/fs/cgroup/memory.max": "max"},
        {"proc/self/cgroup": "3:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "", "sys/fs/cgroup/memory.max": "nonsense"},
    ],
)
def test_no_limit_is_no_limit(tree: Tree, files: dict[str, str]) -> None:
    assert container_limits(tree(files)) == (None, None)


def test_a_group_outside_the_containers_view_leaves_the_top_one(tree: Tree) -> None:
    root = tree({"proc/self/cgroup": "0::/../../pod", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert container_limits(root) == (0.5, None)


@pytest.mark.parametrize(
    ("device", "words"), [("mps", "Apple's GPU is not used"), ("xpu", "Intel's GPU is not used"), ("cuda", "none")]
)
def test_a_device_that_groundup_does_not_use_is_named(
    device: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device))
    machine = look(parse_recipe('[model]\npreset = "ground-nano"\n[tokenizer]\nvocab_size = 512', "a.toml"), tmp_path)
    gpu = next(finding for finding in examine(machine) if finding.name == "gpu")
    assert gpu.value == words
    assert (gpu.status == "warn") == (device != "cuda")


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    small = parse_recipe('[model]\npreset = "ground-nano"\n[tokenizer]\nvocab_size = 512', "small.toml")
    runs = tmp_path / "not" / "yet"
    machine = look(small, runs)
    assert machine.broken_imports == {}
    assert machine.python == sys.version_info[:3]
    assert machine.torch is not None
    assert machine.torch.version == torch.__version__
    assert machine.torch.threads == torch.get_num_threads()
    assert machine.torch.float32_flops > 1e6
    assert machine.tokens_per_second is not None
    assert machine.tokens_per_second > 1
    assert 0 < machine.memory_free <= machine.memory_total
    assert machine.runs_writable
    assert machine.disk_free > 0
    assert machine.language_model
    assert not runs.exists(), "looking wrote something"
    assert len(examine(machine)) == len(found())
