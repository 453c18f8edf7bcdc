"""What the processes of one run do together: one for all, or all and none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed


T = TypeVar("T")
_ended_groups: list[Any] = []


def on_main_process(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """`function()` of the main process, in every process; its `ValueError` or `OSError` is raised in every process too.

    Otherwise the main process would end with the error and the others would wait for it. Every process must call it.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """All processes come through the block, or all raise the `ValueError` or `OSError` of the first that does not.

    Every process must enter it; they wait for one another at its end.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    errors = [other for other in gather_object([error]) if other is not None]
    if errors:
        raise errors[0]


def end_sharing(accelerator: Accelerator) -> None:
    """Ends trackers and the group of several processes: nothing may be shared afterwards.

    The group's object stays. The last to hold it would be DistributedDataParallel's reducer, which frees it under the
    interpreter's lock and waits for the group's thread, which may wait for that lock to free a tensor: a deadlock
    (torch 2.13, gloo).
    """
    if distributed.is_initialized():
        _ended_groups.append(distributed.group.WORLD)
    accelerator.end_training()
