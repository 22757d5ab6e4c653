import pickle
from pathlib import Path

import pytest

pytest.importorskip("skimage", reason="needs the extra 'small-model'")

from pipelines.small_model.recipe import codec_stage, features_stage, stage


def test_a_stage_runs_once_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        stage(tmp_path / "a", fails)
    assert not (tmp_path / "a").exists()
    stage(tmp_path / "a", lambda folder: folder.mkdir())
    stage(tmp_path / "a", fails)
    assert (tmp_path / "a").is_dir()


def test_the_stages_side_by_side_can_be_sent_to_processes() -> None:
    for run in (codec_stage, features_stage):
        assert pickle.loads(pickle.dumps(run)).__module__ == "pipelines.small_model.recipe"
