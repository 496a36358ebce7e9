"""Fleets for tests: sites in this process, and sites in processes of their own that can be killed."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from runtime.client_process import Spec
from runtime.forked import code_of, started
from runtime.site_process import main, receive, send
from sordino.runtime.fleet import Answer, Ask, Lost
from sordino.runtime.waiting import hear


@dataclass
class Site:
    """A site in a process of its own."""

    process: ForkServerProcess
    connection: socket.socket


class ProcessFleet:
    """Sites in processes of their own, over sockets: the waiting that an engine does, in small.

    Args:
        spec: the federation.
        groups: site to its clients.
        folder: where each site has its state.
    """

    def __init__(self, spec: Spec, groups: Mapping[str, list[int]], folder: Path) -> None:
        self._spec, self._groups, self._folder = spec, dict(groups), folder
        self._sites: dict[str, Site] = {}
        for site in groups:
            self.start(site)

    def start(self, site: str) -> None:
        """Start a site, or start it again."""
        file = self._folder / f"{site}.json"
        replace(self._spec, clients=self._groups[site]).write(file)
        ours, theirs = socket.socketpair()
        process = started(main, file, theirs, self._folder / site)
        theirs.close()
        self._sites[site] = Site(process, ours)

    def kill(self, site: str) -> None:
        """Kill a site with its process, at once."""
        gone = self._sites.pop(site)
        gone.process.kill()
        gone.process.join()
        gone.connection.close()

    def close(self) -> None:
        """End all sites."""
        for site in self._sites.values():
            site.connection.close()
        codes = [code_of(site.process) for site in self._sites.values()]
        assert codes == [0] * len(codes)

    def sites(self) -> frozenset[str]:
        return frozenset(self._sites)

    def may_return(self) -> bool:
        return False

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        waiting: dict[str, Site] = {}
        for site, payload in ask.payloads.items():
            if site not in self._sites:
                yield Lost(site, "it is not there", asked=False)
                continue
            waiting[site] = self._sites[site]
            send(waiting[site].connection, payload)
        end, came = time.monotonic() + ask.deadline, 0
        with selectors.DefaultSelector() as selector:
            for name, site in waiting.items():
                selector.register(site.connection, selectors.EVENT_READ, name)
            while waiting and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    name = key.data
                    selector.unregister(key.fileobj)
                    del waiting[name]
                    if content := receive(self._sites[name].connection):
                        came += 1
                        yield Answer(name, content)
                    else:
                        yield Lost(name, "it closed the connection")
                if came >= ask.quorum and not ask.short():
                    end = min(end, time.monotonic() + ask.grace)
        for name in waiting:
            yield Lost(name, f"no answer after {ask.deadline:g} s")


class TimedFleet:
    """Sites in this process that take some seconds each, by a clock of the fleet's own; it waits as an engine does.

    Args:
        sites: name to its seconds and its turn.
    """

    def __init__(self, sites: Mapping[str, tuple[float, Callable[[bytes], bytes]]]) -> None:
        self._sites, self._now = dict(sites), 0.0

    def sites(self) -> frozenset[str]:
        return frozenset(self._sites)

    def may_return(self) -> bool:
        return False

    def ask(self, ask: Ask) -> Iterator[Answer | Lost]:
        begun = self._now
        coming = sorted((begun + self._sites[site][0], site) for site in ask.payloads)

        def wait(seconds: float) -> list[tuple[str, bytes | str]]:
            if not coming or coming[0][0] > self._now + seconds:
                self._now += seconds
                return []
            self._now, site = coming.pop(0)
            return [(site, self._sites[site][1](ask.payloads[site]))]

        yield from hear(ask, list(ask.payloads), wait, lambda: self._now)
