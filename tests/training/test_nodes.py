"""Two nodes on the loopback interface and FSDP2 on CPUs: a few steps, killed, resumed, also by one process."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from training_runs import PRETRAIN, REPOSITORY, last_step, losses, run


TIMEOUT_S = 180
LONG = PRETRAIN | {
    "optimization": PRETRAIN["optimization"] | {"steps": 100},
    "checkpoints": {"every_steps": 10},
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(kind, recipe_path, folder):
    """The launchers of one run: one of each node."""
    script = [sys.executable, "scripts/launch.py"]
    port = free_port()
    if kind == "fsdp2":
        config = yaml.safe_load((REPOSITORY / "scripts" / "launch" / "gpu_8_fsdp2.yaml").read_text())
        (folder / "launch.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2}))
        commands = [[*script, "--config_file", str(folder / "launch.yaml"), "--main_process_port", port]]
    else:
        nodes = ["--cpu", "--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
        commands = [[*script, *nodes, "--main_process_port", port, "--machine_rank", rank] for rank in "01"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    return [
        subprocess.Popen([*command, "scripts/run_pretrain.py", str(recipe_path)], cwd=REPOSITORY, **options)
        for command in commands
    ]


def finish(launchers):
    printed = [launcher.communicate(timeout=TIMEOUT_S)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), printed
    return printed


@pytest.mark.parametrize("kind", ["nodes", "fsdp2"])
def test_a_run_shared_by_launchers_is_stopped_and_resumed(kind, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(LONG | {"output_dir": str(tmp_path / "run")}))
    launchers = launch(kind, path, tmp_path)
    deadline = time.monotonic() + TIMEOUT_S
    while last_step(tmp_path / "run") < 12:
        assert time.monotonic() < deadline and all(launcher.poll() is None for launcher in launchers), "no step"
        time.sleep(0.02)
    launchers[-1].send_signal(signal.SIGTERM)  # to one node: all stop at the same step
    assert "stopped at step" in finish(launchers)[0]
    stopped = last_step(tmp_path / "run")
    assert 12 <= stopped < 100

    run("run_pretrain", LONG, tmp_path / "one")
    if kind == "nodes":  # and one process takes over from two nodes
        run("run_pretrain", LONG, tmp_path / "run")
    else:  # sharded checkpoints are read by as many
        finish(launch(kind, path, tmp_path))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-3)
    assert (tmp_path / "run" / "model.safetensors").exists()
