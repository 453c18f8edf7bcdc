"""What the processes of a run do together."""

import os
import subprocess
import sys

from training_runs import REPOSITORY


# Each round ends as a run of several processes does: a last gather, the end, and then the model is freed.
ENDS = """
from types import SimpleNamespace

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from modeling_nim.runs.processes import end_sharing

def run():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    distributed.all_gather([torch.zeros(8)], torch.ones(8))
    end_sharing(SimpleNamespace(end_training=distributed.destroy_process_group))

for number in range(1, 201):
    run()
print(number, "ends")
"""


def test_the_end_of_several_processes_is_no_deadlock():
    """Without `end_sharing` one round in some hundreds never ends: DDP's reducer frees the group."""
    command = [sys.executable, "-c", ENDS]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.stdout == "200 ends\n", done.stderr
