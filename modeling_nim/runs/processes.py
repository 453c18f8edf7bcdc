"""What the processes of one run do once, for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


T = TypeVar("T")


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
