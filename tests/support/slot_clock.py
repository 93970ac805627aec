"""Counts the slots of Megatron's schedules on real ranks, by a logical clock.

A forward of a chunk takes one slot, a backward two; a stage that receives goes on when the sender
has sent (Lamport's clocks, 1978). Messages take no time, and nothing is measured by a watch.
"""

from typing import Any

from torch import distributed as dist


class SlotClock:
    """The time of one rank, which its schedules and messages move on."""

    def __init__(self) -> None:
        """From now on; after Megatron's groups are made."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        self.now = 0
        self._store = dist.distributed_c10d._get_default_store()
        self._counts: dict[str, int] = {}
        communicator: Any = P2PCommunicator
        own, plain = dist.get_rank(), communicator._communicate
        following, before = (
            parallel_state.get_pipeline_model_parallel_next_rank(),
            parallel_state.get_pipeline_model_parallel_prev_rank(),
        )

        def communicate(*args: Any, **how: Any) -> Any:
            if how["tensor_send_next"] is not None:
                self._store.set(self._next(f"{own}>{following}"), str(self.now))
            if how["tensor_send_prev"] is not None:
                self._store.set(self._next(f"{own}<{before}"), str(self.now))
            found = plain(*args, **how)
            keys = [f"{before}>{own}"] * how["recv_prev"] + [f"{following}<{own}"] * how[
                "recv_next"
            ]
            self.now = max([self.now, *(int(self._store.get(self._next(key))) for key in keys)])
            return found

        communicator._communicate = communicate
        for name, slots in (("forward_step", 1), ("backward_step", 2)):
            setattr(schedules, name, self._counted(getattr(schedules, name), slots))

    def _next(self, direction: str) -> str:
        """The key of the next message that goes this way."""
        self._counts[direction] = self._counts.get(direction, 0) + 1
        return f"{direction} {self._counts[direction]}"

    def _counted(self, plain: Any, slots: int) -> Any:
        def counted(*args: Any, **how: Any) -> Any:
            found = plain(*args, **how)
            self.now += slots
            return found

        return counted

    def of_step(self) -> int:
        """Slots since the last call, over all ranks; the clock starts again. Collectives: one."""
        times: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(times, self.now)
        self.now = 0
        return max(times)
