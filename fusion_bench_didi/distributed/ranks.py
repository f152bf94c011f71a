"""The processes of one job, what they tell one another, and how long they wait for one another.

Values are exchanged on the CPU (gloo), whatever device the job computes on. Before an exchange every rank waits until all
others are there, and watches them meanwhile: a rank that failed says so; one that is not heard of any more, or does not get on,
is named with what it was last at. A *rank* is the number of a process here, never
that of a matrix.
"""

import atexit
import contextlib
import itertools
import os
import pickle
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import RankError, SettingsError

Key, Value = TypeVar("Key"), TypeVar("Value")
_GO_ON = "What is finished lies beside output_dir, if there is one: the same command goes on from there."

#: Seconds for which a rank may be at one and the same tensor before others give up waiting for it, unless the environment says
#: otherwise.
PATIENCE = 1800.0
_VARIABLE = "FUSION_BENCH_DIDI_RANK_TIMEOUT"
#: Seconds without any sign after which a rank counts as ended.
SILENCE = 120.0
#: Seconds between two looks at who is there; from the first to the last.
_LOOKS = 0.002, 0.2


def patience() -> float:
    """:data:`PATIENCE`, or what the environment says.

    Raises:
        SettingsError: if that is no number of seconds.
    """
    given = os.environ.get(_VARIABLE, PATIENCE)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise SettingsError(
            f"{_VARIABLE}={given} is no number of seconds above 0. Set it to one, {_VARIABLE}=1800 for instance, or unset it."
        )
    return seconds


class Ranks:
    """The processes of a job, of which this is one.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Others are told what this process is at while the block runs."""
        yield

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, by rank; called by all of them. Those of others are copies."""
        return [value]

    def gathered(self, found: Mapping[Key, Value]) -> dict[Key, Value]:
        """Mappings of all ranks as one; called by all of them."""
        return {key: one[key] for one in self.gather(dict(found)) for key in one}

    def from_first(self, value: Value) -> Value:
        """The value of rank 0."""
        return self.gather(value if self.leads else None)[0]

    def share(self, count: int) -> Iterator[int]:
        """Numbers below ``count``, each to the rank that asks for it first; all ranks call this, once between two exchanges.

        Who has none left waits for the others as long as they live, whatever each of them works on.
        """
        yield from range(count)

    def fail(self, error: BaseException) -> None:
        """Tell those that wait for this process that it failed."""


ALONE = Ranks()


class _Several(Ranks):
    """Ranks of an initialized ``torch.distributed``."""

    def __init__(self):
        patience()  # whoever waits needs it
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self._store = self._common_store()
        self._turn = self._steps = 0
        self._hurried = True
        self._now: list[str] = []
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()
        atexit.register(self._stop)

    def _beat(self) -> None:
        """Signs of life, which come from a thread of their own, as long as rank 0 is there to take them."""
        for count in itertools.count():
            try:
                self._store.set(f"beat/{self.rank}", str(count))
            except Exception:
                return
            if self._ends.wait(min(1.0, SILENCE / 10)):
                return

    def _stop(self) -> None:
        """End the thread, and gloo's, while there is an interpreter: what is within torch when that ends aborts the process."""
        self._ends.set()
        self._heart.join(5)
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    def _common_store(self) -> dist.TCPStore:
        """Kept by rank 0; what ranks say about themselves is there."""
        host = os.environ.get("MASTER_ADDR", "localhost")
        options = {"timeout": timedelta(seconds=60), "wait_for_workers": False}
        store = None
        if self.leads:
            store = dist.TCPStore(host, 0, is_master=True, **options)
        port = [store.port if store else None]
        dist.broadcast_object_list(port, src=0, group=self._group)
        return store or dist.TCPStore(host, port[0], is_master=False, **options)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        with self._lock:
            self._now.append(what)
            self._say()
        try:
            yield
        finally:
            with self._lock:
                self._now.remove(what)
                self._say()

    def _say(self) -> None:
        self._steps += 1
        what = ", ".join(self._now) or "what comes between matrices"
        with _told():
            self._store.set(f"at/{self.rank}", f"{self._steps} {what}")

    def share(self, count: int) -> Iterator[int]:
        taken = f"taken/{self._turn}"
        while True:
            with _told():
                number = self._store.add(taken, 1) - 1
            if number >= count:
                self._hurried = False
                return
            yield number

    def fail(self, error: BaseException) -> None:
        what = f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # rank 0, which keeps the store, is gone
            self._store.set("failed", f"{self.rank} {what[:2000]}")
        self._let_go()

    def _let_go(self) -> None:
        """What comes next in this job has a store of its own: this one says for good that a rank failed, to whoever still asks."""
        global _several
        self._ends.set()
        if _several is self:
            _several = None

    def gather(self, value: Value) -> list[Value]:
        sent = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._turn += 1
        with _told():
            self._store.set(f"turn/{self._turn}/{self.rank}", "")
            self._wait()
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            here = torch.tensor([len(sent)])
            dist.all_gather(sizes, here, group=self._group)
            found: list[Any] = []
            for rank, size in enumerate(sizes):
                mine = rank == self.rank
                there = sent if mine else torch.empty(int(size), dtype=torch.uint8)
                dist.broadcast(there, src=rank, group=self._group)
                found.append(value if mine else pickle.loads(there.numpy()))
                del there
        self._hurried = True
        return found

    def _wait(self) -> None:
        """Until every rank has come to this exchange.

        Raises:
            RankError: if one failed, or does not get on.
        """
        begun, pause = time.monotonic(), _LOOKS[0]
        missing = {r: _Signs(begun, begun) for r in range(self.size)}
        while True:
            there = [r for r in missing if self._has(f"turn/{self._turn}/{r}")]
            for rank in there:
                del missing[rank]
            if not missing:
                return
            if self._has("failed"):
                rank, _, what = self._store.get("failed").decode().partition(" ")
                self._let_go()
                raise RankError(f"Rank {rank} of {self.size} failed: {what}")
            for rank, signs in missing.items():
                signs.note(self._said(f"at/{rank}"), self._said(f"beat/{rank}"))
                self._check(rank, signs)
            time.sleep(pause)
            pause = min(1.5 * pause, _LOOKS[1])

    def _check(self, rank: int, signs: "_Signs") -> None:
        now, what = time.monotonic(), signs.at.partition(" ")[2] or "nothing yet"
        if now - signs.alive > SILENCE:
            raise RankError(
                f"Rank {rank} of {self.size} has not been heard of for {SILENCE:g} s; it was last at {what}. It has ended, or its "
                f"machine has. {_GO_ON}"
            )
        if self._hurried and now - signs.moved > (most := patience()):
            raise RankError(
                f"Rank {rank} of {self.size} has not got on for {most:g} s; it was last at {what}. Where one matrix takes longer "
                f"than that, set {_VARIABLE}=<seconds>. {_GO_ON}"
            )

    def _said(self, key: str) -> str:
        return self._store.get(key).decode() if self._has(key) else ""

    def _has(self, key: str) -> bool:
        return self._store.check([key])


