"""Gathers everything that is wrong with a checkpoint, so that one CheckpointError can say it all."""

from pathlib import Path

from jaxserve.errors import CheckpointError

_SHOWN = 20


class Problems:
    """What is wrong, by kind; the kinds keep the order in which they were first met."""

    def __init__(self, path: Path):
        self.path = path
        self._by_kind: dict[str, set[str]] = {}

    def add(self, kind: str, item: str) -> None:
        """Notes one item of a kind; the same item twice counts once."""
        self._by_kind.setdefault(kind, set()).add(item)

    def raise_any(self) -> None:
        """Raises CheckpointError with every kind, its count and its first 20 items in order, if there is any."""
        if not self._by_kind:
            return
        count = sum(len(items) for items in self._by_kind.values())
        lines = [f"checkpoint {self.path}: {count} {'problem' if count == 1 else 'problems'}"]
        for kind, items in self._by_kind.items():
            left = len(items) - _SHOWN
            shown = "; ".join(sorted(items)[:_SHOWN])
            lines.append(f"  {kind} ({len(items)}): {shown}{f'; and {left} more' if left > 0 else ''}")
        raise CheckpointError("\n".join(lines))
