import pytest

from cluster import session
from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.train.plan import TrainRequest, cpu_share, gpu_share, plan_job, with_resources

STORAGE = Storage()


def make_request(base, **options) -> TrainRequest:
    recipe = options.pop("recipe", {})
    return TrainRequest("data", "nut", str(base), "out", recipe, **options)


def test_options_win_over_the_recipe_of_the_part(tiny_bundle) -> None:
    request = make_request(tiny_bundle, part="vae", recipe={"steps": 7, "batch_size": None})
    recipe = plan_job(request, ["nut"], STORAGE, name="nut", work="/work").recipe
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate) == (7, 8, 1e-5)


def test_each_worker_has_a_gpu_if_there_are_any(tiny_bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(session, "node_cpus", lambda: [8.0])
    monkeypatch.setattr(session, "gpu_nodes", lambda: [(8.0, 2.0)])
    monkeypatch.setattr(session, "store_bytes", lambda: 2.0**30)

    def plan(**options):
        request = make_request(tiny_bundle, recipe={"batch_size": 12}, **options)
        return with_resources(plan_job(request, ["nut"], STORAGE, name="nut", work="/work"), request)

    assert (plan().device, plan().gpus, plan().cpus, plan().makers) == ("cuda", 1.0, 3.0, 2)
    assert (plan(device="cpu").device, plan(device="cpu").gpus, plan(device="cpu").cpus) == ("cpu", 0.0, 7.5)
    with pytest.raises(GladError, match="3 workers need as many GPUs, this machine has 2"):
        plan(workers=3)
    assert plan(workers=3, address="auto").workers == 3  # a cluster may grow


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([2], 1, 1.5),
        ([2], 2, 0.75),
        ([2], 3, 0.5),
        ([1, 2, 2], 1, 1.5),  # of one node, not of the cluster's five: no worker spans two
        ([1, 2, 2], 3, 0.75),  # the head has half a CPU to give: two on one node, one on the other
        ([16, 16], 2, 15.5),
        ([0.5], 1, 0),
    ],
)
def test_a_worker_s_share_fits_one_node(nodes, workers, expected):
    share = cpu_share(nodes, workers)
    assert share == pytest.approx(expected)
    if share:
        assert sum(int((cpus - 0.5) / share + 1e-9) for cpus in nodes) >= workers


@pytest.mark.parametrize(
    ("nodes", "cpus", "makers"),
    [
        ([(8, 1)] * 8, 5, 4),
        ([(7, 1)] * 8, 5, 4),
        ([(64, 8)], 5, 4),
        ([(4, 1)], 3, 2),
        ([(32, 8)], 3, 2),
        ([(64, 8), (3, 1)], 2, 1),  # every GPU can have as many
        ([(2, 1)], 1.5, 1),
        ([(1, 1)], 0.5, 1),
        ([(0, 1)], 0.25, 1),  # waits for a better one, as Ray says
        ([], 2, 1),  # machines to come
    ],
)
def test_a_gpu_s_share_holds_the_makers_of_its_batches(nodes, cpus, makers):
    assert gpu_share(nodes) == (cpus, makers)
    for node_cpus, gpus in nodes:
        assert not node_cpus or gpus * cpus <= node_cpus - 0.5  # a survey's task finds room on every machine
