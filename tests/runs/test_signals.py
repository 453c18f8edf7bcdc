"""SIGTERM and SIGINT at any moment, under every launcher: the run saves, no step is lost, no process is left.

`NIM_NUM_SIGNALS=20 pytest tests/runs/test_signals.py` sends 20 to each kind of run; the suite sends a few.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from training_runs import PRETRAIN, REPOSITORY, last_step, losses, records, run

from modeling_nim.training.checkpoints import list_checkpoints


NUM_SIGNALS = int(os.environ.get("NIM_NUM_SIGNALS", 2))
TIMEOUT_S = 240  # two busy cores may take minutes to start two processes
ENDLESS = PRETRAIN | {
    "optimization": PRETRAIN["optimization"] | {"steps": 10**6},
    "checkpoints": {"every_steps": 10**6},  # what is kept is what the signal saved
    "logging": {"every_steps": 2},
}
LAUNCH = ["scripts/launch.py", "--cpu", "--main_process_port", "0", "--num_processes"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes"]
OPTIONS = {1: ["--cpu"], 2: ["--multi_gpu"]}  # Accelerate starts one process for --cpu, however many are asked for


def start(launcher, recipe, output_dir):
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(output_dir)}))
    command = [sys.executable, *launcher, "scripts/run_pretrain.py", str(path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, env=environment, **pipes)


def left_behind(output_dir):
    """Processes of the run that still live."""
    path = str(output_dir.with_suffix(".yaml"))
    found = [process for process in psutil.process_iter(["cmdline"]) if path in (process.info["cmdline"] or [])]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition, what):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def check_nothing_is_lost(output_dir, stops):
    """The log holds every second step, and those at which a signal stopped the run; the last one is saved."""
    step = last_step(output_dir)
    saved = [saved_step for saved_step, _ in list_checkpoints(output_dir / "checkpoints")]
    assert step >= max(stops) and (saved[-1] if saved else 0) == step
    assert [record["step"] for record in records(output_dir)] == sorted({*range(2, step + 1, 2), *stops, step} - {0})
    return step


@pytest.mark.timeout(60 * NUM_SIGNALS + TIMEOUT_S)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_signals_at_random_moments_lose_no_step_and_leave_no_process(num_processes, tmp_path):
    output_dir, draws, stops = tmp_path / "run", random.Random(num_processes), [0]
    for number in range(NUM_SIGNALS):
        signal_number = (signal.SIGTERM, signal.SIGINT)[number % 2]
        launcher = start([*LAUNCH, str(num_processes)], ENDLESS, output_dir)
        if number % 2 == 0:  # the whole start-up and the first steps
            time.sleep(draws.uniform(0.5, 8))
        else:
            wait_until(lambda before=stops[-1]: last_step(output_dir) > before, "no step in time")
            time.sleep(draws.uniform(0, 1))
        launcher.send_signal(signal_number)
        printed, _ = launcher.communicate(timeout=TIMEOUT_S)
        assert launcher.returncode == (130 if signal_number == signal.SIGINT else 0), printed
        assert not left_behind(output_dir) and "Traceback" not in printed, printed
        assert len(re.findall("the same command goes on", printed)) == 1, printed
        stops.append(check_nothing_is_lost(output_dir, stops))
    assert stops[-1] > 0


PASSES_ON = """
import os, signal, subprocess
import launch

passer = launch.SignalPasser()
passer.launching = True
child = subprocess.Popen(["sleep", "60"])
os.kill(os.getpid(), signal.SIGTERM)
assert child.wait(timeout=30) == -signal.SIGTERM
"""


def test_the_launcher_passes_a_signal_on_though_an_import_takes_longer_than_its_timer(tmp_path):
    """As on a busy machine with cold files: a stand-in becomes psutil itself after a second."""
    slow = (
        f"import sys, time; time.sleep(1); sys.path.remove({str(tmp_path)!r}); del sys.modules['psutil']; import psutil"
    )
    (tmp_path / "psutil.py").write_text(slow)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY / "scripts")])}
    done = subprocess.run([sys.executable, "-c", PASSES_ON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ENDS = """
import os, sys, time
from accelerate.commands import launch as accelerate_launch
import launch

class Late:
    def __del__(self, say=os.write, wait=time.sleep):
        say(1, b"ending\\n")
        wait(3)

sys.late = Late()  # goes when the interpreter ends and has given up its own handlers of signals
sys.argv = ["launch.py", "--cpu", "run.py"]
accelerate_launch.launch_command = lambda arguments: None
sys.exit(launch.main())
"""


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_end_of_a_run_changes_nothing(signal_number):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "scripts")}
    with subprocess.Popen([sys.executable, "-c", ENDS], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ending\n"
        process.send_signal(signal_number)
        assert process.wait(timeout=60) == 0


@pytest.mark.timeout(60 * NUM_SIGNALS + TIMEOUT_S)
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_accelerates_own_launcher_takes_the_run_along_and_no_step_is_lost(num_processes, signal_number, tmp_path):
    """Its exit code is its own: it dies of the signal, the run saves."""
    output_dir, draws, stops = tmp_path / "run", random.Random(signal_number * 10 + num_processes), [0]
    for number in range(max(1, NUM_SIGNALS // 2)):
        launcher = start([*ACCELERATE, str(num_processes), *OPTIONS[num_processes]], ENDLESS, output_dir)
        if number % 2:
            time.sleep(draws.uniform(0.5, 8))
        else:
            wait_until(lambda before=stops[-1]: last_step(output_dir) > before, "no step in time")
            time.sleep(draws.uniform(0, 1))
        launcher.send_signal(signal_number)
        printed, _ = launcher.communicate(timeout=TIMEOUT_S)  # the run has the pipe: until it has ended, too
        wait_until(lambda: not left_behind(output_dir), "the run goes on without its launcher")
        stops.append(check_nothing_is_lost(output_dir, stops))
        assert number % 2 or "stopped at step" in printed, printed
    assert stops[-1] > 0


def test_ctrl_c_saves_and_exits_with_130_and_loader_workers_live_through_it(tmp_path):
    recipe = PRETRAIN | {"data": {"source": "digits", "num_workers": 2}}
    printed = run("run_pretrain", recipe, tmp_path / "run", exit_code=130, interruption=("step", 5, "group SIGINT"))
    assert "stopped at step 5 of 12" in printed and "Traceback" not in printed
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4, 5]
    run("run_pretrain", recipe, tmp_path / "run")
    run("run_pretrain", recipe, tmp_path / "unbroken")
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


def test_two_processes_say_what_is_wrong_in_one_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(PRETRAIN | {"output_dir": str(tmp_path / "run")}))
    command = [sys.executable, *LAUNCH, "2", "scripts/run_pretrain.py", str(path), "data.source=folder"]
    command += [f"data.path={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: there is no folder '{tmp_path}/train'")
    assert done.returncode == 2 and done.stdout == "precision: float32\nattention: eager (17 tokens)\n"
    assert not (tmp_path / "run").exists()
