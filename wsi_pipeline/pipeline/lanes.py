"""Worker processes of this machine behind the standard library's interface for executors.

Why not ``ProcessPoolExecutor``: when one of its processes dies, all calls of all processes fail, and nobody
can tell which of them was to blame or how it died. Here each lane is one process; its death fails the calls
that it had in hand, says by what (a signal, its memory), and a fresh process takes its place.

Why a process may have several calls in hand (``slots``): while one slide is finished, the next one is read,
so that a GPU has always something to do. A call that is suspected of killing its process runs ``alone``.

Lanes are ended by killing them: whatever runs here has to survive that anyway.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle  # noqa: S403  between our own processes
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from wsi_pipeline._processes import environment
from wsi_pipeline.errors import WorkerDiedError
from wsi_pipeline.pipeline.memory import rss

__all__ = ["Lanes"]

LOOK_SECONDS = 0.2
"""How often a process's memory is looked at."""
JOIN_SECONDS = 10.0

_T = TypeVar("_T")


@dataclass(slots=True)
class _Call:
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    alone: bool


class Lanes(Executor):
    """``count`` processes with at most ``slots`` calls each.

    ``environments``: variables of each lane's process (CUDA_VISIBLE_DEVICES, ...), set before it starts;
    ``memory``: resident bytes beyond which a process is killed. Functions and arguments must pickle.
    """

    def __init__(
        self,
        count: int,
        *,
        slots: int = 1,
        environments: Sequence[Mapping[str, str]] = (),
        memory: int | None = None,
    ) -> None:
        self._lock = threading.RLock()
        self._queue: deque[_Call] = deque()
        self._closed = False
        self._slots = slots
        chosen = list(environments) or [{}]
        self._lanes = [
            _Lane(chosen[i % len(chosen)], slots, memory, self._freed, self._lock) for i in range(count)
        ]

    def submit(self, function: Callable[..., _T], /, *arguments: Any, **named: Any) -> Future[_T]:
        """Queue a call; it fails with WorkerDiedError where its process dies."""
        return self._queued(_Call(Future(), functools.partial(function, **named), arguments, alone=False))

    def submit_alone(self, function: Callable[..., _T], /, *arguments: Any) -> Future[_T]:
        """Queue a call that shares its process with no other."""
        return self._queued(_Call(Future(), function, arguments, alone=True))

    def _queued(self, call: _Call) -> Future[Any]:
        with self._lock:
            if self._closed:
                raise RuntimeError("these lanes are closed")
            self._queue.append(call)
            self._dispatch()
        return call.future

    def pids(self) -> list[int]:
        """Process ids of the lanes that are alive."""
        with self._lock:
            return [pid for lane in self._lanes if (pid := lane.pid) is not None]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes; with ``wait`` after the calls in hand (and, unless cancelled, the queue)."""
        with self._lock:
            self._closed = True
            pending = [] if cancel_futures else [call.future for call in self._queue]
            if cancel_futures:
                for call in self._queue:
                    call.future.cancel()
                self._queue.clear()
            pending += [call.future for lane in self._lanes for call in lane.pending.values()]
        if wait:
            for future in pending:
                with contextlib.suppress(CancelledError):
                    future.exception()
        for lane in self._lanes:
            lane.kill("the run was stopped")

    def stop(self) -> None:
        """End all processes now, whatever they are doing."""
        self.shutdown(wait=False, cancel_futures=True)

    def _freed(self) -> None:
        with self._lock:
            self._dispatch()

    def _dispatch(self) -> None:
        """Hand calls to the emptiest lanes that take them; the lock is held."""
        while self._queue:
            call = self._queue[0]
            lanes = sorted(self._lanes, key=lambda lane: len(lane.pending))
            lane = next((lane for lane in lanes if lane.takes(call)), None)
            if lane is None:
                return
            self._queue.popleft()
            if call.future.set_running_or_notify_cancel():
                lane.send(call)


class _Lane:
    """One process at a time, and the calls that it has in hand."""

    def __init__(
        self,
        environment: Mapping[str, str],
        slots: int,
        memory: int | None,
        freed: Callable[[], None],
        lock: threading.RLock,
    ) -> None:
        self.pending: dict[int, _Call] = {}
        self._environment, self._slots, self._memory = dict(environment), slots, memory
        self._freed, self._lock = freed, lock
        self._numbers = itertools.count()
        self._process: Any = None
        self._connection: Connection | None = None
        self._why = ""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.is_alive() else None

    def takes(self, call: _Call) -> bool:
        if not self.pending:
            return True
        crowded = call.alone or any(other.alone for other in self.pending.values())
        return not crowded and len(self.pending) < self._slots

    def send(self, call: _Call) -> None:
        number = next(self._numbers)
        self.pending[number] = call
        try:
            if self._process is None:
                self._start()
            assert self._connection is not None  # noqa: S101
            self._connection.send((number, call.function, call.arguments))
        except (BrokenPipeError, ConnectionResetError):
            pass  # it died since: the listener fails what is pending
        except Exception as error:  # what cannot be pickled raises whatever it likes
            del self.pending[number]
            call.future.set_exception(error)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._why = ""
        process = context.Process(target=_serve, args=(theirs, self._slots), name="lane", daemon=True)
        with environment(self._environment | {"PYTHONWARNINGS": _warnings()}):
            process.start()
        theirs.close()
        self._process = process
        listener = threading.Thread(
            target=self._listen, args=(process, self._connection), name="lane", daemon=True
        )
        listener.start()

    def _listen(self, process: Any, connection: Connection) -> None:
        """Hand out results until the process ends; then fail what it had in hand."""
        while True:
            ready = wait([connection, process.sentinel], LOOK_SECONDS)
            if connection in ready:
                try:
                    number, result, failure = connection.recv()
                except (EOFError, OSError):
                    break
                except Exception as error:  # whatever a foreign class does when it is unpickled
                    self.kill(f"its answer cannot be read ({type(error).__name__})")
                    break
                self._finished(number, result, failure)
            elif process.sentinel in ready:
                break
            elif self._why:
                break  # killed, and it does not end: a file system does not answer it
            elif self._memory is not None and rss(process.pid) > self._memory:
                self.kill(f"it needed more than the {self._memory / 2**20:.0f} MiB that a worker may take")
        process.join(JOIN_SECONDS)
        connection.close()
        self._died(process.exitcode)

    def _finished(self, number: int, result: Any, error: BaseException | None) -> None:
        with self._lock:
            call = self.pending.pop(number, None)
        if call is not None:
            if error is None:
                call.future.set_result(result)
            else:
                call.future.set_exception(error)
        self._freed()

    def _died(self, exitcode: int | None) -> None:
        with self._lock:
            lost = list(self.pending.values())
            self.pending.clear()
            self._process = self._connection = None
            why = self._why or _cause(exitcode)
        for call in lost:
            call.future.set_exception(WorkerDiedError(f"the worker died: {why}", alone=len(lost) == 1))
        self._freed()

    def kill(self, why: str) -> None:
        with self._lock:
            process, self._why = self._process, self._why or why
        if process is not None:
            process.kill()
            process.join(JOIN_SECONDS)


def _warnings() -> str:
    """Keeps Python's resource tracker from telling users that a killed process left semaphores behind; it
    removes them all the same."""
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    return ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), quiet)))


def _cause(exitcode: int | None) -> str:
    if exitcode is None:
        return "it does not end, although it was killed (a file system that does not answer?)"
    if exitcode >= 0:
        return f"it ended with exit code {exitcode}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-exitcode).name
        hint = {"SIGKILL": ", killed from outside or for want of memory", "SIGSEGV": ", a decoder crashed"}
        return f"{name}{hint.get(name, '')}"
    return f"signal {-exitcode}"


def _packed(number: int, result: Any, failure: BaseException | None) -> bytes:
    """An answer as bytes that the parent can read; errors of foreign code often cannot be unpickled."""
    try:
        data = bytes(ForkingPickler.dumps((number, result, failure)))
        if failure is not None:
            pickle.loads(data)  # noqa: S301  our own bytes
        return data
    except Exception as error:
        told = f"{type(result if failure is None else failure).__name__}: {failure} ({type(error).__name__})"
        return bytes(ForkingPickler.dumps((number, None, RuntimeError(told))))


def _serve(connection: Connection, slots: int) -> None:
    """The life of a lane's process: take calls until the parent closes the line or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's affair
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sending = threading.Lock()

    def answer(number: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        result, failure = None, None
        try:
            result = function(*arguments)
        except BaseException as error:  # noqa: BLE001  it belongs to whoever asked
            failure = error
            if not str(failure.__class__.__module__).startswith("wsi_pipeline"):
                failure.add_note(traceback.format_exc())
        data = _packed(number, result, failure)
        with sending:
            try:
                connection.send_bytes(data)
            except OSError:
                os._exit(1)

    pool = ThreadPoolExecutor(slots, "call")
    while True:
        try:
            pool.submit(answer, *connection.recv())
        except (EOFError, OSError):
            os._exit(1)
