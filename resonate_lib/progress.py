"""A line every few seconds from whatever takes long: an interactive reader sees it move, a batch's monitor repeats the last one."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

EVERY = 5.0  # seconds between lines

Item = TypeVar("Item")


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def told(items: Iterable[Item], total: int, label: str, *, size: Callable[[Item], int] = lambda item: 1) -> Iterator[Item]:
    """The items as they come; after them, at most every EVERY seconds, prints how many of `total` are done and the time left.

    An item is done when the next one is asked for. size: how many it counts for, such as a batch's length.
    """
    began = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last > EVERY:
            last = now
            print(f"{label}: {done}/{total}  {clock((now - began) / done * (total - done))} left", flush=True)
