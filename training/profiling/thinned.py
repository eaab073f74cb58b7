"""A record of bounded length for a run of any length."""

from typing import Generic, TypeVar

T = TypeVar("T")


class Thinned(Generic[T]):
    """Keeps at most `limit` of the items added, spread evenly: when full, every other goes and fewer are taken."""

    def __init__(self, limit: int) -> None:
        """`limit` is at least 2."""
        self.items: list[T] = []
        self._limit = limit
        self._stride = 1
        self._added = 0

    def append(self, item: T) -> None:
        """Add one; whether it is kept depends on its turn alone."""
        if self._added % self._stride == 0:
            if len(self.items) == self._limit:
                self.items = self.items[::2]
                self._stride *= 2
            if self._added % self._stride == 0:
                self.items.append(item)
        self._added += 1
