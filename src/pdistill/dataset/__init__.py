"""Datasets: every choice of the `dataset` group is a function that returns an ImageSet."""

from pdistill.dataset.archives import imagenet64, lsun
from pdistill.dataset.folders import image_folder
from pdistill.dataset.images import ImageSet, cifar10, digits

__all__ = ["ImageSet", "cifar10", "digits", "image_folder", "imagenet64", "lsun"]
