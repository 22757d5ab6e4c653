import asyncio

from pipelines.train.meeting import Meeting


def test_all_leave_together_with_the_word_of_the_first() -> None:
    async def run() -> None:
        meeting = Meeting(timeout_s=None, warn_interval_s=60)

        def arrive(rank: int, word: str) -> asyncio.Task:
            return asyncio.ensure_future(
                meeting.broadcast_from_rank_zero(world_rank=rank, world_size=3, data=word, caller_method_name="report")
            )

        for turn in ("first", "second"):
            early = [arrive(2, "two"), arrive(0, turn)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in early)
            assert await asyncio.gather(*early, arrive(1, "one")) == [turn] * 3

    asyncio.run(run())


def test_one_worker_does_not_wait() -> None:
    meeting = Meeting()
    for word in ("a", "b"):
        assert asyncio.run(meeting.broadcast_from_rank_zero(world_rank=0, world_size=1, data=word)) == word
