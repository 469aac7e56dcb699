"""What every rank of a run is doing, in files of the run directory, and the end of runs that hang.

``<run.dir>/ranks/rank_00003.json`` says who rank 3 is (host, process), which step it is in, its stack of
phases and since when nothing was finished; ``rank_00003.traceback`` is written when it hangs, fails or
crashes. A thread of each rank writes its own file and watches the next rank's (rank 0 is next to the last).
Whoever finds a rank gone, or all ranks silent for ``run.hang_timeout_seconds``, writes ``failure.txt``,
prints it and ends its process; launchers then end the other ranks.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megarl.errors import UserError

FAILURE_FILE = "failure.txt"
_TRACEBACK_LINES = 40
_STEP_SECONDS = 1.0  # the least between two signs of life because of a new step
_LOOK_SECONDS = 1.0  # after the error of a collective: its cause is dead already


class Heartbeat:
    """Signs of life of one rank, and a look at the others'.

    Args:
        folder: <run.dir>/ranks, on a file system that all ranks see.
        rank, world_size: who this is.
        timeout: seconds without a sign of life, or without progress of any rank, that end the run.
        activity: the open phases and a number that grows with progress.
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
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its beats, when they were new here
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._crashes: IO[str] | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    @property
    def step(self) -> int:
        """The step that is being done; set by the run."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        began, self._step = self._step == 0, step
        # The file is to name the step, but not at the pace of steps of milliseconds.
        if began or time.monotonic() - self._written > _STEP_SECONDS:
            with self._bearing_with_the_disk():
                self._write()

    def start(self) -> None:
        """Begin; the folder exists and has been emptied by rank 0."""
        traceback_file(self._folder, self._rank).unlink(missing_ok=True)
        # A crash (SIGSEGV, SIGABRT ...) leaves its traceback here.
        self._crashes = traceback_file(self._folder, self._rank).open("w")
        faulthandler.enable(self._crashes, all_threads=True)
        self._write()
        self._thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """End in order, or with the error that ends this rank; names ranks that went before it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.disable()
        if self._crashes is not None:
            self._crashes.close()
        if error is None or isinstance(error, SystemExit):
            self._state = "ended"
            traceback_file(self._folder, self._rank).unlink(missing_ok=True)
        else:
            self._state = "failed"
            traceback_file(self._folder, self._rank).write_text("".join(traceback.format_exception(error)))
        self._write()
        if error is None or isinstance(error, SystemExit | KeyboardInterrupt | UserError):
            return
        if self._size == 1 or not self._look_for_the_dead():
            print(
                f"error: {explain(self._folder, self._rank, 'failed', show_traceback=False)}", file=sys.stderr
            )

    # --- this rank ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            with self._bearing_with_the_disk():
                self._write()
            with self._bearing_with_the_disk():
                if not self._watch_next():
                    self._watch_progress()

    @contextmanager
    def _bearing_with_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the file system may be away for a moment
            print(f"heartbeat of rank {self._rank}: {error}", file=sys.stderr)

    def _write(self) -> None:
        path = heartbeat_file(self._folder, self._rank)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with self._lock:
            temporary.write_text(json.dumps(self._sign_of_life()))
            os.replace(temporary, path)

    def _sign_of_life(self) -> dict[str, Any]:
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
        """End the run if the next rank is gone; whether it did (only in tests does that return)."""
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
            # Its launcher, or an error of a collective, may say more.
            if not self._stop.wait(2 * self._interval):
                self._fail([other], "is gone")
            return True
        if silent > self._timeout:
            self._fail([other], f"has given no sign of life for {silent:.0f} s")
            return True
        return False

    def _watch_progress(self) -> None:
        """End the run if neither this rank nor any other has finished anything for too long."""
        if time.monotonic() - self._moved <= self._timeout:
            return
        self._dump_traceback()
        found = [read_heartbeat(self._folder, rank) for rank in range(self._size)]
        beats = [beat for beat in found if beat is not None and beat["state"] == "running"]
        if any(beat["quiet_seconds"] < self._timeout - 2 * self._interval for beat in beats):
            return  # this rank waits for one that is at work, or that has lost its own signs of life
        if not self._stop.wait(2 * self._interval):  # the others write their tracebacks too
            self._fail(_odd_ones(beats), f"has finished nothing for {self._timeout:g} s")

    def _look_for_the_dead(self) -> bool:
        """After an error that may come from a rank that is no more: name that rank; whether there is one."""
        deadline = time.monotonic() + _LOOK_SECONDS
        while time.monotonic() < deadline:
            beats = [read_heartbeat(self._folder, rank) for rank in range(self._size)]
            dead = [b["rank"] for b in beats if b is not None and b["state"] == "running" and is_dead(b)]
            if dead:
                report(self._folder, dead, "is gone")
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
        self._dump_traceback()  # where this rank waits for those that are named
        report(self._folder, ranks, what)
        sys.stdout.flush()
        # Not an exception: the main thread may be inside a collective that never returns.
        os._exit(1)


