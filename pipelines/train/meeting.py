"""Where the workers of a training group meet. A file of its own, since its process imports nothing else."""

from __future__ import annotations

import asyncio
from typing import Any


class Meeting:
    """Lets workers wait for each other, as Ray Train's `SynchronizationActor`, whose imports take 170 MB a group."""

    def __init__(self, **limits: Any) -> None:
        self.round = asyncio.Condition()
        self.arrived: dict[int, Any] = {}
        self.met = 0  # meetings so far
        self.word: Any = None

    async def broadcast_from_rank_zero(self, *, world_rank: int, world_size: int, data: Any, **_: Any) -> Any:
        """What rank 0 brought, once all ranks are here."""
        async with self.round:
            self.arrived[world_rank] = data
            if len(self.arrived) < world_size:
                meeting = self.met
                await self.round.wait_for(lambda: self.met > meeting)
            else:
                self.word, self.arrived, self.met = self.arrived[0], {}, self.met + 1
                self.round.notify_all()
            return self.word
