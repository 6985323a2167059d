"""The pretended device keeps its promise: a GPU's rules, a processor's numbers. `BDLIB_PRETEND=1` runs this."""

import os

import pytest
import torch
import toys

pytestmark = pytest.mark.skipif(not os.environ.get("BDLIB_PRETEND"), reason="BDLIB_PRETEND is not set")


def test_what_a_gpu_refuses_is_refused():
    x, other = torch.ones(3, device="pretend"), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        x + other
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randperm(5, generator=torch.Generator(), device="pretend")


def test_numbers_are_the_processors():
    def drawn(device):
        g = torch.Generator(device).manual_seed(0)
        x = torch.rand(4, 3, 8, 8, generator=g, device=device)
        return [x, torch.fft.fftfreq(8, device=device), torch.fft.fft2(x).abs(), torch.linalg.svd(x[0]).S, x[x > 0.5]]

    for here, there in zip(drawn("cpu"), drawn("pretend"), strict=True):
        assert there.device.type == "pretend" and torch.equal(here, there.cpu())


def test_training_is_the_processors():
    def trained(device):
        data, net = toys.squares(64).to(device), toys.tiny().to(device)
        opt = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        for x, y in zip(data.floats.split(16), data.labels.split(16), strict=True):
            opt.zero_grad()
            torch.nn.functional.cross_entropy(net(x), y).backward()
            opt.step()
        return [p.detach().cpu() for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained("cpu"), trained("pretend"), strict=True))
