import numpy as np
import torch

from glad_core.engine.slot import Comparison, Slot
from glad_core.verdict import Request


def test_a_slot_keeps_its_steps_for_the_verdict_and_frees_what_only_the_search_needs() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    latents = torch.zeros(4, 2, 2)
    slot = Slot(Request("a", image), torch.zeros(3, 8, 8), latents, latents, torch.zeros(1, 2), latents, searching=True)
    slot.kept += [(latents, latents)] * 2
    slot.record(1, 301, Comparison(0.5, torch.zeros(2, 2), latents, latents))
    slot.record(0, 401, Comparison(0.25, torch.zeros(2, 2), latents, latents))
    assert slot.scores == {1: 0.5, 0: 0.25}
    slot.departures += [0.1, 0.2]
    slot.stop_step, slot.stop_reason, slot.seconds = 301, "difference", 1.5
    slot.end_search()
    assert (slot.searching, slot.kept, slot.compared) == (False, [], {})
    detection = slot.detection(3.0, np.ones((2, 2), np.float16), image)
    assert (detection.image_id, detection.score, detection.seconds) == ("a", 3.0, 1.5)
    assert (detection.stop_step, detection.stop_reason) == (301, "difference")
    assert detection.steps == [(301, 0.5), (401, 0.25)]
    assert detection.departures == [0.1, 0.2]
