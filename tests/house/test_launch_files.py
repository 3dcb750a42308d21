"""The ready files of docs/launch: shells and parsers take them, and what can run here runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "docs" / "launch"
# Stand-ins: two tasks, of which each notes its numbers, and a queue that notes what comes back.
STANDINS = {
    "srun": """#!/bin/bash
shift
code=0
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@" || code=$?; done
exit $code
""",
    "scontrol": """#!/bin/bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" > requeued; fi
""",
    "python": """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> started
if [ -n "$LEAVES" ]; then echo "{\\"started\\": 2, \\"status\\": \\"$LEAVES\\"}" > output/run.json; fi
exit "$ENDS_WITH"
""",
}


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_a_shell_reads_the_script(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""


def test_the_job_of_kubernetes_has_as_many_replicas_as_its_policy_says() -> None:
    job = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text("utf-8"))
    assert (job["kind"], job["apiVersion"]) == ("PyTorchJob", "kubeflow.org/v1")
    worker, elastic = job["spec"]["pytorchReplicaSpecs"]["Worker"], job["spec"]["elasticPolicy"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    [container] = worker["template"]["spec"]["containers"]
    assert container["command"][-4:] == ["soup_xb", "train", "soup.yaml", "--resume"]
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == job["spec"]["nprocPerNode"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}


def test_the_hosts_of_the_ring_are_a_list_that_a_launch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from soup_xb.core.run.stop import launched_processes

    hosts = json.loads((LAUNCH / "hosts.json").read_text("utf-8"))
    assert all({"ssh", "ips"} == set(host) for host in hosts)
    monkeypatch.setenv("MLX_HOSTFILE", str(LAUNCH / "hosts.json"))
    monkeypatch.setenv("MLX_RANK", "1")
    assert launched_processes() == len(hosts)


def test_the_container_copies_what_the_wheel_is_built_from() -> None:
    lines = (LAUNCH / "Containerfile").read_text("utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert [name for name in copied if not (LAUNCH.parents[1] / name).exists()] == []
    assert {"pyproject.toml", "soup_xb", "templates"} <= set(copied)


@pytest.mark.parametrize(("status", "code"), [("interrupted", 75), ("finished", 0), ("failed", 6), ("", 5)])
def test_a_slurm_job_starts_a_task_a_process_and_comes_back_when_it_was_interrupted(
    status: str, code: int, tmp_path: Path
) -> None:
    """Where the job fails before its first step, `run.json` still tells that the job before was interrupted."""
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "run.json").write_text(json.dumps({"started": 1, "status": "interrupted"}))
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7",
        "ENDS_WITH": str(code), "LEAVES": status,
    }  # fmt: skip
    done = subprocess.run(["bash", LAUNCH / "slurm.sh"], cwd=tmp_path, env=variables, check=False)
    assert done.returncode == code
    words = "node1:29500 -m soup_xb train soup.yaml --output output --resume"
    assert (tmp_path / "started").read_text().splitlines() == [f"0 0 2 {words}", f"1 1 2 {words}"]
    assert (tmp_path / "requeued").exists() == (status == "interrupted")


@pytest.mark.slow
def test_the_script_for_one_machine_trains_in_two_processes(
    tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    config = {
        "base": str(tiny_llama), "backend": "torch", "data": {"train": str(chat_file), "max_length": 128},
        "training": {"max_steps": 2, "lora": {"r": 4}}, "output": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "soup.yaml").write_text(json.dumps(config))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", LAUNCH / "one-node.sh", "soup.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PROCESSES": "2", "RESTARTS": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["status"], record["steps"]) == ("finished", 2)