@dataclass
class _Signs:
    """Signs of life of a rank that is waited for, and when they were new."""

    moved: float
    alive: float
    at: str = ""
    beat: str = ""

    def note(self, at: str, beat: str) -> None:
        now = time.monotonic()
        if at != self.at:
            self.at, self.moved, self.alive = at, now, now
        if beat != self.beat:
            self.beat, self.alive = beat, now


@contextmanager
def _told() -> Iterator[None]:
    """A connection that breaks means that a process at its other end has ended."""
    try:
        yield
    except RankError:
        raise
    except (RuntimeError, ConnectionError) as error:
        raise RankError(
            f"Another rank of this merge has ended or cannot be reached ({str(error).splitlines()[0]}). Look at what it printed. "
            f"{_GO_ON}"
        ) from error


_several: _Several | None = None
_by_itself = False


@contextmanager
def by_itself() -> Iterator[None]:
    """While the block runs this process knows of no others: what it does, it does alone.

    Neither does what asks torch, such as metrics, which would wait for figures of all ranks. Nothing is exchanged meanwhile.
    """
    global _by_itself
    several = dist.is_available() and dist.is_initialized()
    world = dist.GroupMember.WORLD if several else None
    before, _by_itself = _by_itself, True
    try:
        if several:
            dist.GroupMember.WORLD = None
        yield
    finally:
        _by_itself = before
        if several:
            dist.GroupMember.WORLD = world


def ranks_here() -> Ranks:
    """The processes of this job; :data:`ALONE` where there is no other. The first call, and the first after a failure, is one that
    all make.
    """
    global _several
    if _by_itself:
        return ALONE
    if not dist.is_available() or not dist.is_initialized():
        _several = None
        return ALONE
    if dist.get_world_size() == 1:
        return ALONE
    if _several is None:
        _several = _Several()
    return _several


def check_started(ranks: Ranks) -> None:
    """Check that the processes in which ``torchrun`` started one program know of one another.

    Raises:
        RankError: if they do not, so that each would do everything.
    """
    if ranks.size > 1 or _by_itself or not dist.is_available():
        return
    if not dist.is_torchelastic_launched():
        return
    size, here = (int(os.environ.get(f"{p}WORLD_SIZE", 1)) for p in ("", "LOCAL_"))
    if size > 1:
        nodes = f" ++fabric.num_nodes={size // here}" if size > here else ""
        raise RankError(
            f"torchrun started {size} processes, and this one knows of no other, so that each would do all of it. Give "
            f"fabric.devices={here}{nodes}."
        )


def check_alone(ranks: Ranks, what: str) -> None:
    """Check that one process runs what cannot be spread over several.

    Raises:
        RankError: if there are several ranks.
    """
    if ranks.size > 1:
        raise RankError(
            f"{what} runs on one process, and there are {ranks.size}: each would do all of it. Set fabric.devices=1 and "
            "++fabric.num_nodes=1."
        )
