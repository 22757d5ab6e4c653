import pytest
import torch
from tiny_training import RECIPE, make_atp_loss, train

from glad_core.bundle.model import Model, load_bundle
from glad_core.errors import GladError
from glad_core.training.loop import TrainState, add_reports, category_prompts, lr_factor
from glad_core.training.recipe import Recipe


@pytest.fixture
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_weights(tiny_bundle, optimizer: str) -> None:
    recipe = RECIPE.model_copy(update={"optimizer": optimizer})
    state = TrainState.start(make_atp_loss(load_bundle(tiny_bundle)), recipe)
    whole = train(state, recipe)
    state.finish()

    first = TrainState.start(make_atp_loss(load_bundle(tiny_bundle)), recipe)
    head = train(first, recipe, limit=2)
    second = TrainState.start(make_atp_loss(load_bundle(tiny_bundle)), recipe)
    second.load_state_dict(first.state_dict())
    tail = train(second, recipe)
    second.finish()
    assert head + tail == whole
    for name, weight in second.loss.state_dict().items():
        assert torch.equal(weight, state.loss.state_dict()[name]), name


def test_micro_batches_add_up_to_the_whole_batch(tiny_bundle) -> None:
    whole, parts = (
        TrainState.start(make_atp_loss(load_bundle(tiny_bundle)), RECIPE.model_copy(update={"micro_batch": micro}))
        for micro in (None, 3)
    )
    for state, micro in ((whole, None), (parts, 3)):
        train(state, RECIPE.model_copy(update={"micro_batch": micro}), limit=1)
    for (name, a), b in zip(whole.loss.named_parameters(), parts.loss.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_training_lowers_the_loss(model: Model) -> None:
    recipe = Recipe(steps=60, batch_size=4, learning_rate=3e-3)
    history = train(TrainState.start(make_atp_loss(model), recipe), recipe)
    assert sum(history[-10:]) < sum(history[:10])


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_touched(model: Model) -> None:
    recipe = Recipe(steps=3, batch_size=4, learning_rate=1e-3)
    loss = make_atp_loss(model)
    state = TrainState.start(loss, recipe)
    loss.clean[0][:] = float("nan")
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(GladError, match="diverged at step 1"):
        train(state, recipe)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_prompts_are_learned_only_where_nobody_made_them(model: Model) -> None:
    single, learn = category_prompts(model, ["part"])
    assert torch.equal(single, model.prompt_cond)
    assert not learn
    several, learn = category_prompts(model, ["a", "b"])
    assert several.shape == (2, *model.prompt_cond.shape[1:])
    assert learn
    assert not torch.equal(several[0], several[1])
    assert torch.equal(category_prompts(model, ["b", "a"])[0], several.flip(0))
    model.prompts.update(a=several[:1], b=several[1:])
    known, learn = category_prompts(model, ["b"])
    assert torch.equal(known, several[1:])
    assert not learn


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, lr_schedule="cosine")
    factors = [lr_factor(recipe, step) for step in range(100)]
    assert factors[0] < factors[4] == pytest.approx(1)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] < 0.01
    assert lr_factor(Recipe(), 7) == 1


def test_reports_add_up_by_quantity() -> None:
    assert add_reports({"a": (1.0, 2.0)}, {"a": (3.0, 1.0), "b": (5.0, 4.0)}) == {"a": (4.0, 3.0), "b": (5.0, 4.0)}
