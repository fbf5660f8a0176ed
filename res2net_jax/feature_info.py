"""What a backbone's maps are like, for the decoder that takes them."""


class FeatureInfo(list[dict]):
    """One dict a map, with ``num_chs``, ``reduction`` and ``module``; and timm's methods."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        """Pixels of the images for one of each map, along either side."""
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        """The part of the model that each map comes from."""
        return [info["module"] for info in self]
