"""Who is late: when each host was last heard of, and the launches that it has yet to begin or finish. No clock."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class _Host:
    name: str
    heard: float
    progressed: float
    """When it last began or finished a launch, or what took its time."""
    to_begin: deque[tuple[int, float]] = field(default_factory=deque)
    """Numbers of launches, and when they were announced."""
    to_finish: dict[int, tuple[float, bytes]] = field(default_factory=dict)
    """Launches that have finished here: when, and the digest of their tokens."""
    ahead: dict[int, bytes] = field(default_factory=dict)
    """The same of those that have finished there, and not yet here."""
    doing: str = ""


class Watch:
    """Keeps account of the hosts other than this one, by index. Time is in seconds, and goes on by `tick` alone.

    While weights are loaded, whole seconds may pass in which a process does nothing else: give that time, then `hurry`.
    """

    def __init__(self, names: Mapping[int, str], timeout_s: float, now: float):
        self._timeout_s = timeout_s
        self._tick = now
        self._now = 0.0
        self._hosts = {index: _Host(name, 0.0, 0.0) for index, name in names.items()}
        self._wrong = ""

    def tick(self, now: float) -> None:
        """Time goes on to `now`; but that in which this process did not run is nobody else's delay."""
        self._now += min(now - self._tick, self._timeout_s / 4)
        self._tick = now

    def hurry(self, timeout_s: float) -> None:
        """From now on nobody has longer than this."""
        self._timeout_s = timeout_s
        for host in self._hosts.values():
            host.heard = self._now

    def heard(self, index: int, doing: str | None = None) -> None:
        """A host has said something: that it is `doing` what may take its time, perhaps, or '' nothing like it."""
        host = self._hosts[index]
        host.heard = self._now
        if doing is not None:
            if host.doing and not doing:
                host.progressed = self._now
            host.doing = doing

    def announced(self, number: int) -> None:
        """Everybody was told to begin a launch."""
        for host in self._hosts.values():
            host.to_begin.append((number, self._now))

    def begun(self, index: int, number: int) -> None:
        """A host has begun a launch, and all those before it."""
        host = self._hosts[index]
        while host.to_begin and host.to_begin[0][0] <= number:
            host.to_begin.popleft()
            host.progressed = self._now

    def confirmed(self, index: int, number: int, tokens: bytes) -> None:
        """A host has finished a launch."""
        self.begun(index, number)
        host = self._hosts[index]
        host.progressed = self._now
        here = host.to_finish.pop(number, None)
        if here is None:
            host.ahead[number] = tokens
        elif here[1] != tokens:
            self._other_tokens(index, number)

    def finished_here(self, number: int, tokens: bytes) -> None:
        """This host has."""
        for index, host in self._hosts.items():
            there = host.ahead.pop(number, None)
            if there is None:
                host.to_finish[number] = self._now, tokens
            elif there != tokens:
                self._other_tokens(index, number)

    def late(self) -> str:
        """What is wrong with a host, which it names; '' if nothing is."""
        for index, host in self._hosts.items():
            silent, undone = self._overdue(host.heard), []
            if host.to_begin and not host.doing:
                number, announced = host.to_begin[0]
                since = max(announced, host.progressed)
                if silent or self._overdue(since):
                    undone.append(f"not confirmed step {number} for {self._now - since:.0f} s")
            if silent:
                undone.append(f"not been heard of for {self._now - host.heard:.0f} s")
            if undone:
                self._say(index, f"has {' and '.join(undone)}")
            if host.to_finish:
                number, (ended, _) = next(iter(host.to_finish.items()))
                if self._overdue(max(ended, host.progressed)):
                    self._say(
                        index, f"has not finished step {number}, which this host did {self._now - ended:.0f} s ago"
                    )
        return self._wrong

    def _overdue(self, since: float) -> bool:
        return self._now - since > self._timeout_s

    def _other_tokens(self, index: int, number: int) -> None:
        self._say(index, f"sampled other tokens in step {number} than this host")

    def _say(self, index: int, what: str) -> None:
        """The first thing that is wrong is what is said."""
        self._wrong = self._wrong or f"host {index} ({self._hosts[index].name}) {what}"
