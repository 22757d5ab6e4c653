import subprocess
import sys

SCRIPT = """
import sys
from glad_core.engine.process import set_up
assert "torch" not in sys.modules
set_up(gpu=False, threads=3)
assert "glad_core.engine.engine" in sys.modules
torch = sys.modules["torch"]
print(torch.get_num_threads(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
"""


def test_a_process_imports_torch_only_when_it_is_set_up_and_rounds_alike_on_every_device() -> None:
    """In a process of its own: threads and memory hold for a whole process."""
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["3", "False", "False"]
