"""``push``: a model to the Hugging Face hub."""

from typing import Annotated

import tyro

from res2net_jax import sharing


def push(
    model: Annotated[str, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> None:
    """Shares a model on the Hugging Face hub, e.g. push runs/flowers/checkpoints me/flowers --license apache-2.0

    Log in first: hf auth login, or $HF_TOKEN. Then anybody may load("hf://me/flowers").

    Args:
        model: A name or a checkpoint folder.
        repo: user/name; it is made if need be.
        license: Of the weights, as the hub names it. The released weights keep their own.
        private: Make it for your eyes only.
        revision: A branch, by default main.
    """
    print(sharing.push_to_hub(model, repo, license=license, private=private, revision=revision))
