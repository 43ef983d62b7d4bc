"""Serve a trained model on this machine, to a browser and to programs: prompt to pictures, picture to text.

For looking at a model and for handing it to someone, not for production: one process, one queue, no accounts, no TLS.
It listens on loopback; for another `host` set the environment's TRANSFUSION_TOKEN, which each request must carry. The
sampling options are the defaults of a request. Ctrl-C ends it after the denoising step that is running. The endpoint is
described in docs/sampling.md.
"""

import asyncio
import socket
from dataclasses import asdict, dataclass
from typing import Any

from train.config import load_config, run_program
from train.distributed.cpu_settings import settle_cpu
from train.distributed.launcher import place, refuse_lone_task
from train.distributed.ranks import alone, own_device
from train.inference.pipeline import Pipeline, PipelineConfig

PURPOSE = "For looking at a model, not for production."


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PipelineConfig):
    host: str = "127.0.0.1"  # address to listen on; other than loopback needs TRANSFUSION_TOKEN in the environment
    port: int = 8000  # 0...65535; 0: any free one
    max_waiting: int = 16  # requests that may wait, >= 1; others are told to come back
    # Share, 0...1, of the sampling time that may go into pictures of unfinished ones; 0: none, 1: after every step.
    preview_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port={self.port}: expected 0...65535; 0 is any free one")
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting={self.max_waiting}: expected at least 1")
        if not 0 <= self.preview_share <= 1:
            raise ValueError(f"preview_share={self.preview_share}: expected 0 (no previews)...1 (after every step)")


CONFIG = ServeConfig


def main(argv: list[str]) -> int:
    config = load_config(CONFIG, argv)
    from train.serving.guard import read_token  # the server's libraries, which --help can do without

    refuse_lone_task()
    if (ranks := place().world_size) > 1:
        raise ValueError(f"{ranks} ranks: one process serves a model; start train.serve without torchrun")
    token = read_token(config.host)
    listener = _bind(config.host, config.port)
    device = own_device(config.device)
    settle_cpu(1, computes=device.type == "cpu")
    pipeline = Pipeline.load(config, alone(device))
    return asyncio.run(_serve(config, pipeline, token, listener))


async def _serve(config: ServeConfig, pipeline: Pipeline, token: str | None, listener: socket.socket) -> int:
    """Serve until a signal; return the exit status."""
    from train.serving.app import MOST_BYTES, build_app
    from train.serving.batcher import Batcher
    from train.serving.orders import Orders
    from train.serving.server import Server

    def announce() -> None:
        host, port = listener.getsockname()[:2]
        what = f"{pipeline.weights} of step {model['step']:,} of {config.checkpoint}"
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"serve: {what} at {where}\nserve: {PURPOSE} Ctrl-C ends it.", flush=True)

    model, orders = describe(config, pipeline), Orders(pipeline, config, config.seed)
    info = {
        "model": model,
        "picture": [side * pipeline.space.stride for side in pipeline.grid],  # height, width
        "defaults": {**asdict(orders.defaults.suited_to(pipeline.config.diffusion)), "seed": config.seed},
        "limits": {"n": pipeline.batch_size, "waiting": config.max_waiting, "bytes": MOST_BYTES},
        "purpose": PURPOSE,
    }
    batcher = Batcher(pipeline, config.preview_share, config.max_waiting, model)
    try:
        app = build_app(batcher, orders, info, config.host, token)
        return await Server(app, listener, announce, batcher.stop).until_signal()
    finally:
        batcher.stop()
        await asyncio.to_thread(batcher.join)


def describe(config: ServeConfig, pipeline: Pipeline) -> dict[str, Any]:
    """Return what a picture depends on besides its request."""
    assert pipeline.saved is not None
    saved = pipeline.saved
    facts = {"checkpoint": str(saved.folder), "step": saved.step, "weights": pipeline.weights}
    return {**facts, "guide": pipeline.describe_guide(), "dtype": config.dtype}


def _bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet; raise ValueError for an address that is taken or elsewhere."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"host={host}, port={port}: {error.strerror}; expected an address of this machine and a free port "
            "(port=0: any)"
        ) from None
    return listener


if __name__ == "__main__":
    run_program(main)
