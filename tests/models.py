"""Tiny models that tests share, with a batch and a loss each. Plain torch: they know nothing of assign."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def class_loss(model, batch):
    inputs, labels = batch
    outputs = model(inputs)
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1))


class MLP(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.second = nn.Linear(width, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Gated(nn.Module):
    """Two halves of one tensor, multiplied."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        value, gate = self.fc(x).chunk(2, 1)
        return value * gate


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.act(y)


class ResNet(nn.Module):
    def __init__(self, width=8, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.layers = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.layers(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width=32, heads=4, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Embedding and head share one weight."""

    def __init__(self, vocabulary=20, width=32, layers=1, length=8, dropout=0.0):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Attention(width, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = self.through(block, x)
        return self.head(self.norm(x))

    def through(self, block, x):
        return block(x)


class InPlace(nn.Module):
    """What model code is full of: in-place operators, slices, masks, a running buffer, a checkpointed block."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 16)
        self.c = nn.Linear(16, 4)
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("average", torch.zeros(16))

    def block(self, x):
        return F.gelu(self.b(x)) * 2

    def forward(self, x, scale=1.5):
        h = F.relu(self.a(x), inplace=True)
        h = h + 1
        h.mul_(scale)
        left, right = h[:, :8], h[:, 8:]
        left.add_(right)
        h[:, 0] = 0
        h[h > 3] = 1.5
        self.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
        z = torch.zeros(h.shape[0], 16)
        z[:, 4:12] = left * 2
        z[:, 0] = h[:, 1]
        h = checkpoint(self.block, h + z, use_reentrant=False)
        return self.c(self.dropout(h))


class TanhGELU(torch.autograd.Function):
    """With a backward pass of its own, as models of language have had it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 0.5 * x * (1 + torch.tanh(0.8 * x * (1 + 0.045 * x * x)))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        t = torch.tanh(0.8 * x * (1 + 0.045 * x * x))
        return grad * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (0.8 + 0.108 * x * x))


class OwnFunction(nn.Module):
    def __init__(self, width=32, layers=2):
        super().__init__()
        self.first = nn.Linear(16, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 4)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = TanhGELU.apply(layer(x))
        return self.last(x)


class Checkpointed(GPT):
    """Nothing within a block waits for the backward pass."""

    def through(self, block, x):
        return checkpoint(block, x, use_reentrant=False)


class Upsampling(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = F.relu(self.conv(self.up(F.relu(self.down(x)))))
        return self.head(x.mean((2, 3)))


class Explicit(nn.Module):
    """Operators that are told the dtype of their result, and one that writes its result into a buffer."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 4))

    def forward(self, x):
        q, k, v = self.qkv(x.view(-1, 4, 4)).chunk(3, dim=-1)
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1, dtype=torch.float32)
        return self.head(torch.bmm(weights.to(v.dtype), v).flatten(1))


class Complex(nn.Module):
    """Rotated as pairs of numbers, filtered in the frequency domain with a complex weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.complex64))
        self.head = nn.Linear(16, 4)
        self.register_buffer("angles", torch.linspace(0, 1, 8))

    def forward(self, x):
        pairs = torch.view_as_complex(self.fc(x).float().view(-1, 8, 2))
        x = torch.view_as_real(pairs * torch.polar(torch.ones(8), self.angles)).flatten(1)
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=16))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.layer = kind(4, 8, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer(x.view(-1, 4, 4))[0][:, -1])


def images(batch=8, size=8):
    return torch.randn(batch, 3, size, size), torch.randint(0, 4, (batch,))


def tokens(batch=4, length=8):
    return torch.randint(0, 20, (batch, length)), torch.randint(0, 20, (batch, length))


def vectors(batch=16, width=16):
    return torch.randn(batch, width), torch.randint(0, 4, (batch,))


MODELS = {
    "mlp": (MLP, vectors),
    "resnet": (ResNet, images),
    "tied attention": (GPT, tokens),
    "dropout": (lambda: GPT(dropout=0.3), tokens),
    "in place": (InPlace, lambda: vectors(width=8)),
    "own function": (OwnFunction, vectors),
    "explicit dtypes": (Explicit, vectors),
}
