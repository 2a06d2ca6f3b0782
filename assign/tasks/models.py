"""Models of the built-in tasks, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return images [n, channels, height / stride, width / stride] for images [n, channels_in, height, width]."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet for small images: a 3×3 convolution, stages of basic blocks, mean over the image, linear layer.

    With widths 64, 128, 256, 512 and two blocks per stage it is ResNet-18 in its CIFAR form (He et al., 2015; as
    trained in arXiv 2301.13464).

    Args:
        channels_in: channels of the images.
        widths: channels of each stage; every stage after the first halves the image.
        blocks: basic blocks in each stage.
        classes: number of classes.
    """

    def __init__(self, *, channels_in: int, widths: Sequence[int], blocks: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        channels = widths[0]
        for index, width in enumerate(widths):
            strides = [2 if index else 1] + [1] * (blocks - 1)
            made = []
            for stride in strides:
                made.append(BasicBlock(channels, width, stride))
                channels = width
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, classes] for images [n, channels_in, height, width]."""
        x = self.stages(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class GPTBlock(nn.Module):
    """Causal attention and a feed-forward layer, each after a normalisation and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of the shape of ``x``, [n, length, width]; each depends only on those up to its position."""
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(n, length, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """A small GPT-2 (Radford et al., 2019): learned positions, the output layer's weight tied to the embedding's."""

    def __init__(self, *, symbols: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.apply(_init_like_gpt2)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, length, symbols] of the symbol after each position of ``x`` [n, length]."""
        places = torch.arange(x.shape[1], device=x.device)
        x = self.blocks(self.embedding(x) + self.positions(places))
        logits: Tensor = self.head(self.norm(x))
        return logits


def _init_like_gpt2(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
