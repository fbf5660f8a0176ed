"""``push``: a model to the Hugging Face hub."""

from typing import Annotated

import tyro

from res2net_jax import sharing
from res2net_jax.commands.options import Model, Text


def push(
    model: Model,
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="USER/NAME", help_behavior_hint="")],
    license: Text = None,
    private: bool = False,
    revision: Text = None,
) -> None:
    """python -m res2net_jax push runs/flowers/checkpoints me/flowers --license apache-2.0

    Shares a model on the Hugging Face hub, in one commit, with a model card; then load("hf://me/flowers") gives it to
    anybody. Log in first: hf auth login, or $HF_TOKEN.

    Args:
        repo: The repository, made if need be.
        license: Of the weights, as the hub names it. The released weights keep their own.
        private: Make a new repository for your eyes only.
        revision: A branch, made if need be; by default main.
    """
    print(sharing.push_to_hub(model, repo, license=license, private=private, revision=revision))
