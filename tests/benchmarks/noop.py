"""A Typer command that does nothing: what any command line in Python costs."""

import typer

app = typer.Typer()


@app.command()
def main() -> None:
    """Do nothing."""


app()
