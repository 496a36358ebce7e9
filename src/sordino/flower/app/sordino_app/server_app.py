"""The server's end: `sordino flower up` says where its files are."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sordino.flower.coordinator import run

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run an experiment over the connected nodes."""
    run(grid, context.run_id, context.run_config)
