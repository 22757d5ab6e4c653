import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_training import make_batches

from cluster.storage import Storage
from glad_core.bundle.model import load_bundle
from glad_core.training.loop import TrainState, fine_tune
from glad_core.views import Framing
from pipelines.train import finish
from pipelines.train.finish import with_weights
from pipelines.train.good_images import GoodImage
from pipelines.train.job import describe_end
from pipelines.train.kept_frames import read_frames
from pipelines.train.plan import TrainRequest, plan_job
from pipelines.train.survey import Survey
from pipelines.train.worker import make_loss


@pytest.mark.parametrize(("part", "prefix"), [("dino", "backbone."), ("vae", "vae.")])
def test_adapting_dino_or_vae_changes_it_and_nothing_else(dataset, tiny_bundle, part, prefix):
    """What a worker trains and what `finish` puts into the bundle, without Ray in between."""
    files = sorted((dataset / "part/train/good").iterdir())
    request = TrainRequest(str(dataset), "part", str(tiny_bundle), "out", {"steps": 4, "batch_size": 2}, part=part)
    job = plan_job(request, ["part"], Storage(), name="part", work="")
    job = replace(job, images=[GoodImage(str(path), "part", path.name) for path in files])
    assert job.recipe.learning_rate == 1e-5  # the part's own, not the UNet's
    job = replace(job, recipe=job.recipe.model_copy(update={"learning_rate": 1e-2}))
    loss = make_loss(job, load_bundle(tiny_bundle))
    state = TrainState.start(loss, job.recipe)
    images = [frames.frames[0] for frames in read_frames(job.images, (Framing("squash", 32),), Storage())]
    assert len(list(fine_tune(state, make_batches(job.recipe, images, part=part), job.recipe))) == 4
    state.finish()
    trained = {name: value for name, value in loss.state_dict().items() if name.startswith(prefix)}
    before, after = load_bundle(tiny_bundle), with_weights(load_bundle(tiny_bundle), job, trained)
    changed = {
        name
        for name in ("unet", "vae", "features", "final_features")
        for a, b in zip(getattr(before, name).parameters(), getattr(after, name).parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"final_features" if part == "dino" else "vae"}


def test_a_unet_for_several_categories_brings_their_prompts(tiny_bundle) -> None:
    request = TrainRequest("data", "all", str(tiny_bundle), "out", {"steps": 1, "batch_size": 2})
    job = plan_job(request, ["nut", "bolt"], Storage(), name="nut bolt", work="")
    model = load_bundle(tiny_bundle)
    weights = {f"unet.{name}": torch.zeros_like(value) for name, value in model.unet.state_dict().items()}
    prompts = torch.stack([torch.full(model.prompt_cond.shape[1:], value) for value in (1.0, 2.0)])
    after = with_weights(model, job, weights | {"prompts": prompts})
    assert all(not parameter.any() for parameter in after.unet.parameters())
    assert torch.equal(after.prompts["nut"], prompts[:1])
    assert torch.equal(after.prompts["bolt"], prompts[1:])


def test_of_pictures_too_many_for_memory_some_are_taken_evenly_and_none_held_out_is_left(
    dataset, tiny_bundle, monkeypatch
):
    """Cut off at the first that no longer fits, they would be those of the first names."""
    files = [GoodImage(str(path), "part") for path in sorted((dataset / "part/train/good").iterdir())]
    request = TrainRequest(str(dataset), "part", str(tiny_bundle), "out", {"steps": 1, "batch_size": 2})
    job = replace(plan_job(request, ["part"], Storage(), name="part", work=""), images=files[2:])
    taken = []
    monkeypatch.setattr(finish, "remember", lambda model, pictures, seed: taken.append(pictures))
    monkeypatch.setattr(finish, "MAX_BYTES", 4 * (32 * 32 + 16 * 16) * 3)
    finish._remember(job, load_bundle(tiny_bundle), Survey(files[2:], files[:2], [], [], "", []))
    seen = {picture.name: picture.remembered for picture in taken[0]}
    held_out = {image.uri for image in files[:2]}
    assert {name for name, remembered in seen.items() if not remembered} == held_out
    assert len(seen) == 5
    assert seen.keys() - held_out != {image.uri for image in files[2:5]}


def test_the_quality_said_at_the_end_is_that_of_the_chosen_way(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    facts = json.loads((bundle / "glad.json").read_text())
    facts["provenance"] |= {"method": "nearest good patches"}
    facts["provenance"] |= {"methods": {"fixed steps": 0.8, "nearest good patches": 0.78}}
    (bundle / "glad.json").write_text(json.dumps(facts))
    assert [line for line in describe_end(str(bundle)) if line.startswith("quality")] == [
        "quality on those held out: AUROC 0.780 (1 is perfect, 0.5 is chance) against synthetic defects, which are "
        "often smaller and fainter than real ones"
    ]


def test_good_patches_have_a_threshold_of_more_pictures_than_were_held_out(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    facts = json.loads((bundle / "glad.json").read_text())
    facts["provenance"] |= {"held_out_images": 8, "good_images": 16, "target_fpr": 0.05}
    facts["provenance"] |= {"calibration_images": 24, "good_scores": {"": [0.1] * 24}}
    (bundle / "glad.json").write_text(json.dumps(facts))
    shown = describe_end(str(bundle))
    assert shown[1].endswith(", which about 5.0% of good pictures will exceed")
    assert shown[2] == (
        "held out: 8 of 24 good pictures, not trained on; the threshold is that of 24, each judged by patches of "
        "others than itself and its neighbours"
    )
    facts["provenance"] |= {"threshold_doubt": "20 of 24 have a twin"}
    (bundle / "glad.json").write_text(json.dumps(facts))
    assert describe_end(str(bundle))[1].endswith(" will exceed, or more, since many have twins (see above)")


@pytest.mark.parametrize(
    ("held_out", "target", "scores", "said"),
    [
        (
            8,
            0.05,
            {},
            ["which about 11.1% of good", "8 of 24 good pictures, not trained on; for 5.0% it takes 19: `glad"],
        ),
        (19, 0.05, {}, ["which about 5.0% of good", "19 of 35 good pictures, not trained on\n"]),
        (19, 0.01, {}, ["which about 5.0% of good", "for 1.0% it takes 99"]),
        (
            19,
            0.05,
            {"nut": [0.1] * 6, "bolt": [0.1] * 13},
            ["which about 5.0% of good", "for 5.0% it takes 19 of each category"],
        ),
    ],
)
def test_what_a_threshold_of_few_pictures_promises(tiny_bundle, tmp_path, held_out, target, scores, said):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    facts = json.loads((bundle / "glad.json").read_text())
    facts["provenance"] |= {"held_out_images": held_out, "good_images": 16, "target_fpr": target}
    facts["provenance"] |= {"good_scores": scores} if scores else {}
    facts["settings"]["thresholds"] = dict.fromkeys(scores, 1.0)
    (bundle / "glad.json").write_text(json.dumps(facts))
    shown = "\n".join(describe_end(str(bundle))) + "\n"
    assert all(words in shown for words in said), shown
