"""The network: torchvision's ResNet-34 with an additional fully connected layer before the class layer.

uint8 `[N, S, S, 3]` -> logits float32 `[N, K]`. Normalisation is part of the network, so that every engine
that runs it gets the same numbers.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, ResNet

from service.model.architecture import BLOCKS, Architecture, Block
from service.model.artifact import Artifact
from service.model.errors import ArtifactError
from service.model.preprocess import Preprocessing

STEM = ("conv1", "bn1")


class SmallMapConv2d(nn.Conv2d):
    """A convolution that is a matrix product where its result is one pixel, or, on processors, a few.

    Of one pixel, only the taps of the filter take part that meet a pixel and no padding: one of nine over a map of
    1 x 1. Of a few, the pixels under each are gathered first (im2col, Chellapilla et al. 2006,
    https://inria.hal.science/inria-00112631). oneDNN's convolutions take a row of one image at a time, and give AMX,
    which multiplies 16 rows at once, as many as a row has pixels.

    Forward and backward of 512 channels, 128 images, 2 cores with AMX, torch 2.13, ms, in turns with oneDNN's:
    1 x 1 pixels: float32 4.9 against 18.1, bfloat16 2.7 against 36.0; 2 x 2: 35 against 95, 13 against 65; 4 x 4: 127
    against 144 (within a training step slower), 36 against 84; 7 x 7: 402 against 305, 137 against 107 (medians of 8).
    In bfloat16 the gradient of a pixel is a sum of what the taps gave, rounded each: of nine, its mean squared error is
    1.3 times that of rounding once. The result of a few pixels has channels last in memory.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """The same convolution, of one group and without dilation, padded by zeros; it shares the filter.

        Batch norms that are folded into it later (`service.engines.cuda.fused`) give it a bias.
        """
        assert (conv.groups, conv.dilation, conv.padding_mode, conv.bias) == (1, (1, 1), "zeros", None)
        same = cls(
            conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.padding),
            bias=False, device="meta",
        )  # fmt: skip
        same.weight = conv.weight
        return same

    def forward(self, input: Tensor) -> Tensor:
        """`[N, I, h, w]` -> `[N, O, oh, ow]`."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # what is traced serves any size
            return super().forward(input)
        if (taps := self._taps_of_one_pixel(input)) is not None:
            product = functional.linear(input.flatten(1), self.weight[:, :, taps[0], taps[1]].flatten(1), self.bias)
            return product[:, :, None, None]
        shape = _Shape.of(input, self)
        casts = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64  # as of conv2d
        dtype = torch.get_autocast_dtype("cpu") if casts else input.dtype
        if input.device.type != "cpu" or not _is_faster_gathered(shape.height * shape.width, self.in_channels, dtype):
            return super().forward(input)
        weight = self.weight.to(dtype) if casts else self.weight
        result: Tensor = _GatheredProduct.apply(input.to(dtype), weight, shape)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(dtype)[:, None, None]

    def _taps_of_one_pixel(self, input: Tensor) -> tuple[slice, slice] | None:
        """Which taps meet pixels, by axis; None where the result is no single pixel, or pixels are met by no tap."""
        taps = []
        for axis in (0, 1):
            size, pad = input.shape[2 + axis], int(self.padding[axis])
            beyond = size + 2 * pad - self.kernel_size[axis]
            if not 0 <= beyond < self.stride[axis] or size + pad > self.kernel_size[axis]:
                return None
            taps.append(slice(pad, pad + size))
        return taps[0], taps[1]


def _is_faster_gathered(pixels: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether a convolution with a result of so many pixels, an input of so many channels, is faster as a product.

    2 cores with AMX, torch 2.13, 128 images, 3 x 3, forward and backward, ms, medians of 8, float32 and bfloat16: 128
    to 256 channels at 2 x 2 5.0 against 6.1, 2.3 against 6.9; 256 at 2 x 2 8.9 against 13.7, 3.4 against 9.4; 128 at
    4 x 4 10.3 against 6.3, 4.5 against 4.0; 256 at 8 x 8 163 against 95, 67 against 28.
    """
    return (0 < pixels <= 4 and channels >= 128) or (0 < pixels <= 16 and channels >= 256 and dtype == torch.bfloat16)


