from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glad_core.bundle.memory import PatchMemory, memory_tensors, read_memory
from glad_core.errors import GladError

MEMORY = [PatchMemory(torch.rand(5, 3), torch.rand(4, 3)) for _ in range(2)]


def test_what_is_stored_is_read(tmp_path: Path) -> None:
    save_file(memory_tensors(MEMORY), tmp_path / "memory")
    for stored, read in zip(MEMORY, read_memory(tmp_path / "memory", 2, "cpu"), strict=True):
        torch.testing.assert_close(read.patches, stored.patches, atol=1e-3, rtol=0)
        assert torch.equal(read.whitening, stored.whitening)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("extra", torch.zeros(1)),
        ("good_patches.2", torch.zeros(5, 3)),
        ("good_patches.1", torch.zeros(5, 4)),
        ("good_patches.1", torch.zeros(5)),
        ("good_patches.1", torch.zeros(0, 3)),
        ("whitening.0", torch.zeros(3, 3)),
    ],
)
def test_nothing_else_is_accepted(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(memory_tensors(MEMORY) | {name: tensor}, tmp_path / "memory")
    with pytest.raises(GladError, match="memory: not the good patches of 2 views; train the bundle again"):
        read_memory(tmp_path / "memory", 2, "cpu")


def test_a_missing_view_is_refused(tmp_path: Path) -> None:
    save_file(memory_tensors(MEMORY[:1]), tmp_path / "memory")
    with pytest.raises(GladError, match="not the good patches of 2 views"):
        read_memory(tmp_path / "memory", 2, "cpu")
