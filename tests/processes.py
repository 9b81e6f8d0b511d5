"""Several processes that compute together: each runs what it is told to, and its answer comes back."""

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

# Longer than a machine under load needs, shorter than anybody waits for a test that hangs.
TIMEOUT_S = 300


class Processes:
    """One per rank, in a gloo group of their own that lasts as long as the object's context.

    They are started once for many tests: importing torch takes longer than most tests.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        context = torch.multiprocessing.get_context("spawn")
        with tempfile.NamedTemporaryFile(prefix="fusedloss-test-group-", delete=False) as file:
            store = f"file://{file.name}"
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], arguments_of: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """function(*arguments_of(rank)) on each rank; the results in their order. An error on a rank is raised here."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send((function, arguments_of(rank)))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.stop()
                raise TimeoutError(f"rank {rank} of {self.size} did not answer in {TIMEOUT_S} s")
            answers.append(pipe.recv())
        for rank, (_, error) in enumerate(answers):
            if error is not None:
                raise AssertionError(f"on rank {rank} of {self.size}:\n{error}")
        return [result for result, _ in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


@contextlib.contextmanager
def processes(size: int) -> Iterator[Processes]:
    started = Processes(size)
    try:
        yield started
    finally:
        started.stop()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
