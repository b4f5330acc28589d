"""The agent: starts the node's gang, holds what must outlive its workers, and speaks with the controller."""

import argparse
import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent import config as configuration
from agent import convert, folders, identity, local, outbox, peers
from agent.actions import Process
from agent.children import GangChild, gang_command
from agent.config import AgentConfig, ConfigError
from agent.folders import StartError
from agent.history import History
from agent.link import Link
from agent.local import Connection, LocalServer, Message
from agent.monitor import Monitor, Stall
from agent.orders import Orders, Surroundings, remove_slots
from agent.outbox import Outbox
from agent.reports import Reports, dropped_notice
from agent.roster import Member, Roster
from agent.standbys import Standbys
from agent.telemetry import Telemetry, traceparent

log = logging.getLogger(__name__)

#: On SIGTERM, what is queued gets so long to be acknowledged; the rest stays on disk for the next start.
DRAIN_S = 2.0
#: On SIGTERM, workers get so long to be gone, and their ends to be queued.
WORKERS_S = 0.5
EXIT_USAGE = 2
EXIT_CONDITION = 5


class Daemon:
    """One life of a node's agent: make it, `run` it, and `stop` ends it from within or from a signal."""

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._lock = folders.claim(config)
        self._epoch = identity.next_epoch(config.state)
        spool = config.state / "outbox"
        self._outbox = Outbox(spool, self._epoch, dropped_notice)
        self._reports = Reports(self._outbox)
        self._telemetry = Telemetry("agent", config.trace, config.otlp_endpoint)
        self._history = History(config.state)
        self._roster = Roster(self._over, self._changed)
        numbers = itertools.count(1)
        self._standbys = Standbys(self._roster, lambda: f"{config.node}-{self._epoch}-{next(numbers)}")
        self._monitor = Monitor(self._stalled)
        self._gang = GangChild(
            gang_command(config), config.logs / f"gang-{config.node}.log", self._changed, self._gang_ended
        )
        self._local = LocalServer(config.socket, self)
        self._orders = Orders(self._surroundings())
        self._link = Link(
            config.controller,
            self._outbox,
            self._history,
            self._hello,
            self._orders.receive,
            leftovers=outbox.leftovers(spool, self._epoch),
        )
        self._reports.wake = self._link.wake
        self._peer_endpoint = ""
        self._changing: asyncio.Handle | None = None
        self._trained: dict[str, int] = {}
        self._handlers = {
            "report": self._on_report,
            "step": self._on_step,
            "ready": self._on_ready,
            "exited": self._on_exited,
            "replayed": lambda _client, message: self._orders.replayed(message),
            "kill_controller": self._on_kill_controller,
        }

    async def run(self) -> None:
        """Serve until `stop`, then drain. Raises StartError."""
        try:
            server, self._peer_endpoint = await peers.serve(
                self._config.slots, self._config.node_ip, self._config.peer_port
            )
            await self._local.start()
        except OSError as error:
            raise StartError(str(error)) from error
        self._gang.start()
        tasks = [asyncio.create_task(self._link.run()), asyncio.create_task(self._monitor.run())]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain()
        finally:
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
            await server.stop(None)
            await self._close()
        for task in done - {stopping}:
            task.result()  # a task that ended by itself broke: say how

    def stop(self) -> None:
        """Ask for the end."""
        self._stop.set()

    # What the local server tells.

    def joined(self, client: Connection) -> None:
        """A gang or a worker connected."""
        if client.role == "gang":
            self._standbys.gang_joined(client)
        else:
            self._worker_joined(client)

    def welcome(self) -> Message:
        """What every client may need to know of its node."""
        return {
            "node": self._config.node,
            "agent_pid": os.getpid(),
            "device": self._config.device,
            "runtime": str(self._config.runtime),
            "gang_pid": self._gang.pid,
            "trace": str(self._config.trace or ""),
            "otlp_endpoint": self._config.otlp_endpoint or "",
        }

    def received(self, client: Connection, message: Message) -> None:
        """A gang or a worker said something."""
        local.dispatch(self._handlers, client, message)

    def left(self, client: Connection) -> None:
        """A connection ended."""
        if client is self._standbys.gang:
            self._standbys.gang_left()
        self._roster.left(client)

    # What workers and the gang say.

    def _worker_joined(self, client: Connection) -> None:
        member = self._roster.get(client.standby)
        if member is None or member.cause:
            log.info("standby %s is not wanted any more", client.standby)
            client.close()
        else:
            self._roster.joined(member, client)

    def _on_report(self, client: Connection, message: Message) -> None:
        member = self._roster.get(client.standby)
        if message.get("kind") == "worker_exited":
            # Not an exit yet: a worker's own word on why it will end. The report follows the proof that it is gone.
            if member is not None:
                body = message["body"]
                self._roster.says(member, str(body.get("cause", "error")), str(body.get("detail", "")), body)
        else:
            self._reports.pass_on(message)

    def _on_step(self, _client: Connection, message: Message) -> None:
        self._reports.step(message)
        job, generation = str(message["job"]), int(message["generation"])
        if self._trained.get(job) != generation:
            self._trained[job] = generation
            self._standbys.trains(job)
            remove_slots(self._config.slots, job, keep=[member.rank for member in self._roster.workers(job)])

    def _on_ready(self, _client: Connection, message: Message) -> None:
        member = self._roster.get(message["standby"])
        if member is None or member.ready:
            return
        self._roster.is_process(member, int(message["pid"]))
        member.ready = True
        member.device = str(message.get("device") or self._config.device)
        member.rendezvous = str(message["rendezvous"])
        self._standbys.ready(member)
        body = {"job": member.job, "standby": member.standby, "pid": member.pid, "device": member.device}
        more = {"rendezvous": member.rendezvous, "fingerprint": str(message.get("fingerprint", ""))}
        self._reports.say("worker_ready", body | more)

    def _on_exited(self, _client: Connection, message: Message) -> None:
        member = self._roster.get(message["standby"])
        if member is not None:
            self._roster.says(member, str(message.get("cause") or "error"), str(message.get("detail", "")))

    def _on_kill_controller(self, _client: Connection, _message: Message) -> None:
        pid = self._controller_pid()
        if pid > 1:
            log.warning("a drill ends the controller, process %d", pid)
            os.kill(pid, signal.SIGKILL)

    # What happens by itself.

    def _over(self, member: Member) -> None:
        last = self._monitor.forget(member.pid)
        body: dict[str, Any] = {"job": member.job, "generation": member.generation, "rank": member.rank}
        body |= {"pid": member.pid, "cause": member.cause, "detail": member.detail, "standby": member.standby}
        if last is not None:
            body |= {"step": last.step, "phase": last.phase}
        body |= {key: member.last_words[key] for key in ("step", "phase") if key in member.last_words}
        self._say_alarm("worker_exited", body, quiet=member.cause in ("completed", "stopped"))
        if not self._stop.is_set():
            self._standbys.over(member)

    def _stalled(self, stall: Stall) -> None:
        body = {"job": stall.worker.job, "generation": stall.worker.generation, "rank": stall.worker.rank}
        seen = {"pid": stall.worker.pid, "step": stall.step, "phase": stall.phase, "waiting": stall.waiting}
        took = {"stalled_s": stall.stalled_s, "deadline_s": stall.deadline_s, "process_state": stall.process_state}
        self._say_alarm("progress_stalled", body | seen | took)

    def _say_alarm(self, kind: str, body: Message, *, quiet: bool = False) -> None:
        """Report what an incident may begin with, as the first span of its trace; `quiet`: it is no alarm after all."""
        if quiet:
            self._reports.say(kind, body)
            return
        named = {key: body[key] for key in ("job", "generation", "rank", "pid")}
        with self._telemetry.span(kind, "", **named) as span:
            self._reports.say(kind, body, traceparent=traceparent(span))

    def _gang_ended(self) -> None:
        """Its workers end with it, by Ray's rule; killing them makes that immediate and certain."""
        self._standbys.gang_left()
        self._roster.end(list(self._roster), "signal", "its gang child ended")
        self._changed()

    def _changed(self) -> None:
        """Report the processes once for all the changes of this turn of the loop."""
        if self._changing is None:
            self._changing = asyncio.get_running_loop().call_soon(self._say_processes)

    def _say_processes(self) -> None:
        self._changing = None
        self._reports.processes(self._processes())

    def _processes(self) -> list[Process]:
        gang = [Process("gang", self._gang.pid)] if self._gang.pid else []
        return [Process("agent", os.getpid()), *gang, *self._roster.processes()]

    def _hello(self, epoch: int) -> Any:
        config = self._config
        return convert.hello(
            node=config.node,
            epoch=epoch,
            boot_id=identity.boot_id(),
            version=identity.version(),
            highest_controller_epoch=self._history.controller_epoch,
            fingerprint=identity.fingerprint(),
            device=(config.device, config.device_serial, config.device_kind),
            processes=self._processes() if epoch == self._epoch else [],
            completed=self._history.completed(),
            peer_endpoint=self._peer_endpoint,
            spare=config.spare,
        )

    def _controller_pid(self) -> int:
        controller = self._link.controller
        return controller.pid if controller.host == socket.gethostname() else 0

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            node=self._config.node,
            runtime=self._config.runtime,
            slots=self._config.slots,
            roster=self._roster,
            standbys=self._standbys,
            monitor=self._monitor,
            reports=self._reports,
            history=self._history,
            telemetry=self._telemetry,
            controller_pid=self._controller_pid,
        )

    async def _drain(self) -> None:
        """End the workers and the gang, and let the controller hear of it."""
        await self._orders.close()
        members = list(self._roster)
        self._roster.end(members, "stopped", "the agent was asked to end")
        ends = [asyncio.create_task(member.over.wait()) for member in members]
        if ends:
            await asyncio.wait(ends, timeout=WORKERS_S)
        await asyncio.gather(self._gang.stop(self._farewell), self._link.drained(DRAIN_S))

    def _farewell(self) -> bool:
        gang = self._standbys.gang
        return gang is not None and gang.send({"t": "shutdown"})

    async def _close(self) -> None:
        await self._local.close()
        self._outbox.close()
        self._telemetry.close()
        folders.clear(self._config)
        self._lock.close()


async def _serve(config: AgentConfig) -> None:
    daemon = Daemon(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, daemon.stop)
    await daemon.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """`assay-agent --config FILE`: run until SIGTERM. Gives 0; 2 for an unusable configuration, 5 for no start."""
    parser = argparse.ArgumentParser(prog="assay-agent", description="Assay's daemon on a node")
    parser.add_argument("--config", type=Path, required=True, help="settings, a .json or .toml file")
    parser.add_argument("--version", action="version", version=f"assay-agent {identity.version()}")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_serve(configuration.load(options.config)))
    except ConfigError as error:
        sys.stderr.write(f"assay-agent: {error}\n")
        return EXIT_USAGE
    except StartError as error:
        sys.stderr.write(f"assay-agent: {error}\n")
        return EXIT_CONDITION
    return 0


if __name__ == "__main__":
    sys.exit(main())
