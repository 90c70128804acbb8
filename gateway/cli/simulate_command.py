"""The command `gateway simulate`."""

import asyncio
from typing import Annotated, Literal

import typer

from gateway.cli.exit_status import stop_with


def simulate(
    kind: Annotated[Literal["ollama", "vllm"], typer.Option(help="Engine to imitate.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: the system chooses.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[
        list[str] | None, typer.Option(help="NAME[,vision][,tools][,thinking][,context=TOKENS]. Can be repeated.")
    ] = None,
    generation: Annotated[Literal["0.33", "0.24"], typer.Option(help="Version of Ollama.")] = "0.33",
    tokens_per_second: Annotated[float, typer.Option(min=0, help="Speed of one request. 0: no limit.")] = 0,
    time_to_first_token: Annotated[float, typer.Option(min=0, help="Seconds before the first token.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests of a text model that Ollama runs at once.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that vLLM runs at once.")] = 256,
    load_seconds: Annotated[float, typer.Option(min=0, help="Seconds that Ollama takes to load a model.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Further option; docs/stand-ins.md lists them."),
    ] = None,
) -> None:
    """Run a stand-in that answers like Ollama or vLLM."""
    from gateway import simulate as stand_ins

    try:
        models = tuple(stand_ins.Model.parse(text) for text in model or ())
    except ValueError as error:
        stop_with([f"--model: {error}"])
    options = stand_ins.Options(
        kind,
        models,
        tokens_per_second=tokens_per_second,
        time_to_first_token=time_to_first_token,
        generation=generation,
        parallel=parallel,
        max_num_seqs=max_num_seqs,
        load_seconds=load_seconds,
    )
    try:
        options = options.with_settings(set_ or ())
    except ValueError as error:
        stop_with([f"--set: {error}"])
    try:
        asyncio.run(stand_ins.serve(options, host, port, lambda opened: print(f"http://{host}:{opened}", flush=True)))
    except OSError as error:
        stop_with([f"--port: cannot listen on {host}:{port}: {error.strerror or error}"])