@dataclass(frozen=True)
class _Shape:
    """Of a convolution over a map; heights before widths."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    height: int
    width: int
    """Of the result."""

    @classmethod
    def of(cls, input: Tensor, conv: nn.Conv2d) -> Self:
        kernel, stride, padding = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.padding)
        height, width = ((input.shape[2 + i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1))
        return cls(kernel, stride, padding, height, width)

    def under(self, padded: Tensor) -> Iterator[Tensor]:
        """What lies under each tap, in the filter's order: `[N, H, W, C]` -> views of it, `[N, oh, ow, C]`."""
        for top in range(self.kernel[0]):
            rows = slice(top, top + (self.height - 1) * self.stride[0] + 1, self.stride[0])
            for left in range(self.kernel[1]):
                yield padded[:, rows, left : left + (self.width - 1) * self.stride[1] + 1 : self.stride[1]]

    def gathered(self, input: Tensor) -> Tensor:
        """`[N, I, h, w]` -> `[N oh ow, taps I]`."""
        top, left = self.padding
        padded = functional.pad(input.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        return torch.cat(list(self.under(padded)), -1).flatten(0, 2)


class _GatheredProduct(torch.autograd.Function):
    """The convolution `shape` of `[N, I, h, w]` with a filter `[O, I, kh, kw]`, as a product; both have one type."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, shape: _Shape) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.shape = shape
        product = functional.linear(shape.gathered(input), _matrix(weight))
        return product.view(len(input), shape.height, shape.width, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        with torch.autocast("cpu", enabled=False):  # `backward` may be called inside one
            return _GatheredProduct._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input, weight = ctx.saved_tensors
        shape: _Shape = ctx.shape
        outputs, inputs, *kernel = weight.shape
        grad = grad.permute(0, 2, 3, 1).reshape(-1, outputs)  # [N oh ow, O]
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1]:  # gathered anew: kept, it would take the memory of the pixels once for each tap
            grad_weight = (grad.t() @ shape.gathered(input)).view(outputs, *kernel, inputs).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[0]:
            parts = (grad @ _matrix(weight)).view(len(input), shape.height, shape.width, kernel[0] * kernel[1], inputs)
            (top, left), (height, width) = shape.padding, input.shape[2:]
            exact = torch.promote_types(grad.dtype, torch.float32)  # as many summands as taps
            padded = grad.new_zeros(len(input), height + 2 * top, width + 2 * left, inputs, dtype=exact)
            for tap, sums in enumerate(shape.under(padded)):
                sums += parts[:, :, :, tap]
            grad_input = padded[:, top : top + height, left : left + width].to(grad.dtype).permute(0, 3, 1, 2)
        return grad_input, grad_weight, None


def _matrix(weight: Tensor) -> Tensor:
    """`[O, I, kh, kw]` -> `[O, taps I]`, as `_Shape.gathered` has the pixels."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pair(of: int | str | tuple[int, ...]) -> tuple[int, int]:
    assert isinstance(of, tuple)
    height, width = of
    return height, width


class Network(ResNet):  # type: ignore[misc]  # torchvision has no types
    """ResNet-34 (He et al. 2015, https://arxiv.org/abs/1512.03385) with a two-layer head and frozen blocks.

    Frozen blocks get no gradient, and stay in eval mode whatever `train()` says: their batch norms use and
    keep the running statistics they came with.
    """

    def __init__(self, architecture: Architecture, preprocessing: Preprocessing) -> None:
        # Each residual branch starts at zero (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, 5.1), which makes
        # training from random weights start sooner; pretrained weights overwrite it.
        super().__init__(BasicBlock, [3, 4, 6, 3], num_classes=architecture.num_classes, zero_init_residual=True)
        self.architecture = architecture
        for module in self.modules():
            if isinstance(module, BasicBlock):
                module.conv1, module.conv2 = SmallMapConv2d.of(module.conv1), SmallMapConv2d.of(module.conv2)
        self.fc = nn.Sequential(
            OrderedDict(
                hidden=nn.Linear(512 * BasicBlock.expansion, architecture.hidden_units),
                activation=nn.ReLU(inplace=True),
                classes=nn.Linear(architecture.hidden_units, architecture.num_classes),
            )
        )
        # Not persistent: the numbers travel in the manifest, the weights hold what was learned.
        self.register_buffer("mean", torch.tensor(preprocessing.mean).mul(255).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).mul(255).view(1, 3, 1, 1), persistent=False)
        for module in self.frozen_modules():
            module.requires_grad_(False)
        self.train()

    @property
    def prefix(self) -> tuple[Block, ...]:
        """The frozen blocks at the start, with no trained one before them: what `features` runs."""
        frozen = self.architecture.frozen
        return tuple(block for i, block in enumerate(BLOCKS) if set(BLOCKS[: i + 1]) <= set(frozen))

    def frozen_modules(self) -> list[nn.Module]:
        """The modules of the frozen blocks, the stem's two among them."""
        return [module for block in self.architecture.frozen for module in self.block_modules(block)]

    def block_modules(self, block: Block) -> list[nn.Module]:
        """The modules of a block that have parameters."""
        return [self.get_submodule(name) for name in (STEM if block == "stem" else (block,))]

    def unfreeze(self) -> None:
        """Let every block be trained from now on."""
        for module in self.frozen_modules():
            module.requires_grad_(True)
        self.architecture = self.architecture.model_copy(update={"frozen": ()})
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, but for the frozen blocks, which stay in eval mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def features(self, batch: Tensor) -> Tensor:
        """uint8 (or float in 0..255) `[N, S, S, 3]` -> what the frozen prefix makes of it, `[N, C, h, w]`."""
        planes = batch.permute(0, 3, 1, 2).to(self.mean.dtype)  # [N, 3, S, S]
        return self._through(self.prefix, (planes - self.mean) / self.std)

    def forward(self, batch: Tensor, *, from_features: bool = False) -> Tensor:
        """uint8 (or float in 0..255) `[N, S, S, 3]` -> logits `[N, K]`.

        With `from_features`, `batch` is what `features` gave, and only the rest of the network runs.
        """
        features = batch if from_features else self.features(batch)
        features = self._through(BLOCKS[len(self.prefix) :], features)  # [N, 512, h, w]
        logits: Tensor = self.fc(torch.flatten(self.avgpool(features), 1))
        return logits

    def _through(self, blocks: Sequence[Block], tensor: Tensor) -> Tensor:
        for block in blocks:
            if block == "stem":
                tensor = self.maxpool(self.relu(self.bn1(self.conv1(tensor))))
            else:
                tensor = self.get_submodule(block)(tensor)
        return tensor


def network_of(artifact: Artifact) -> Network:
    """The artifact's network on the CPU, in eval mode. Raises: ArtifactError when the weights do not fit it."""
    network = Network(artifact.manifest.architecture, artifact.manifest.preprocessing)
    try:
        network.load_state_dict({name: torch.from_numpy(array) for name, array in artifact.weights().items()})
    except RuntimeError as exc:
        detail = ascii(" ".join(str(exc).split())[:300])
        raise ArtifactError(f"{artifact.path('weights')} does not fit the architecture stated: {detail}") from exc
    network.eval()
    return network
