"""The network: torchvision's ResNet-34 with an additional fully connected layer before the class layer.

uint8 `[N, S, S, 3]` -> logits float32 `[N, K]`. Normalisation is part of the network, so that every engine
that runs it gets the same numbers.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, ResNet

from service.model.architecture import BLOCKS, Architecture, Block
from service.model.artifact import Artifact
from service.model.errors import ArtifactError
from service.model.preprocess import Preprocessing

STEM = ("conv1", "bn1")


class PixelConv2d(nn.Conv2d):
    """A convolution that is a matrix product where its result is one pixel: the last block's at 32 px.

    Of the filter, only the taps that meet a pixel and no padding take part: one of nine over a map of 1 x 1. Forward
    and backward of 512 channels, 128 images, 2 cores with AMX, torch 2.13: float32 4.9 against 18.1 ms, bfloat16 2.7
    against 36.0 ms (oneDNN's convolution takes a row of one image at a time).
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """The same convolution, of one group and without dilation, padded by zeros; it shares the filter."""
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
        taps = []
        for axis in (0, 1):
            size, pad = input.shape[2 + axis], int(self.padding[axis])
            beyond = size + 2 * pad - self.kernel_size[axis]
            if not 0 <= beyond < self.stride[axis] or size + pad > self.kernel_size[axis]:
                return super().forward(input)  # no result of one pixel, or pixels that no tap meets
            taps.append(slice(pad, pad + size))
        product = functional.linear(input.flatten(1), self.weight[:, :, taps[0], taps[1]].flatten(1), self.bias)
        return product[:, :, None, None]


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
                module.conv1, module.conv2 = PixelConv2d.of(module.conv1), PixelConv2d.of(module.conv2)
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
