"""The networks of the papers, for small images in [0, 1]; normalisation is the first layer.

model = preact_resnet18(num_classes=10, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
logits = model(images)                     # (N, C, H, W) in [0, 1] -> (N, 10)
model = normalized(torchvision.models.resnet18(), mean, std)   # a network of your own
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Channels = Sequence[float]


class Normalize(nn.Module):
    """``(x - mean) / std`` per channel, so that bounds such as 8/255 are meant in pixel space everywhere else."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std need one value a channel and std > 0, got mean {mean} and std {std}")
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"a network takes float images (N, {len(self.mean)}, H, W) in [0, 1], "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        return (images - self.mean) / self.std


def normalized(net: nn.Module, mean: Channels, std: Channels) -> nn.Sequential:
    """Any classifier, made to take images in [0, 1]: ``net((x - mean) / std)``."""
    return nn.Sequential(Normalize(mean, std), net)


def _conv(n_in: int, n_out: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN plus shortcut, then ReLU (He et al. 2016a)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(n_in, n_out, stride), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = _conv(n_out, n_out), nn.BatchNorm2d(n_out)
        same = stride == 1 and n_in == n_out
        self.shortcut = nn.Identity() if same else nn.Sequential(_conv(n_in, n_out, stride, 1), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice plus shortcut (He et al. 2016b); where the shape changes the shortcut starts after BN-ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), _conv(n_in, n_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), _conv(n_out, n_out)
        self.shortcut = None if stride == 1 and n_in == n_out else _conv(n_in, n_out, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return self.conv2(F.relu(self.bn2(self.conv1(h)))) + skip


def _stage(block: type[nn.Module], n_in: int, n_out: int, n_blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(block(n_in if i == 0 else n_out, n_out, stride if i == 0 else 1) for i in range(n_blocks)))


class ResNet(nn.Module):
    """Stem, residual stages `layer1`.., global average pool, linear.

    A post-activation net has BN-ReLU after the stem. A pre-activation one has it after the last stage if
    `final_norm` (WideResNet), or nowhere (the PreAct-ResNet-18 of the backdoor benchmarks).
    """

    def __init__(
        self,
        block: type[nn.Module],
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        in_channels: int,
        *,
        stem_width: int,
        stem_stride: int = 1,
        final_norm: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, stem_width, stem_stride)
        self.bn1 = nn.BatchNorm2d(stem_width) if block is BasicBlock else None
        n_in = stem_width
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        for name, n_out, n_blocks, stride in zip(self.stages, widths, blocks, strides, strict=True):
            setattr(self, name, _stage(block, n_in, n_out, n_blocks, stride))
            n_in = n_out
        self.bn = nn.BatchNorm2d(n_in) if final_norm else None
        self.linear = nn.Linear(n_in, num_classes)
        for m in self.modules():  # He initialisation, as in both ResNet papers
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = F.relu(self.bn1(x))
        for name in self.stages:
            x = getattr(self, name)(x)
        if self.bn is not None:
            x = F.relu(self.bn(x))
        return self.linear(x.mean((2, 3)))


def small(num_classes: int, mean: Channels, std: Channels, in_channels: int = 3) -> nn.Module:
    """The book's small network: a ResNet of three one-block stages, 1.2 M parameters, 1,376 BatchNorm channels.

    Wide rather than deep, since a pruning defence needs neurons to spare; a stride of 2 in the stem and in every stage
    (maps of 16, 8, 4 and 2 pixels for a 32x32 image) pays for the width. Introduced in chapter "What is a backdoor?".
    """
    net = ResNet(
        BasicBlock, (64, 128, 256), (1,) * 3, (2, 2, 2), num_classes, in_channels, stem_width=32, stem_stride=2
    )
    return normalized(net, mean, std)


def resnet18(num_classes: int, mean: Channels, std: Channels, in_channels: int = 3) -> nn.Module:
    """ResNet-18 with the 3x3 stride-1 stem used for CIFAR: 11.2 M parameters, 4,800 BatchNorm channels."""
    net = ResNet(BasicBlock, (64, 128, 256, 512), (2,) * 4, (1, 2, 2, 2), num_classes, in_channels, stem_width=64)
    return normalized(net, mean, std)


def preact_resnet18(num_classes: int, mean: Channels, std: Channels, in_channels: int = 3) -> nn.Module:
    """PreAct-ResNet-18 as in the backdoor benchmarks (no final BatchNorm): 11.2 M parameters, 3,392 BatchNorm channels.

    Source: BackdoorBench `models/preact_resnet.py` @ f02e353.
    """
    net = ResNet(PreActBlock, (64, 128, 256, 512), (2,) * 4, (1, 2, 2, 2), num_classes, in_channels, stem_width=64)
    return normalized(net, mean, std)


def wide_resnet(
    num_classes: int, mean: Channels, std: Channels, in_channels: int = 3, *, depth: int = 16, width: int = 1
) -> nn.Module:
    """WideResNet-`depth`-`width` (NAD's network is WRN-16-1): three pre-activation stages of 16, 32, 64 times `width`.

    Raises:
        ValueError: a depth that is not 6n + 4.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, 40 ...), got {depth}")
    n, widths = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
    strides = (1, 2, 2)
    net = ResNet(PreActBlock, widths, (n,) * 3, strides, num_classes, in_channels, stem_width=16, final_norm=True)
    return normalized(net, mean, std)


def vgg19_bn(num_classes: int, mean: Channels, std: Channels, in_channels: int = 3) -> nn.Module:
    """VGG-19 with BatchNorm, global pooling and one linear layer: 20 M parameters, 5,504 BatchNorm channels.

    Layer numbers in `features` are those of torchvision's vgg19_bn. Five poolings: the input must be 32 pixels or more.
    """
    plan = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]
    layers: list[nn.Module] = []
    n_in = in_channels
    for n_out, repeat in plan:
        for _ in range(repeat):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
            n_in = n_out
        layers.append(nn.MaxPool2d(2))
    return normalized(_VGG(nn.Sequential(*layers), num_classes), mean, std)


class _VGG(nn.Module):
    def __init__(self, features: nn.Sequential, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(512, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[-2:]) < 32:
            raise ValueError(f"vgg19_bn halves the image five times and needs 32x32 or more, got {tuple(x.shape[-2:])}")
        return self.classifier(self.features(x).mean((2, 3)))
