import os

import pytest

from cluster import nodes
from cluster.nodes import NotShared

OTHERS = {"b": "10.0.0.2", "c": "10.0.0.3"}


@pytest.fixture
def two_others(monkeypatch):
    """A cluster of this machine and two others; what they have is set by the test."""
    import ray

    has = {"versions": {}, "paths": lambda path: True}
    listed = [{"NodeID": node, "NodeManagerAddress": address, "Alive": True} for node, address in OTHERS.items()]
    here = {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True}
    lost = {"NodeID": "d", "NodeManagerAddress": "10.0.0.4", "Alive": False}
    monkeypatch.setattr(ray, "nodes", lambda: [here, *listed, lost])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Context", (), {"get_node_id": lambda self: "a"})())

    def ask(others, paths):
        assert others == OTHERS
        assert all(os.path.exists(path) for path in paths)
        own = nodes.versions.installed()
        return {
            node: (own | has["versions"], [path for path in paths if node == "c" and not has["paths"](path)])
            for node in others
        }

    monkeypatch.setattr(nodes, "_ask", ask)
    return has


def test_a_folder_of_this_machine_alone_is_refused(two_others, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").touch()  # other machines may have an empty folder of that name
    reads, writes = [str(tmp_path / "in"), "s3://b/x", "small", "*.png"], [str(tmp_path / "new" / "out"), "s3://b/y"]
    nodes.check_nodes(reads, writes)
    assert os.listdir(tmp_path) == ["in"]  # the probe is gone
    for missing, location in ((".glad-probe", writes[0]), ("/in/1.png", reads[0])):
        two_others["paths"] = lambda path, missing=missing: missing not in path
        with pytest.raises(NotShared, match=f"^{location}: 10.0.0.3 of the cluster cannot see it; give an s3://"):
            nodes.check_nodes(reads, writes)
    assert os.listdir(tmp_path) == ["in"]
    assert capsys.readouterr().err == ""


def test_other_versions_are_said_in_a_line(two_others, capsys):
    two_others["versions"] = {"torch": "2.6.0", "timm": "none"}
    nodes.check_nodes([], [])
    (line,) = capsys.readouterr().err.splitlines()
    own = nodes.versions.installed()
    assert line.startswith(f"10.0.0.2, 10.0.0.3: torch 2.6.0 (here {own['torch']}), timm none (here {own['timm']});")


def test_many_machines_are_counted():
    assert nodes._named(["a", "b"]) == "a, b"
    assert nodes._named(list("abcde")) == "a, b, c and 2 more"


@pytest.mark.slow
def test_a_machine_alone_asks_nobody(ray_session, monkeypatch):
    monkeypatch.setattr(nodes, "_ask", lambda *_: pytest.fail("asked"))
    nodes.check_nodes(["/nowhere"], ["/nowhere/out"])
