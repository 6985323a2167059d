"""Watch: exact about the step, sets back what the loop learns, costs no wait in between."""

import pytest
import torch
import toys

from bdlib.training import Recipe, fit
from bdlib.watch import Diverged, Watch


def test_the_first_bad_loss_is_named_and_the_last_good_state_set_back():
    weight = torch.zeros(3)
    watch = Watch("a loop", {"w": weight}, "lower lr, which is 7", every=4)
    with pytest.raises(Diverged, match="a loop diverged at step 7: the loss is nan; lower lr, which is 7") as caught:
        for step in range(1, 100):
            weight += 1
            watch(torch.tensor(float("nan") if step >= 7 else 1.0))
    assert step == 8  # the next look after the seventh step
    assert (caught.value.step, caught.value.good) == (7, 4)
    assert caught.value.state["w"].tolist() == weight.tolist() == [4.0] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_under_a_good_loss_is_found_at_the_end(value):
    tensors = {"fine": torch.zeros(2), "count": torch.tensor(3), "gamma": torch.ones(2)}
    watch = Watch("a loop", tensors)
    for _ in range(3):
        watch(torch.tensor(1.0))
    watch.look()
    tensors["gamma"][1] = value
    watch(torch.tensor(1.0))
    with pytest.raises(Diverged, match=r"step 4: gamma holds NaN or infinity; .* after step 3 is in") as caught:
        watch.look()
    assert caught.value.state["gamma"].tolist() == [1, 1]


def test_it_looks_no_more_often_than_told(monkeypatch):
    looks = []
    watch = Watch("a loop", {"w": torch.zeros(1)}, every=10)
    monkeypatch.setattr(watch, "_copy", lambda: looks.append(1) or {})
    for _ in range(35):
        watch(torch.tensor(1.0))
    watch.look()
    watch.look()  # nothing new since: no second look
    assert len(looks) == 4


def test_training_that_diverges_leaves_the_network_as_it_last_was_good():
    net, data, kept = toys.trained(), toys.squares(64), {}

    def break_it(epoch: int) -> None:
        kept.update({n: t.clone() for n, t in net.state_dict().items()})
        if epoch == 2:  # two batches an epoch: four good steps
            list(net.modules())[-1].weight.data.mul_(1e38)

    said = "fine-tuning diverged at step 5: the loss is (nan|inf); lower lr, which is 0.01.* after step 4 is in"
    with pytest.raises(Diverged, match=said) as caught:
        fit(net, data, Recipe(3, 32, 0.01), note="fine-tuning", after_epoch=break_it)
    assert caught.value.good == 4 and toys.same(net.state_dict(), kept) and toys.same(caught.value.state, kept)
