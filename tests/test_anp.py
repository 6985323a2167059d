"""ANP against its specification: ascent, noise bounds, what the outer step sees, costs, the planted neuron."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toys
from torch.utils.flop_counter import FlopCounterMode

from bdlib import files
from bdlib.data.imageset import Augment
from bdlib.defenses import ANP
from bdlib.defenses import anp as module
from bdlib.neurons import Soft, batchnorms, clean_curve, flat, grid, ones, prune
from bdlib.training import predict


def generator(device="cpu", seed=0):
    return torch.Generator(device).manual_seed(seed)


def batch(n=64, seed=0, device="cpu"):
    data = toys.squares(n, seed=seed)
    return data.floats.to(device), data.labels.to(device)


def noised_loss(soft, masks, delta, xi, x, y):
    gamma, beta = {n: m + delta[n] for n, m in masks.items()}, {n: 1 + v for n, v in xi.items()}
    return F.cross_entropy(soft(x, gamma, beta), y)


def noises(anp, soft, masks, x, y, seed, device="cpu"):
    """The random start, and the noise after the inner steps: the same draws, since the generator starts anew."""
    start = replace(anp, adversarial=False).perturb(soft, masks, x, y, generator(device, seed))
    return start, anp.perturb(soft, masks, x, y, generator(device, seed))


@pytest.fixture
def calls(monkeypatch):
    """Every forward pass through a soft network: its two factors, detached."""
    made, forward = [], Soft.__call__

    def counted(self, images, weight_factor, bias_factor=None):
        made.append((weight_factor, bias_factor))
        return forward(self, images, weight_factor, bias_factor)

    monkeypatch.setattr(Soft, "__call__", counted)
    return made


# ---- the inner problem


@pytest.mark.parametrize("steps", [1, 3])
def test_the_perturbation_raises_the_loss(device, steps):
    """B7.8: fails when the sign of the step is flipped."""
    net = toys.trained(poisoned=True).to(device)
    soft, masks = Soft(net), {n: torch.full_like(m, 0.9) for n, m in ones(net).items()}
    anp, risen = ANP(eps=0.1, inner_steps=steps), []
    for seed in range(20):
        x, y = batch(32, seed, device)
        start, end = noises(anp, soft, masks, x, y, seed, device)
        risen.append(noised_loss(soft, masks, *end, x, y) >= noised_loss(soft, masks, *start, x, y))
    assert sum(map(bool, risen)) >= 18


@pytest.mark.parametrize(("project", "steps"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_the_noise_keeps_its_bound(project, steps):
    """B7.9: eps with projection, up to 2 eps (and beyond eps somewhere) without."""
    net, (x, y) = toys.trained(), batch()
    noise = ANP(eps=0.3, project=project, inner_steps=steps).perturb(Soft(net), ones(net), x, y, generator())
    largest = max(float(v.abs().max()) for part in noise for v in part.values())
    assert largest <= (0.3 if project else 0.6) + 1e-6
    assert project or largest > 0.3
    assert all(not v.requires_grad for part in noise for v in part.values())


def test_one_ascent_step_is_eps_times_the_sign_of_the_gradient():
    net, (x, y) = toys.trained(), batch()
    soft, masks = Soft(net), {n: torch.full_like(m, 0.8) for n, m in ones(net).items()}
    start, end = noises(ANP(eps=0.2, project=False), soft, masks, x, y, 4)
    delta, xi = ({n: v.clone().requires_grad_() for n, v in part.items()} for part in start)
    wanted = torch.autograd.grad(noised_loss(soft, masks, delta, xi, x, y), [*delta.values(), *xi.values()])
    moved = [b - a for p, q in zip(start, end, strict=True) for a, b in zip(p.values(), q.values(), strict=True)]
    assert all(torch.allclose(m, 0.2 * g.sign(), atol=1e-6) for m, g in zip(moved, wanted, strict=True))


def test_the_random_start_is_uniform_and_new_in_each_iteration(calls):
    net, (x, y) = toys.tiny(), batch(8)
    anp, g = ANP(eps=0.4, adversarial=False), generator()
    a, b = (anp.perturb(Soft(net), ones(net), x, y, g) for _ in range(2))
    values = torch.cat([flat(p) for p in (*a, *b)])
    assert values.min() < -0.2 and values.max() > 0.2 and abs(values.mean()) < 0.1
    assert not torch.equal(flat(a[0]), flat(b[0])) and not torch.equal(flat(a[0]), flat(a[1]))
    assert calls == []  # the ablation pays for no ascent


# ---- the outer problem


def objective(net, anp, noise, masks, x, y):
    """The loss of one iteration at frozen noise, by its formula."""
    soft = Soft(net, batch_statistics=anp.batch_statistics)
    natural = F.cross_entropy(soft(x, masks), y)
    return anp.alpha * natural + (1 - anp.alpha) * noised_loss(soft, masks, *noise, x, y)


def one_step(net, anp, data, monkeypatch, seed=0):
    """Masks after one iteration of `learn`, with the noise and the batch that it used."""
    seen, perturb = {}, ANP.perturb

    def spy(self, soft, masks, x, y, generator):
        seen["noise"], seen["x"], seen["y"] = perturb(self, soft, masks, x, y, generator), x, y
        return seen["noise"]

    monkeypatch.setattr(ANP, "perturb", spy)
    masks, log = anp.learn(net, data, seed=seed)
    return masks, log, seen


def test_the_masks_take_one_gradient_step_with_the_noise_held_constant(monkeypatch):
    """B7.12: the same as finite differences in m at frozen noise; a leak of the noise's gradient fails."""
    net, data = toys.trained(poisoned=True).double(), toys.squares(64)
    net[0].double()
    monkeypatch.setattr(module, "augment", lambda images, spec, generator: images.double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the loop's .float(): finite differences need it
    anp = ANP(eps=0.3, alpha=0.3, iterations=1, lr=1e-3, batch=32)
    masks, log, seen = one_step(net, anp, data, monkeypatch)
    one = ones(net)
    checked = 0
    for layer, channel in itertools.product(one, range(0, 8, 2)):

        def at(value, layer=layer, channel=channel):
            m = {n: v.clone() for n, v in one.items()}
            m[layer][channel] = value
            return float(objective(net, anp, seen["noise"], m, seen["x"], seen["y"]))

        slope = (at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
        expected = min(1.0, 1 - 1e-3 * slope)  # the step, then back into [0, 1]
        assert float(masks[layer][channel]) == pytest.approx(expected, abs=1e-7)
        checked += expected < 1
    assert checked > 2
    assert 0.3 * log[0]["natural"] + 0.7 * log[0]["robust"] == pytest.approx(
        float(objective(net, anp, seen["noise"], one, seen["x"], seen["y"])), rel=1e-4
    )


def test_one_iteration_makes_three_passes_in_order(calls):
    """Noise forward (masks held), noise-on forward, noise-off forward."""
    ANP(iterations=1, batch=8).learn(toys.tiny(), toys.squares(16))
    (_, b0), (_, b1), (w2, b2) = calls
    assert b0 is not None and b1 is not None and b2 is None
    assert w2["1.bn1"].is_leaf and w2["1.bn1"].requires_grad  # the masks themselves: no noise on the natural term


def test_eps_0_runs_no_noise_forward(calls):
    """B7.10."""
    _, log = ANP(eps=0, iterations=3, batch=8).learn(toys.tiny(), toys.squares(16))
    assert len(calls) == 3 and all(bias is None for _, bias in calls) and all(r["robust"] == 0 for r in log)


def test_alpha_weighs_the_natural_loss(monkeypatch):
    """B7.10: alpha 1 does not feel the noise; alpha 0 does not feel the natural term."""
    net, data = toys.trained(poisoned=True), toys.squares(64)
    few = {"iterations": 2, "batch": 32}
    natural = [ANP(eps=e, alpha=1, adversarial=a, **few) for e, a in ((0.1, True), (0.4, True), (0.4, False))]
    a, b, c = (flat(p.learn(net, data)[0]) for p in natural)
    assert torch.allclose(a, b) and torch.allclose(a, c)
    masks, _, seen = one_step(net, ANP(alpha=0, iterations=1, batch=32, lr=0.01), data, monkeypatch)
    m = {n: v.requires_grad_() for n, v in ones(net).items()}
    grads = torch.autograd.grad(noised_loss(Soft(net), m, *seen["noise"], seen["x"], seen["y"]), list(m.values()))
    for value, g in zip(masks.values(), grads, strict=True):
        assert torch.allclose(value, (1 - 0.01 * g).clamp(0, 1), atol=1e-6)


def test_masks_stay_in_0_1_and_the_network_is_untouched(device):
    """B7.7, at a learning rate that overshoots."""
    net, data, seen = toys.tiny().to(device), toys.squares(64).to(device), []
    before = toys.state(net)
    ANP(iterations=15, lr=10.0, batch=16).learn(net, data, keep=lambda i, m: seen.append((i, flat(m).clone())))
    assert [i for i, _ in seen] == list(range(1, 16)) and toys.unchanged(before, net)
    assert all(m.min() >= 0 and m.max() <= 1 for _, m in seen) and any(m.min() == 0 for _, m in seen)


@pytest.mark.parametrize("nothing", [{"lr": 0.0}, {"iterations": 0}])
def test_no_learning_prunes_nothing(nothing):
    """B7.11."""
    net = toys.trained()
    repair = ANP(**{"iterations": 2, "batch": 8, "threshold": 0.99, **nothing})(net, toys.clean())
    assert flat(repair.details["masks"]).eq(1).all() and repair.details["pruned"] == 0
    assert toys.same(net.state_dict(), repair.model.state_dict())


# ---- pruning


def test_stage_2_prunes_the_network_as_it_was():
    """B7.4, B7.5: gamma kept whole or set to 0, running statistics and all else as they were."""
    net, _ = toys.planted()
    repair = ANP(iterations=25, batch=32, threshold=0.5)(net, toys.clean())
    masks, old, new = repair.details["masks"], net.state_dict(), repair.model.state_dict()
    assert 0 < repair.details["pruned"] == int((flat(masks) <= 0.5).sum())
    for name, tensor in old.items():
        layer = name.removesuffix(".weight")
        kept = masks[layer] > 0.5 if layer in masks and name.endswith(".weight") else torch.ones(())
        assert torch.equal(new[name], tensor * kept), name
    expected = prune(net, masks, 0.5)
    assert torch.equal(predict(repair.model, toys.squares(9).images), predict(expected, toys.squares(9).images))


@pytest.mark.parametrize("training", [True, False])
def test_the_planted_neuron_is_found(device, training):
    """B7.14: its mask is the lowest of all, and pruning it ends the attack."""
    net, name = toys.planted()
    masks, log = ANP(iterations=40, batch=32, batch_statistics=training).learn(
        net.to(device), toys.clean().images.to(device)
    )
    others = torch.cat([m for n, m in masks.items() if n != name])
    assert float(masks[name]) < 0.2 and (others < masks[name]).float().mean() < 0.04
    assert set(log[0]) == {"iteration", "natural", "robust", "mean_mask"} and log[-1]["mean_mask"] < 1


def test_every_layer_has_a_mask():
    net, _ = toys.planted()
    masks, _ = ANP(iterations=1, batch=8).learn(net, toys.squares(16))
    assert {n: len(m) for n, m in masks.items()} == {n: len(m.weight) for n, m in batchnorms(net).items()}


# ---- the threshold


def test_the_threshold_is_chosen_on_held_out_clean_images():
    net, clean = toys.trained(poisoned=True), toys.clean()
    repair = ANP(iterations=25, batch=32, max_drop=0.05)(net, clean)
    masks, choice = repair.details["masks"], repair.details["choice"]
    again, _ = ANP(iterations=25, batch=32).learn(net, clean.learn)
    assert toys.same(masks, again)  # learnt on the learning part alone
    by_hand = [r["accuracy"] for r in clean_curve(net, masks, grid(), clean.select)]
    assert [r["threshold"] for r in choice] == grid() and [r["accuracy"] for r in choice] == pytest.approx(by_hand)
    before = float((predict(net, clean.select.images).argmax(1) == clean.select.labels).float().mean())
    allowed = [t for t, a in zip(grid(), by_hand, strict=True) if before - a <= 0.05 + 1e-9]
    assert repair.details["threshold"] == max(allowed, default=-1)
    below = [t for t in allowed if t < max(allowed)]  # a ceiling that rules the largest out, and nothing else
    lower = ANP(iterations=25, batch=32, max_drop=0.05, ceiling=max(allowed) - 1e-6)(net, clean)
    assert below and lower.details["threshold"] == max(below) and lower.details["choice"] == choice


def test_few_images_are_used_in_folds():
    repair = ANP(iterations=3, batch=16)(toys.trained(), toys.clean(60))
    again, _ = ANP(iterations=3, batch=16).learn(toys.trained(), toys.clean(60).images)
    assert toys.same(repair.details["masks"], again) and len(repair.details["choice"]) == len(grid())


def test_no_test_image_and_no_trigger_can_reach_the_defence():
    """B7.15: there is no argument to pass them in."""
    assert list(inspect.signature(ANP.__call__).parameters) == ["self", "model", "clean", "seed", "keep_every"]
    assert list(inspect.signature(ANP.learn).parameters) == ["self", "model", "images", "seed", "keep"]
    source = inspect.getsource(module)
    assert "Trigger" not in source and "evaluate(" not in source


def test_masks_survive_a_file_at_full_precision_and_only_official_rounds(tmp_path):
    """B7.16."""
    net, settings = toys.trained(), {"iterations": 8, "batch": 16, "lr": 0.03}
    masks, _ = ANP(**settings).learn(net, toys.squares(64))
    files.write(tmp_path / "masks", masks, {})
    assert toys.same(files.read(tmp_path / "masks")[0], masks)
    rounded, _ = ANP(digits=4, **settings).learn(net, toys.squares(64))
    assert torch.allclose(flat(rounded), flat(masks), atol=5.1e-5) and not torch.equal(flat(rounded), flat(masks))
    assert torch.equal(flat(rounded), flat(rounded).mul(1e4).round().div(1e4))
    assert ANP.official().digits == 4 and not ANP.official().project
    assert ANP.paper().digits is None and ANP.paper().project and ANP.small().digits is None
    for preset in (ANP.paper(), ANP.official()):
        assert (preset.eps, preset.alpha, preset.iterations, preset.inner_steps, preset.lr) == (0.4, 0.2, 2000, 1, 0.2)
        assert preset.batch == 128 and preset.batch_statistics and preset.adversarial


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eps", -0.1), ("alpha", 1.2), ("alpha", -0.1), ("iterations", -1), ("inner_steps", 0), ("lr", -0.2),
        ("batch", 1), ("max_drop", 1.5), ("ceiling", -0.5),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value}"):
        ANP(**{field: value})


# ---- what it costs


def test_an_iteration_costs_six_forward_passes():
    net, x, counts = toys.trained(), toys.squares(32), []
    with FlopCounterMode(display=False) as one:
        predict(net, x.images)
    for iterations in (1, 3):
        with FlopCounterMode(display=False) as mode:
            ANP(iterations=iterations, batch=32).learn(net, x)
        counts.append(mode.get_total_flops())
    assert (counts[1] - counts[0]) / 2 <= 6.1 * one.get_total_flops()


def test_no_wait_for_the_device_inside_an_iteration():
    data = toys.squares(32, augment=Augment(1, True, 2))

    def waits(iterations):
        net = toys.tiny()
        with toys.Waits() as mode:
            ANP(iterations=iterations, batch=8).learn(net, data)
        return mode.count

    assert waits(1) == waits(6)


def test_a_fixed_threshold_leaves_every_clean_image_to_learn_from(monkeypatch):
    """And a chosen one leaves only the learning part."""
    sizes = []
    original = ANP.learn
    monkeypatch.setattr(
        ANP,
        "learn",
        lambda self, model, images, **k: (sizes.append(len(images)), original(self, model, images, **k))[1],
    )
    clean = toys.clean(240)
    for threshold in (0.2, None):
        ANP(iterations=1, batch=8, threshold=threshold)(toys.trained(), clean)
    assert sizes == [240, len(clean.learn)] and len(clean.learn) < 240
