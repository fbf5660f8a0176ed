"""The command line: ``python -m res2net_jax list | info MODEL | predict MODEL INPUT...``"""

import tyro

from res2net_jax.command_line import main
from res2net_jax.commands import export, features, models, predict, push

app = tyro.extras.SubcommandApp()
app.command(models.list_, name="list")
app.command(models.info)
app.command(predict.predict)
app.command(features.features)
app.command(export.export)
app.command(push.push)

if __name__ == "__main__":
    main(lambda arguments: app.cli(prog="python -m res2net_jax", args=arguments))
