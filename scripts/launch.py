"""`accelerate launch` that stops well: signals reach the run, which saves; one line is printed, no traceback.

    python scripts/launch.py scripts/run_pretrain.py scripts/recipes/digits/pretrain_nim_mae.yaml
    python scripts/launch.py --config_file scripts/launch/gpu_8_ddp.yaml scripts/run_pretrain.py RECIPE
    python scripts/launch.py --cpu --num_processes 2 scripts/run_pretrain.py RECIPE

Options and configuration files are those of `accelerate launch`, whose own --help has all of them. That one ends at
SIGTERM and does not wait for the run; torchrun kills a run that has not saved after 30 seconds. Here SIGTERM (exit code
0) and SIGINT (130) are passed on and the launcher waits. A run that fails gives its own exit code.
"""

import argparse
import os
import signal
import subprocess
import sys

from starting import STOPPED, exit_code_of


PASS_ON_EVERY_S = 0.2


class SignalPasser:
    """Passes the first SIGTERM or SIGINT on to the processes of the run, those that are about to start included."""

    def __init__(self):
        self.received: int | None = None
        self.launching = False
        self.told: set[int] = set()
        signal.signal(signal.SIGALRM, self._pass_on)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        import psutil  # before a signal: a tick of the timer would interrupt the import in the one before

        self.process = psutil.Process()

    def _receive(self, number: int, _) -> None:
        self.received = self.received or number
        if not self.launching:
            self.say()
            os._exit(exit_code_of(number))
        signal.setitimer(signal.ITIMER_REAL, 1e-3, PASS_ON_EVERY_S)

    def _pass_on(self, *_) -> None:
        for child in self.process.children():
            if child.pid not in self.told:
                self.told.add(child.pid)
                os.kill(child.pid, signal.SIGTERM)  # what the run does on both is the same but for its exit code

    def stop(self) -> None:
        """The run has ended: signals that come now change nothing, until the interpreter has ended, too."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # Python's own handlers would go before its end
        signal.setitimer(signal.ITIMER_REAL, 0)

    def say(self) -> None:
        """Prints the line of a stopped run, where the run printed none."""
        print(STOPPED.format(signal.Signals(self.received).name), file=sys.stderr, flush=True)


def make_launch_parser():
    """Accelerate's parser, with the name of this script."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.prog = "scripts/launch.py"
    return parser


def make_parser() -> argparse.ArgumentParser:
    """What `--help` prints: the options that matter here, since Accelerate's parser takes seconds to import."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`accelerate launch --help` prints the other options, which are taken here too.",
    )
    add = parser.add_argument
    add("--config_file", help="a file of scripts/launch/ or of `accelerate config` (default: that command's, if any)")
    add("--cpu", action="store_true", help="run on CPUs, though there is a GPU (default: where the file says so)")
    add("--num_processes", type=int, help="processes on all machines together (default: one for each GPU, or 1)")
    add("--num_machines", type=int, help="machines that run together (default: 1)")
    add("--machine_rank", type=int, help="number of this machine, from 0 (default: 0)")
    add("--main_process_ip", help="address of machine 0 (default: this machine)")
    add("--main_process_port", type=int, help="a free port of machine 0; 0 looks for one (default: 29500)")
    add("--gpu_ids", help='GPUs of this machine, such as "0,1" (default: all)')
    add("script", help="one of scripts/run_*.py")
    add("arguments", nargs=argparse.REMAINDER, help="of the script; after its name, --help is the script's")
    return parser


def main() -> int:
    options = sys.argv[1:]
    script = next((number for number, option in enumerate(options) if option.endswith(".py")), len(options))
    if {"-h", "--help"} & set(options[:script]):
        make_parser().parse_args(["--help"])
    passer = SignalPasser()
    # the agent that starts several processes would stop them itself, and not wait long enough
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP"
    import logging

    from accelerate.commands.launch import launch_command
    from torch.distributed import run  # noqa: F401  (its loggers are made now, so that they can be told to be quiet)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # the run says what went wrong
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it warns of every default
    arguments = make_launch_parser().parse_args()
    if arguments.cpu and (arguments.num_processes or 1) > 1 and arguments.mpirun_hostfile is None:
        # Accelerate starts one process for --cpu, however many are asked for
        os.environ["ACCELERATE_USE_CPU"] = "true"
        arguments.cpu, arguments.multi_gpu = False, True
    passer.launching = True
    try:
        launch_command(arguments)
        exit_code = 0
    except subprocess.CalledProcessError as error:
        exit_code = error.returncode
    except ChildFailedError as error:
        exit_code = error.get_first_failure()[1].exitcode
    except (ValueError, OSError, AssertionError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        exit_code = 2
    passer.stop()
    if passer.received is None:
        return exit_code if exit_code >= 0 else 128 - exit_code
    if exit_code in (-signal.SIGTERM, -signal.SIGINT):  # ended before it handled signals: nothing to save
        passer.say()
    elif exit_code not in (0, exit_code_of(signal.SIGINT)):
        return exit_code
    return exit_code_of(passer.received)


if __name__ == "__main__":
    sys.exit(main())
