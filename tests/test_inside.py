"""What the attacks share that look into a network: a frozen copy, the last layer's inputs, a check of batches."""

import pytest
import torch
import toys
from torch import nn

from bdlib.attacks.inside import Adam, check_batch, frozen, head, read

CPU = torch.device("cpu")
X = toys.squares(5).floats


def test_features_are_what_the_last_linear_layer_reads():
    net = toys.trained()
    with torch.no_grad():
        logits, features = read(net, X)
        assert torch.equal(logits, net(X)) and torch.equal(net[1].linear(features), logits)
        two = nn.Sequential(nn.Flatten(), nn.Linear(432, 5), nn.ReLU(), nn.Linear(5, 4))
        assert torch.equal(read(two, X)[1], two[:3](X)) and head(two) is two[3]
    assert not head(net)._forward_pre_hooks
    x = X.clone().requires_grad_()
    read(net, x)[1].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_network_without_a_linear_layer_is_named():
    for look in (head, lambda m: read(m, X)):
        with pytest.raises(ValueError, match="Conv2d has no linear layer"):
            look(nn.Conv2d(3, 3, 1))


def test_no_hook_stays_when_the_network_fails():
    net = toys.trained()
    with pytest.raises(ValueError, match="takes float images"):
        read(net, torch.zeros(2, 5, 12, 12))
    assert not head(net)._forward_pre_hooks


def test_a_frozen_copy_learns_nothing_and_raw_takes_its_normalisation_away():
    net = toys.trained().train()
    before = toys.state(net)
    with torch.no_grad():
        copy, bare = frozen(net, CPU), frozen(net, CPU, raw=True)
        assert not copy.training and not any(p.requires_grad for p in copy.parameters()) and net.training
        assert torch.equal(bare(X), copy[1](X)) and not torch.equal(bare(X), copy(X))
    assert toys.unchanged(before, net) and float(net[0].std[0]) != 1


def test_adam_takes_its_first_decay_rate_from_momentum():
    optimiser = Adam(1, 8, lr=0.01, momentum=0.5, weight_decay=0.0).optimiser([nn.Parameter(torch.ones(2))])
    assert isinstance(optimiser, torch.optim.Adam) and optimiser.defaults["betas"] == (0.5, 0.9)


def test_a_share_that_selects_no_image_of_a_batch_is_named():
    check_batch("rate", 0.0, 0, 64)
    check_batch("rate", 0.02, 1, 64)
    with pytest.raises(ValueError, match=r"rate 0\.01 selects no image of a batch of 64; the smallest is 0\.016"):
        check_batch("rate", 0.01, 0, 64)
