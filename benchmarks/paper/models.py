"""The four models of arXiv 2301.13464 in their CIFAR forms: plain PyTorch, no line of it knows about plans.

Each is a function of ``classes`` and ``width``, a factor on the channels of every layer but the last. Channels are
rounded to a whole number of at least 1.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assign.tasks.models import ResNet


def resnet18(classes: int = 10, width: float = 1.0) -> nn.Module:
    """ResNet-18 (He et al., 2015): 11,173,962 parameters with 10 classes."""
    widths = [scaled(channels, width) for channels in (64, 128, 256, 512)]
    return ResNet(channels_in=3, widths=widths, blocks=2, classes=classes)


def mobilenet_v2(classes: int = 10, width: float = 1.0) -> nn.Module:
    """MobileNetV2 (Sandler et al., 2018): 2,296,922 parameters with 10 classes."""
    return MobileNetV2(classes, width)


def shufflenet_v2(classes: int = 10, width: float = 1.0) -> nn.Module:
    """ShuffleNetV2 (Ma et al., 2018): 1,263,854 parameters with 10 classes."""
    return ShuffleNetV2(classes, width)


def squeezenet(classes: int = 10, width: float = 1.0) -> nn.Module:
    """SqueezeNet (Iandola et al., 2016): 734,986 parameters with 10 classes."""
    return SqueezeNet(classes, width)


MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2, "shufflenet_v2": shufflenet_v2, "squeezenet": squeezenet}
)


def scaled(channels: int, width: float, multiple: int = 1) -> int:
    """``channels * width``, rounded to a multiple of ``multiple`` and at least that."""
    return max(1, round(channels * width / multiple)) * multiple


class ConvNorm(nn.Sequential):
    """A convolution without bias that keeps the image's size (at stride 1), and batch normalisation."""

    def __init__(self, channels_in: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(channels),
        )


class InvertedResidual(nn.Module):
    """Widened by a 1×1 convolution, filtered channel by channel, narrowed again; at stride 1 beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * channels_in
        self.widen = ConvNorm(channels_in, wide, 1)
        self.filter = ConvNorm(wide, wide, 3, stride=stride, groups=wide)
        self.narrow = ConvNorm(wide, channels, 1)
        self.adds = stride == 1
        self.shortcut = nn.Sequential()
        if self.adds and channels_in != channels:
            self.shortcut = ConvNorm(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.relu(self.filter(F.relu(self.widen(x)))))
        return y + self.shortcut(x) if self.adds else y


class MobileNetV2(nn.Module):
    """A 3×3 convolution, seven stages of inverted residuals, a 1×1 convolution, mean over the image, linear layer."""

    STAGES = (  # expansion, channels, blocks, stride of the first
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        channels = scaled(32, width)
        self.first = ConvNorm(3, channels, 3)
        blocks = []
        for expansion, base, count, first_stride in self.STAGES:
            for stride in [first_stride] + [1] * (count - 1):
                made = scaled(base, width)
                blocks.append(InvertedResidual(channels, made, expansion=expansion, stride=stride))
                channels = made
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNorm(channels, scaled(1280, width), 1)
        self.linear = nn.Linear(scaled(1280, width), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, 32, 32]."""
        x = self.blocks(F.relu(self.first(x)))
        x = F.avg_pool2d(F.relu(self.last(x)), 4)
        return self.linear(x.flatten(1))


def shuffle(x: Tensor) -> Tensor:
    """Channels of both halves, one of each in turn."""
    n, channels, height, width = x.shape
    return x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)


class ShuffleBlock(nn.Module):
    """One half of the channels passes, the other is convolved; then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.first = ConvNorm(self.half, self.half, 1)
        self.filter = ConvNorm(self.half, self.half, 3, groups=self.half)
        self.last = ConvNorm(self.half, self.half, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed, y = x[:, : self.half], x[:, self.half :]
        y = F.relu(self.last(self.filter(F.relu(self.first(y)))))
        return shuffle(torch.cat([passed, y], 1))


class ShuffleDownBlock(nn.Module):
    """Two branches that both read everything and halve the image; then both are shuffled."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.left_filter = ConvNorm(channels_in, channels_in, 3, stride=2, groups=channels_in)
        self.left_last = ConvNorm(channels_in, half, 1)
        self.right_first = ConvNorm(channels_in, half, 1)
        self.right_filter = ConvNorm(half, half, 3, stride=2, groups=half)
        self.right_last = ConvNorm(half, half, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.left_last(self.left_filter(x)))
        right = F.relu(self.right_last(self.right_filter(F.relu(self.right_first(x)))))
        return shuffle(torch.cat([left, right], 1))


class ShuffleNetV2(nn.Module):
    """A 3×3 convolution, three stages of shuffled blocks, a 1×1 convolution, mean over the image, linear layer."""

    STAGES = ((116, 3), (232, 7), (464, 3))  # channels, basic blocks behind the one that halves the image

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        channels = scaled(24, width)
        self.first = ConvNorm(3, channels, 3)
        blocks: list[nn.Module] = []
        for base, count in self.STAGES:
            made = scaled(base, width, multiple=2)
            blocks.append(ShuffleDownBlock(channels, made))
            blocks += [ShuffleBlock(made) for _ in range(count)]
            channels = made
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNorm(channels, scaled(1024, width), 1)
        self.linear = nn.Linear(scaled(1024, width), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, 32, 32]."""
        x = self.blocks(F.relu(self.first(x)))
        x = F.avg_pool2d(F.relu(self.last(x)), 4)
        return self.linear(x.flatten(1))


class Fire(nn.Module):
    """Squeezed by a 1×1 convolution, expanded by a 1×1 and a 3×3 one side by side."""

    def __init__(self, channels_in: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, squeeze, 1)
        self.bn = nn.BatchNorm2d(squeeze)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.bn_one = nn.BatchNorm2d(expand)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.bn_three = nn.BatchNorm2d(expand)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.squeeze(x)))
        return F.relu(torch.cat([self.bn_one(self.one(x)), self.bn_three(self.three(x))], 1))


class SqueezeNet(nn.Module):
    """Every convolution has a bias; log-softmax is part of the model."""

    FIRES = (  # squeezed and expanded channels; None halves the image
        (16, 64),
        (16, 64),
        (32, 128),
        None,
        (32, 128),
        (48, 192),
        (48, 192),
        (64, 256),
        None,
        (64, 256),
    )

    def __init__(self, classes: int, width: float) -> None:
        super().__init__()
        channels = scaled(96, width)
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2, 2)
        )
        fires: list[nn.Module] = []
        for fire in self.FIRES:
            if fire is None:
                fires.append(nn.MaxPool2d(2, 2))
                continue
            squeeze, expand = (scaled(base, width) for base in fire)
            fires.append(Fire(channels, squeeze, expand))
            channels = 2 * expand
        self.fires = nn.Sequential(*fires)
        self.last = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logarithms of the probabilities [n, classes] of images [n, 3, 32, 32]."""
        x = F.avg_pool2d(self.last(self.fires(self.stem(x))), 4)
        return F.log_softmax(x.flatten(1), 1)
