"""The commands of ``python -m res2net_jax``, one file each."""
