"""Heartbeats of the ranks of a run, as files, and detection of dead or hung ranks.

``<run.dir>/ranks/rank_00003.json`` has rank 3's host, process, step, stack of phases and time since its last
progress; ``rank_00003.traceback`` is written when it hangs, fails or crashes. A thread of each rank writes
its file and watches the next rank's (rank 0's is next to the last). The rank that finds a dead rank, or no
progress on any rank for ``run.hang_timeout_seconds``, writes ``failure.txt``, prints it and exits; launchers
then stop the other ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megarl.files import as_user_error

FAILURE_FILE = "failure.txt"
_TRACEBACK_LINES = 40
_STEP_SECONDS = 1.0  # minimum interval between heartbeats caused by a new step
_LOOK_SECONDS = 1.0  # search for dead ranks after an error, e.g. of a collective


class Heartbeat:
    """Writes the heartbeat of one rank and watches the others.

    Args:
        folder: <run.dir>/ranks, on a file system that all ranks share.
        rank, world_size: of this process.
        timeout: seconds without a heartbeat, or without progress on any rank, after which the run stops.
        activity: returns the open phases and a counter of progress.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        timeout: float,
        activity: Callable[[], tuple[tuple[str, ...], int]],
    ) -> None:
        self._folder, self._rank, self._size, self._timeout = folder, rank, world_size, timeout
        self._activity = activity
        self._interval = min(5.0, max(0.1, timeout / 20))
        self._step = 0
        self._beats, self._written = 0, 0.0
        self._state = "running"
        self._progress, self._moved = -1, time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its beats, and when they last changed
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._crashes: IO[str] | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def step(self) -> int:
        """The current step; set by the run."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        began, self._step = self._step == 0, step
        # Keep the step in the file current, but limit the rate of writes for very short steps.
        if began or time.monotonic() - self._written > _STEP_SECONDS:
            with self._tolerate_disk_errors():
                self._write()

    def start(self) -> None:
        """Start; the folder exists and rank 0 has emptied it."""
        traceback_file(self._folder, self._rank).unlink(missing_ok=True)
        # A crash (SIGSEGV, SIGABRT ...) leaves its traceback here.
        self._crashes = traceback_file(self._folder, self._rank).open("w")
        faulthandler.enable(self._crashes, all_threads=True)
        self._write()
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Stop, normally or with the error that ends this rank; report ranks that died before it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.disable()
        if self._crashes is not None:
            self._crashes.close()
        if error is None or isinstance(error, SystemExit):
            self._state = "ended"
            with suppress(OSError):
                traceback_file(self._folder, self._rank).unlink(missing_ok=True)
        else:
            self._state = "failed"
            with suppress(OSError):  # a full disk, perhaps the one that the error is about
                path = traceback_file(self._folder, self._rank)
                path.write_text("".join(traceback.format_exception(error)))
        with suppress(OSError):
            self._write()
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt) or as_user_error(error):
            return
        if self._size == 1 or not self._report_dead_ranks():
            print(
                f"error: {explain(self._folder, self._rank, 'failed', show_traceback=False)}", file=sys.stderr
            )

    # --- this rank ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            with self._tolerate_disk_errors():
                self._write()
            with self._tolerate_disk_errors():
                if not self._watch_next():
                    self._watch_progress()

    @contextmanager
    def _tolerate_disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the file system may be unavailable for a moment
            print(f"heartbeat of rank {self._rank}: {error}", file=sys.stderr)

    def _write(self) -> None:
        path = heartbeat_file(self._folder, self._rank)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with self._lock:
            temporary.write_text(json.dumps(self._beat()))
            os.replace(temporary, path)

    def _beat(self) -> dict[str, Any]:
        phases, progress = self._activity()
        now = self._written = time.monotonic()
        if progress != self._progress:
            self._progress, self._moved = progress, now
        self._beats += 1
        return {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot": _boot_id(),
            "state": self._state,
            "step": self._step,
            "phases": phases,
            "quiet_seconds": round(now - self._moved, 3),
            "beats": self._beats,
            "time": time.time(),
        }

    # --- the others ---------------------------------------------------------------------------

    def _watch_next(self) -> bool:
        """Stop the run if the next rank is dead or silent; return whether it did (only tests return)."""
        other = (self._rank + 1) % self._size
        if other == self._rank:
            return False
        beat = read_heartbeat(self._folder, other)
        if beat is None or beat["state"] != "running":
            return False
        now = time.monotonic()
        beats, since = self._seen.get(other, (-1, now))
        if beat["beats"] != beats:
            self._seen[other] = (beat["beats"], now)
            silent = 0.0
        else:
            silent = now - since
        if is_dead(beat):
            # Its launcher, or the error of a collective, may report more.
            if not self._stop.wait(2 * self._interval):
                self._fail([other], "has died")
            return True
        if silent > self._timeout:
            self._fail([other], f"has sent no heartbeat for {silent:.0f} s")
            return True
        return False

    def _watch_progress(self) -> None:
        """Stop the run if no rank has made progress for too long."""
        if time.monotonic() - self._moved <= self._timeout:
            return
        self._dump_traceback()
        found = [read_heartbeat(self._folder, rank) for rank in range(self._size)]
        beats = [beat for beat in found if beat is not None and beat["state"] == "running"]
        if any(beat["quiet_seconds"] < self._timeout - 2 * self._interval for beat in beats):
            return  # this rank waits for one that is working, or whose heartbeat has stopped
        if not self._stop.wait(2 * self._interval):  # time for the others to write their tracebacks
            self._fail(_stragglers(beats), f"has made no progress for {self._timeout:g} s")

    def _report_dead_ranks(self) -> bool:
        """After an error, report dead ranks that may have caused it; return whether there are any."""
        deadline = time.monotonic() + _LOOK_SECONDS
        while time.monotonic() < deadline:
            beats = [read_heartbeat(self._folder, rank) for rank in range(self._size)]
            dead = [b["rank"] for b in beats if b is not None and b["state"] == "running" and is_dead(b)]
            if dead:
                report(self._folder, dead, "has died")
                return True
            time.sleep(0.05)
        return False

    def _dump_traceback(self) -> None:
        path = traceback_file(self._folder, self._rank)
        temporary = path.with_suffix(".tmp")
        with temporary.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        os.replace(temporary, path)  # another rank may be reading it
        before, self._crashes = self._crashes, path.open("a")
        faulthandler.enable(self._crashes, all_threads=True)
        if before is not None:
            before.close()

    def _fail(self, ranks: list[int], what: str) -> None:
        self._dump_traceback()  # shows where this rank waits for the failed ones
        report(self._folder, ranks, what)
        sys.stdout.flush()
        # Not an exception: the main thread may be inside a collective that never returns.
        os._exit(1)


def clear(folder: Path) -> None:
    """Rank 0, before any rank starts: create or empty the folder."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def report(folder: Path, ranks: list[int], what: str) -> None:
    """Write the failed ranks to failure.txt and standard error, once per run."""
    try:
        with (folder / FAILURE_FILE).open("x") as file:
            text = "\n".join(explain(folder, rank, what) for rank in ranks) + _others(folder, ranks)
            file.write(text + "\n")
    except FileExistsError:  # another rank was first
        return
    except OSError:
        text = "\n".join(explain(folder, rank, what) for rank in ranks)
    print(f"error: {text}", file=sys.stderr, flush=True)


