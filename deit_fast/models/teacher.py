"""Teachers: torchvision classifiers, with a stem that fits the image size.

A ResNet's ImageNet stem (7x7 stride 2, then max-pooling) leaves 8x8 of a 32x32 image before the first stage; the CIFAR
stem (3x3 stride 1, no pooling) keeps all of it, is several points more accurate there, and costs 15 times the
arithmetic (ResNet-50: 2.6 GFLOP a forward against 0.17).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

STEMS = ("imagenet", "cifar")
_WITHOUT_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": True}
_SETTINGS = {"googlenet": _WITHOUT_AUXILIARY_HEADS, "inception_v3": _WITHOUT_AUXILIARY_HEADS}
_RESNETS = ("resnet", "resnext", "wide_resnet")


class OnePixelConv2d(nn.Conv2d):
    """nn.Conv2d, as a matrix product where its output is one pixel: (B, C, H, W) -> (B, C', 1, 1) for small images.

    Of the kernel, only the taps that lie on the image are read: the others would be multiplied by padding. A ResNet
    ends in such maps at 32 pixels, and there oneDNN's convolution takes most of a training step's time.
    """

    def forward(self, x: Tensor) -> Tensor:
        (H, W), (top, left), (kh, kw) = x.shape[-2:], self.padding, self.kernel_size
        one_pixel = H + 2 * top - kh < self.stride[0] and W + 2 * left - kw < self.stride[1]
        if not one_pixel or H + top > kh or W + left > kw:
            return super().forward(x)
        on_image = self.weight[:, :, top : top + H, left : left + W]
        return F.linear(x.flatten(1), on_image.flatten(1), self.bias)[:, :, None, None]

    @classmethod
    def replace_in(cls, network: nn.Module) -> None:
        """Makes a network's ordinary padded convolutions such ones, with the parameters that they have."""
        for module in network.modules():
            if type(module) is nn.Conv2d and module.groups == 1 and module.dilation == (1, 1) and max(module.padding):
                module.__class__ = cls


def list_teachers() -> list[str]:
    """The names that `create_teacher` knows: torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def create_teacher(name: str, num_classes: int, stem: str = "imagenet",
                   pretrained: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A torchvision classifier with a head for `num_classes`: (B, 3, H, W) -> (B, num_classes).

    A ResNet's residual branches start at zero (Goyal et al. 2017): ResNet-50's training loss on CIFAR-10 at 32 pixels
    is 2.24 in steps 21 to 40 of AdamW where it is 2.46 without.

    Args:
        name: one of `list_teachers()`, such as "resnet50".
        stem: "imagenet" (as published) or "cifar" (3x3 convolution of stride 1, no max-pooling; ResNets only).
        pretrained: torchvision's weights of the network, taken over where the shapes agree: the head, and a CIFAR stem,
            start fresh.

    Raises ValueError for an unknown name (with the nearest ones) or a stem that the architecture does not have.
    """
    if name not in list_teachers():
        near = difflib.get_close_matches(name, list_teachers(), n=3, cutoff=0.4) or ["resnet18", "resnet50"]
        raise ValueError(f"there is no teacher {name!r}. Nearest of torchvision's: {', '.join(near)}.")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}.")
    settings = {"zero_init_residual": True} if name.startswith(_RESNETS) else _SETTINGS.get(name, {})
    network = torchvision.models.get_model(name, num_classes=num_classes, **settings)
    if stem == "cifar":
        if not isinstance(network, torchvision.models.ResNet):
            raise ValueError(f"{name} has no CIFAR stem: that is defined for ResNets. Use stem 'imagenet' or a ResNet.")
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    if pretrained is not None:
        own = network.state_dict()
        fitting = {key: value for key, value in pretrained.items() if key in own and own[key].shape == value.shape}
        network.load_state_dict(own | fitting)
    OnePixelConv2d.replace_in(network)
    return network


def skeleton(name: str, num_classes: int, stem: str = "imagenet") -> nn.Module:
    """The same network on the meta device: shapes without memory."""
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNets compute their widths with tensors
        return create_teacher(name, num_classes, stem).to("meta")


def head_of(name: str, stem: str = "imagenet") -> str:
    """The name of the tensor whose first dimension is the class count: the one that differs between two networks."""
    few, more = (skeleton(name, num_classes, stem).state_dict() for num_classes in (2, 3))
    return next(key for key in few if few[key].shape != more[key].shape)
