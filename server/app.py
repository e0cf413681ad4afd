"""The Flower ServerApp: settings in, strategy started, result written."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from metamoe.common.errors import MetaMoEError
from metamoe.common.files import write_atomically, write_json
from metamoe.common.presets import load_settings, to_toml
from metamoe.server.journal import begin_anew
from metamoe.server.strategy import MetaMoE

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes: ``preset`` (name or file), ``set`` ("key=value ..."), ``out``,
    ``audit-keys`` (folder of the key that signs the server's ledger; empty for one of this run alone), ``resume`` (whether to
    go on with a run in the folder; otherwise a finished one is replaced, and any other refused).
    """
    config = context.run_config
    out = Path(str(config["out"])).absolute()
    try:
        settings = load_settings(str(config["preset"]), str(config["set"]).split())
        if not config["resume"]:
            begin_anew(out)
        write_atomically(out / "settings.toml", to_toml(settings))
        MetaMoE(settings, out, Path(str(config["audit-keys"])) if config["audit-keys"] else None).start(grid)
    except MetaMoEError as error:
        # The command that started the run reads this: Flower keeps a failed run's reason to its log.
        write_json(out / "server" / "error.json", {"code": error.exit_code, "message": str(error)})
        raise
    except Exception as error:
        # Its traceback is in Flower's log.
        message = f"the server failed with {type(error).__name__}: {error}"
        write_json(out / "server" / "error.json", {"code": MetaMoEError.exit_code, "message": message})
        raise
