"""Images as uint8, and everything between a file and an augmented batch.

`archive` reads a directory or archive safely, `folder` decodes it once into a cached array, `datasets` makes train,
validation and test splits of it, `augmentation` draws what happens to each image, and `loader` applies that, batch by
batch. `BatchAugment` does it to the batches of somebody else's loop.
"""

from deit_fast.data.batch_augment import BatchAugment

__all__ = ["BatchAugment"]
