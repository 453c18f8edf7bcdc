"""One run at a time in an output directory, whatever ends the one before."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from training_runs import PRETRAIN, REPOSITORY, run

from modeling_nim.runs.locks import LOCK_FILE, lock_directory, unlock_directory


HOLD = "import sys, modeling_nim.runs.locks as l; l.lock_directory(sys.argv[1]); print('held', flush=True); input()"


@pytest.fixture
def holder(tmp_path):
    """A process that has `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_is_refused_in_one_line_and_goes_on_after_a_kill(holder, tmp_path):
    printed = run("run_pretrain", PRETRAIN, tmp_path / "run", exit_code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert f"'{tmp_path / 'run'}' is in use by process {holder.pid} on {socket.gethostname()};" in line
    assert "Traceback" not in printed and os.listdir(tmp_path / "run") == [LOCK_FILE]
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on"):
        lock_directory(tmp_path / "run")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run("run_pretrain", PRETRAIN, tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_processes_of_a_second_run_are_all_refused(holder, tmp_path):
    printed = run("run_pretrain", PRETRAIN, tmp_path / "run", num_processes=2, exit_code=1)
    assert f"in use by process {holder.pid}" in printed and "log.jsonl" not in os.listdir(tmp_path / "run")


def test_a_lock_keeps_other_threads_out_until_it_is_given_up(tmp_path):
    answers = []

    def take():
        try:
            lock_directory(tmp_path)
            answers.append("taken")
        except ValueError as error:
            answers.append(str(error))

    lock_directory(tmp_path)
    lock_directory(tmp_path)  # this thread's run before has ended
    for expected in (f"in use by another thread of process {os.getpid()}", "taken"):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        assert expected in answers[-1]
        unlock_directory(tmp_path)
    unlock_directory(tmp_path)  # nobody has it: nothing happens


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: start no second run there"):
        lock_directory(tmp_path)
