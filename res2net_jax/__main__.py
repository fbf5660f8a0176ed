"""The command line: ``python -m res2net_jax COMMAND``."""

import tyro

from res2net_jax import __version__
from res2net_jax.backend import use_compilation_cache
from res2net_jax.command_line import main
from res2net_jax.commands import explain, export, features, models, predict, push

COMMANDS = {
    "list": (models.list_, "The models: size, cost, accuracy."),
    "info": (models.info, "One model: architecture, cost, published results, certificate."),
    "predict": (predict.predict, "What is in pictures: on the terminal, as CSV, JSON or a page."),
    "explain": (explain.explain, "Where in pictures the evidence for a class is."),
    "features": (features.features, "Pictures to arrays: embeddings, or the maps of a stage."),
    "export": (export.export, "A model for other programs: StableHLO, ONNX, timm."),
    "push": (push.push, "A model to the Hugging Face hub."),
}
HELP = """python -m res2net_jax predict res2net50d photo.jpg

Res2Net models and what they say of pictures. A command's own help: python -m res2net_jax COMMAND --help;
the version: --version.

Exit codes: 0 done; 1 with --strict, if pictures were left out; 2 a mistake, or a failure that is explained (--debug
shows its traceback); 130 interrupted."""


def command(arguments: list[str]) -> int | None:
    if arguments == ["--version"]:
        print(f"res2net_jax {__version__}")
        return None
    prog, config = "python -m res2net_jax", (tyro.conf.FlagCreatePairsOff,)
    if arguments and arguments[0] in COMMANDS:
        function, _ = COMMANDS[arguments[0]]
        return tyro.cli(function, prog=f"{prog} {arguments[0]}", args=arguments[1:], config=config)
    app = tyro.extras.SubcommandApp()
    for name, (function, summary) in COMMANDS.items():
        app.command(function, name=name, help=summary)
    if arguments and arguments[0].startswith("--tyro-"):  # a shell completes one word, so an alias has to stand for it
        prog = "res2net_jax"
    return app.cli(prog=prog, args=arguments, description=HELP, config=config)


if __name__ == "__main__":
    use_compilation_cache()
    main(command)
