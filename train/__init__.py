"""The trainer: ``python -m train.imagenet``, ``python -m train.evaluate``, ``python -m train.prepare``."""
