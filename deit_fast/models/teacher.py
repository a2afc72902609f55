"""Teachers: torchvision classifiers, with a stem that fits the image size.

A ResNet's ImageNet stem (7x7 stride 2, then max-pooling) leaves 8x8 of a 32x32 image before the first stage; the CIFAR stem (3x3
stride 1, no pooling) keeps all of it, is several points more accurate there, and costs 15 times the arithmetic (ResNet-50: 2.6
GFLOP a forward against 0.17).
"""

from __future__ import annotations

import difflib

import torchvision
from torch import nn

STEMS = ("imagenet", "cifar")


def list_teachers() -> list[str]:
    """The names that `create_teacher` knows: torchvision's classifiers."""
    return torchvision.models.list_models(module=torchvision.models)


def create_teacher(name: str, num_classes: int, stem: str = "imagenet", weights: str | None = None) -> nn.Module:
    """A torchvision classifier with a head for `num_classes`: (B, 3, H, W) -> (B, num_classes).

    Args:
        name: one of `list_teachers()`, such as "resnet50".
        stem: "imagenet" (as published) or "cifar" (3x3 convolution of stride 1, no max-pooling; ResNets only).
        weights: None for a fresh network; "DEFAULT" for torchvision's pretrained one, downloaded if need be, whose head is
            replaced by a fresh one.

    Raises ValueError for an unknown name (with the nearest ones) or a stem that the architecture does not have.
    """
    if name not in list_teachers():
        near = difflib.get_close_matches(name, list_teachers(), n=3, cutoff=0.4) or ["resnet18", "resnet50"]
        raise ValueError(f"there is no teacher {name!r}. Nearest of torchvision's: {', '.join(near)}.")
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}.")
    network = torchvision.models.get_model(name, weights=weights)
    if stem == "cifar":
        if not isinstance(network, torchvision.models.ResNet):
            raise ValueError(f"{name} has no CIFAR stem: that is defined for ResNets. Use stem 'imagenet' or a ResNet.")
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    _replace_head(network, num_classes)
    return network


def _replace_head(network: nn.Module, num_classes: int) -> None:
    """Puts a fresh linear layer in place of the last one, which is the classifier in all of torchvision's networks."""
    path, head = [(path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Linear(head.in_features, num_classes, bias=head.bias is not None))
