"""Serve a trained model over HTTP, as OpenAI's completions API does; under torchrun, spread over several processes.

python tools/serve.py --load DIR [--port 8000]
curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once", "max_tokens": 20}'
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hc.inference.options import add_model_arguments, load_with
from megatron_hc.launch import one_voice

if TYPE_CHECKING:
    from megatron_hc.inference import Engine, Loaded

KEEP_ALIVE_S = 75  # longer than clients keep idle connections: else they send requests into one that is closing
TOKEN_VARIABLE = "MEGATRON_HC_SERVE_TOKEN"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add_model_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    group.add_argument("--port", type=int, default=8000, help="0: any free one, which is printed (default: 8000)")
    group.add_argument(
        "--token-file", help=f"file with the bearer token that requests must bring; or set {TOKEN_VARIABLE}"
    )
    group.add_argument("--served-model-name", help="name in the API (default: the folder's)")
    group.add_argument("--max-batch-size", type=int, default=16, help="texts that are written at a time (default: 16)")
    group.add_argument("--max-queue", type=int, default=256, help="texts that wait; beyond: status 429 (default: 256)")
    group.add_argument("--max-length", type=int, help="tokens of a text at most (default: the model's positions)")
    group.add_argument("--max-prompt-tokens", type=int, help="of one prompt (default: --max-length less 1)")
    group.add_argument("--max-new-tokens", type=int, help="of one text (default: --max-length less 1)")
    group.add_argument("--max-body-bytes", type=int, default=1 << 20, help="of one request (default: 1 MiB)")
    group.add_argument("--body-timeout", type=float, default=30.0, help="seconds for a request to arrive (default: 30)")
    group.add_argument(
        "--shutdown-timeout", type=int, default=30, help="seconds that texts may take to end at a stop (default: 30)"
    )
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> str | None:
    """Refuse what cannot be served, or should not be; returns the token."""
    for name in ("max_batch_size", "max_queue", "max_length", "max_prompt_tokens", "max_new_tokens", "max_body_bytes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if arguments.max_length == 1:
        raise ValueError("--max-length must be at least 2, not 1: a prompt has a token, and what is written another")
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port must be in 0 .. 65535, not {arguments.port}")
    if not arguments.body_timeout > 0 or arguments.shutdown_timeout < 0:
        raise ValueError("--body-timeout must be positive, and --shutdown-timeout not negative")
    token = os.environ.get(TOKEN_VARIABLE)
    if arguments.token_file is not None:
        try:
            token = Path(arguments.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--token-file {arguments.token_file} cannot be read: {error}") from error
        if not token:
            raise ValueError(f"--token-file {arguments.token_file} is empty")
    if not token and not is_loopback(arguments.host):
        raise ValueError(
            f"--host {arguments.host} can be reached from other machines: give --token-file FILE or set "
            f"{TOKEN_VARIABLE}, or leave --host out"
        )
    return token or None


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(arguments: argparse.Namespace, token: str | None) -> int:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'megatron_hc[serve]'") from error
    from megatron_hc.inference import Decoder, Engine
    from megatron_hc.inference.service import follow

    loaded = load_with(arguments)
    if loaded.mesh.size("dp") > 1:
        raise ValueError(
            f"{loaded.mesh.world_size} processes for tensor-model-parallel-size times pipeline-model-parallel-size = "
            f"{loaded.config.parallel.model_parallel_size}: start one server per copy of the model"
        )
    room = loaded.config.model.max_positions
    length = arguments.max_length or room
    if length > room:
        raise ValueError(f"--max-length ({length}) exceeds --max-position-embeddings ({room}) of the model")
    decoder = Decoder(loaded.model, loaded.config, loaded.mesh, rows=arguments.max_batch_size, max_length=length)
    engine = Engine(decoder, loaded.tokenizer)
    if not loaded.mesh.is_first:
        # torchrun passes signals on to all processes: the first one decides when the others end.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        follow(engine)
        return 0
    return serve(arguments, token, engine, loaded)


def serve(arguments: argparse.Namespace, token: str | None, engine: Engine, loaded: Loaded) -> int:
    """In the first process: until a signal comes, or the engine fails (exit code 1)."""
    import uvicorn

    from megatron_hc.inference.completions import Limits
    from megatron_hc.inference.metrics import Metrics
    from megatron_hc.inference.server import Settings, build_app
    from megatron_hc.inference.service import Service

    length = engine.decoder.max_length
    settings = Settings(
        model_name=arguments.served_model_name or Path(arguments.load).resolve().name,
        token=token,
        body_timeout_s=arguments.body_timeout,
        limits=Limits(
            prompt_tokens=min(arguments.max_prompt_tokens or length, length - 1),
            new_tokens=min(arguments.max_new_tokens or length, length - 1),
            total_tokens=length,
            body_bytes=arguments.max_body_bytes,
        ),
    )
    servers: list[Any] = []

    def stop(error: BaseException) -> None:
        for server in servers:
            server.should_exit = True

    metrics = Metrics()
    service = Service(engine, arguments.max_queue, metrics, stop)
    config = uvicorn.Config(
        build_app(service, loaded.tokenizer, settings, metrics),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=arguments.shutdown_timeout,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    socket = config.bind_socket()
    address, port = socket.getsockname()[:2]
    print(f"serving {loaded.folder} as {settings.model_name!r} at http://{address}:{port}/v1/completions", flush=True)
    servers.append(uvicorn.Server(config))
    servers[0].run(sockets=[socket])
    return 0 if service.error is None else 1


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    with one_voice("serve.py"):
        from megatron_hc.mesh import leave_groups

        code = run(arguments, check(arguments))
        leave_groups()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
