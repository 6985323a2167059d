"""The networks: sizes as published, normalisation inside, errors that say what a network takes."""

import copy

import pytest
import torch
from torch import nn

from bdlib import models
from bdlib.models import Normalize, normalized
from bdlib.neurons import batchnorms

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
# BatchNorm channels, million parameters at ten classes
NETWORKS = {
    models.small: (1376, 1.2),
    models.resnet18: (4800, 11.17),
    models.preact_resnet18: (3392, 11.17),
    models.wide_resnet: (4 * 16 + (16 + 3 * 32) + (32 + 3 * 64) + 64, 0.175),
    models.vgg19_bn: (5504, 20.04),
}
each_network = pytest.mark.parametrize("build", NETWORKS, ids=lambda f: f.__name__)


@each_network
@pytest.mark.parametrize(("classes", "channels"), [(10, 3), (43, 1)])
def test_sizes(build, classes, channels):
    with torch.device("meta"):  # shapes without numbers
        net = build(classes, MEAN[:channels], STD[:channels], channels)
        assert net(torch.empty(2, channels, 32, 32)).shape == (2, classes)
    neurons, millions = NETWORKS[build]
    assert sum(len(m.weight) for m in batchnorms(net).values()) == neurons
    if channels == 3:
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert isinstance(next(net.children()), Normalize)


@each_network
def test_the_linear_layer_comes_last(build):
    with torch.device("meta"):
        net = build(10, MEAN, STD)
    assert [m for m in net.modules() if isinstance(m, nn.Linear)][-1].out_features == 10


def test_normalisation_is_inside(device):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    x = torch.rand(7, 3, 4, 4)
    by_hand = net((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    wrapped = normalized(copy.deepcopy(net), MEAN, STD).to(device)
    assert torch.allclose(wrapped(x.to(device)).cpu(), by_hand, atol=1e-5)
    assert set(wrapped.state_dict()) == {"0.mean", "0.std", "1.1.weight", "1.1.bias"}  # stored with the weights


def test_normalised_by_its_own_statistics_an_image_has_mean_0_and_std_1():
    x = torch.rand(50, 3, 8, 8)
    z = Normalize(x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).tolist())(x)
    assert z.mean((0, 2, 3)).abs().max() < 1e-5 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(2, 1, 8, 8), r"\(2, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\)"),
    ],
    ids=["uint8", "grey", "no batch"],
)
def test_wrong_images_are_named(x, said):
    with pytest.raises(ValueError, match=rf"float images \(N, 3, H, W\) in \[0, 1\], got.*{said}"):
        normalized(nn.Flatten(), MEAN, STD)(x)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.1, 0.2)), ((0.5,), (0.0,)), ((0.5,), (-1.0,))])
def test_wrong_statistics_are_named(mean, std):
    with pytest.raises(ValueError, match="std > 0, got mean"):
        Normalize(mean, std)


@pytest.mark.parametrize("depth", [4, 12, 18])
def test_an_impossible_depth_is_named(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 4.*got {depth}"):
        models.wide_resnet(10, MEAN, STD, depth=depth)


def test_vgg_refuses_small_images_and_numbers_its_layers_as_torchvision_does():
    from torchvision.models import vgg19_bn

    with torch.device("meta"):
        ours, theirs = models.vgg19_bn(10, MEAN, STD), vgg19_bn()
        with pytest.raises(ValueError, match=r"32x32 or more, got \(28, 28\)"):
            ours(torch.empty(2, 3, 28, 28))
    a = {n.removeprefix("1."): t.shape for n, t in ours.state_dict().items() if "features" in n}
    assert a == {n: t.shape for n, t in theirs.state_dict().items() if "features" in n}


def test_a_residual_block_adds_its_input():
    x = torch.rand(2, 8, 6, 6)
    basic, preact = models.BasicBlock(8, 8, 1).eval(), models.PreActBlock(8, 8, 1).eval()
    nn.init.zeros_(basic.bn2.weight)
    nn.init.zeros_(preact.conv2.weight)
    assert torch.equal(basic(x), x) and torch.equal(preact(x), x)  # x >= 0, so the last ReLU keeps it


def test_a_pre_activation_shortcut_starts_after_its_relu():
    block = models.PreActBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), block.shortcut(torch.relu(block.bn1(x))))


def test_a_network_is_its_seed(device):
    def build(seed):
        torch.manual_seed(seed)
        return models.small(10, MEAN, STD).to(device).eval()

    x = torch.rand(2, 3, 32, 32, device=device)
    assert torch.equal(build(0)(x), build(0)(x)) and not torch.equal(build(0)(x), build(1)(x))