def clear(folder: Path) -> None:
    """Rank 0, before any rank starts: an empty folder."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def report(folder: Path, ranks: list[int], what: str) -> None:
    """Say once per run which ranks ended it: into failure.txt, and to standard error."""
    try:
        with (folder / FAILURE_FILE).open("x") as file:
            text = "\n".join(explain(folder, rank, what) for rank in ranks) + _others(folder, ranks)
            file.write(text + "\n")
    except FileExistsError:  # another rank was first
        return
    except OSError:
        text = "\n".join(explain(folder, rank, what) for rank in ranks)
    print(f"error: {text}", file=sys.stderr, flush=True)


def explain(folder: Path, rank: int, what: str, *, show_traceback: bool = True) -> str:
    """One rank's name, what is wrong with it, its last phase and its traceback."""
    beat = read_heartbeat(folder, rank)
    if beat is None:
        return f"rank {rank} {what}; it had not begun its run"
    text = f"rank {rank} (host {beat['host']}, process {beat['pid']}) {what}; last seen {_where(beat)}"
    if not show_traceback:  # Python is about to print it
        return text
    path = traceback_file(folder, rank)
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if lines:
        shown = lines[:_TRACEBACK_LINES]
        rest = [f"... (all of it in {path})"] if len(lines) > len(shown) else []
        return "\n  | ".join([text + ", with this traceback:", *shown, *rest])
    return f"{text}; it has left no traceback"


def _where(beat: dict[str, Any]) -> str:
    phases = " > ".join(beat["phases"]) or "between phases"
    if beat["step"] == 0 and not beat["phases"]:
        return f"starting, {beat['quiet_seconds']:.0f} s after its last progress"
    return f"in step {beat['step']}, phase {phases}, {beat['quiet_seconds']:.0f} s after its last progress"


def _others(folder: Path, ranks: list[int]) -> str:
    """Where the other ranks were, those in one place together."""
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
    """[0, 1, 2, 5] as 0-2, 5."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _odd_ones(beats: list[dict[str, Any]]) -> list[int]:
    """The ranks to look at first when all are silent: those in the place that fewest are in."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for beat in beats:
        places.setdefault((beat["step"], *beat["phases"]), []).append(beat["rank"])
    return min(places.values(), key=len)


def is_dead(beat: dict[str, Any]) -> bool:
    """Whether the process behind a heartbeat of this machine has ended; of other machines, False."""
    if beat["boot"] != _boot_id():
        return False
    try:
        stat = Path(f"/proc/{beat['pid']}/stat").read_text()
    except OSError:
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def read_heartbeat(folder: Path, rank: int) -> dict[str, Any] | None:
    """What a rank last said of itself; None where it has not said anything."""
    try:
        values: dict[str, Any] = json.loads(heartbeat_file(folder, rank).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return values


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Where a rank says what it is doing."""
    return folder / f"rank_{rank:05}.json"


def traceback_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its traceback when it hangs, fails or crashes."""
    return folder / f"rank_{rank:05}.traceback"


def _boot_id() -> str:
    """Equal in two processes that see each other in /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