def first_line(folder: Path) -> str | None:
    """Return the text of failure.txt, which describes the rank that ended the run; None without one."""
    try:
        text = (folder / FAILURE_FILE).read_text(errors="replace")
    except OSError:
        return None
    return next(iter(text.splitlines()), None)


def explain(folder: Path, rank: int, what: str, *, show_traceback: bool = True) -> str:
    """Describe a failed rank: its host and process, the failure, its last phase and its traceback."""
    beat = read_heartbeat(folder, rank)
    if beat is None:
        return f"rank {rank} {what} before its run began"
    text = f"rank {rank} (host {beat['host']}, process {beat['pid']}) {what}; last seen {_where(beat)}"
    if not show_traceback:  # Python is about to print it
        return text
    path = traceback_file(folder, rank)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines:
        shown = lines[:_TRACEBACK_LINES]
        rest = [f"... (full traceback: {path})"] if len(lines) > len(shown) else []
        return "\n  | ".join([text + ", with this traceback:", *shown, *rest])
    return f"{text}; no traceback"


def _where(beat: dict[str, Any]) -> str:
    phases = " > ".join(beat["phases"]) or "between phases"
    if beat["step"] == 0 and not beat["phases"]:
        return f"starting, {beat['quiet_seconds']:.0f} s after its last progress"
    return f"in step {beat['step']}, phase {phases}, {beat['quiet_seconds']:.0f} s after its last progress"


def _others(folder: Path, ranks: list[int]) -> str:
    """Describe the phases of the other ranks, grouped."""
    places: dict[str, list[int]] = {}
    for path in sorted(folder.glob("rank_*.json")):
        rank = int(path.stem.removeprefix("rank_"))
        beat = read_heartbeat(folder, rank)
        if beat is not None and rank not in ranks:
            where = f"step {beat['step']}, phase {' > '.join(beat['phases']) or 'between phases'}"
            places.setdefault(where, []).append(rank)
    lines = [f"ranks {_spans(found)}: {where}" for where, found in places.items()]
    return "".join(f"\n{line}" for line in lines)


def _spans(ranks: list[int]) -> str:
    """Format [0, 1, 2, 5] as "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _stragglers(beats: list[dict[str, Any]]) -> list[int]:
    """Return the likely culprits when no rank progresses: those in the phase with the fewest ranks."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for beat in beats:
        places.setdefault((beat["step"], *beat["phases"]), []).append(beat["rank"])
    return min(places.values(), key=len)


def is_dead(beat: dict[str, Any]) -> bool:
    """Return whether the process of a heartbeat on this machine has exited; False on other machines."""
    if beat["boot"] != _boot_id():
        return False
    try:
        stat = Path(f"/proc/{beat['pid']}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def read_heartbeat(folder: Path, rank: int) -> dict[str, Any] | None:
    """Read the last heartbeat of a rank; None if there is none."""
    try:
        values: dict[str, Any] = json.loads(heartbeat_file(folder, rank).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return values


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat."""
    return folder / f"rank_{rank:05}.json"


def traceback_file(folder: Path, rank: int) -> Path:
    """Return the path of a rank's traceback, written when it hangs, fails or crashes."""
    return folder / f"rank_{rank:05}.traceback"


def _boot_id() -> str:
    """Return an id that is equal in two processes that see each other in /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
