"""Functions run on several ranks: processes with a gloo group, kept for the whole test session."""

import atexit
import datetime
import functools
import multiprocessing
import pickle
import tempfile
import traceback
from pathlib import Path

import torch
from torch import distributed as dist

SECONDS = 120  # for one function
COLLECTIVE = datetime.timedelta(seconds=60)  # a rank that waits for one that failed gives up


def on_ranks(ranks, function, *args):
    """What a module-level function returns on each of this many ranks, in their order.

    Raises:
        AssertionError: it failed on a rank, with that rank's traceback.
    """
    return _processes(ranks).run(function, args)


@functools.cache
def _processes(ranks):
    return _Processes(ranks)


class _Processes:
    """Processes that run what they are sent; importing torch in each costs seconds, so they stay.

    After a failure new ones are started: a collective may be half done.
    """

    def __init__(self, ranks):
        self.ranks = ranks
        self.workers = []
        atexit.register(self.stop)

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            args = (rank, self.ranks, f"{self.folder.name}/store", theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def stop(self):
        for process, pipe in self.workers:
            pipe.close()
            process.terminate()
            process.join()
        if self.workers:
            self.folder.cleanup()
        self.workers = []

    def run(self, function, args):
        if not self.workers:
            self.start()
        task = pickle.dumps((function, args))
        for _, pipe in self.workers:
            pipe.send_bytes(task)
        answers = [self.answer(rank) for rank in range(self.ranks)]
        failed = [text for works, text in answers if not works]
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def answer(self, rank):
        _, pipe = self.workers[rank]
        try:
            if pipe.poll(SECONDS):
                return pickle.loads(pipe.recv_bytes())
        except EOFError:
            return False, f"rank {rank} died"
        return False, f"rank {rank} took longer than {SECONDS} s"


def _serve(rank, ranks, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=ranks, timeout=COLLECTIVE
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the session is over
            return
        torch.manual_seed(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, f"rank {rank}:\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))
