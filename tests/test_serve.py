"""The server over real HTTP: pictures while they are denoised, batches, cancelling, and who is not let in."""

import base64
import http.client
import io
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from bench.ranks import ProgramRanks
from data.pictures import encode_png
from model.sampler_config import SamplerConfig
from tests.runs import PROMPTS, DrawingRun, wait_for
from tests.servers import until
from train import serve
from train.distributed.ranks import alone
from train.inference.pipeline import Pipeline, PipelineConfig
from train.inference.saved_model import LoadedModel
from train.serving.orders import Orders, Refusal
from train.serving.server import SILENT_S
from train.serving.server import Server as Listener

TOKEN = "0123456789abcdef"
LONG = {"prompt": "a", "steps": 1000, "previews": False}
SAMPLER = SamplerConfig(sampler="ddim", steps=4, guidance=2.0, max_new_tokens=6)
GIVEN = encode_png(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


class Server:
    """A running train.serve and its client."""

    def __init__(self, program: ProgramRanks) -> None:
        self.program = program
        wait_for(lambda: "Ctrl-C" in program.output, program)
        self.port = int(program.output.partition("http://127.0.0.1:")[2].split()[0])

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        sent = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, data, {name: value for name, value in sent.items() if value})
        return connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with closing(self.send(method, path, body, **headers)) as answer:
            return answer.status, json.loads(answer.read())

    def info(self) -> dict:
        return self.ask("GET", "/api/info")[1]

    @contextmanager
    def asking(self, path: str, body: Any) -> Iterator[tuple[dict, Iterator[dict]]]:
        """Yield the first event and an iterator over the others; leaving hangs up."""
        with closing(self.send("POST", path, body)) as answer:
            assert answer.status == 200, answer.read()
            events = (json.loads(line) for line in answer)
            yield next(events), events


@contextmanager
def serving(drawn: DrawingRun, log: Path, *more: str) -> Iterator[Server]:
    argv = [f"checkpoint={drawn.run_dir}", "device=cpu", "port=0", "sampler=ddim", "steps=4", "guidance=2"]
    argv += ["max_new_tokens=6", "preview_share=1", "max_waiting=3", "seed=9", *more]
    with ProgramRanks(serve.main, argv, None, log, {"TRANSFUSION_TOKEN": TOKEN}) as program:
        yield Server(program)


@pytest.fixture(scope="module")
def server(drawn: DrawingRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(drawn, tmp_path_factory.mktemp("serve") / "log") as server:
        yield server
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == [0], server.program.output
        assert TOKEN not in server.program.output and "Traceback" not in server.program.output


@pytest.fixture(scope="module")
def pipeline(drawn: DrawingRun) -> Pipeline:
    return Pipeline.load(PipelineConfig(checkpoint=str(drawn.run_dir), device="cpu"), alone())


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))


def pictures(done: dict) -> list[np.ndarray]:
    assert done["event"] == "done", done
    return [pixels(part["picture"]) for parts in done["samples"] for part in parts]


def test_a_picture_is_seen_while_it_is_denoised_and_ends_with_the_bits_of_sampling(
    server: Server, pipeline: Pipeline
) -> None:
    """P12: a function of prompt, seed and number, as train.sample's; with the settings that made it."""
    with server.asking("/api/draw", {"prompt": PROMPTS[0], "n": 2, "seed": 5}) as (first, rest):
        assert first["event"] == "queued" and first["waiting"] == 0
        started, *steps, done = rest
    assert started["event"] == "started" and started["rows"] == 2
    assert [(step["event"], step["step"], step["steps"]) for step in steps] == [("step", i, 4) for i in (1, 2, 3, 4)]
    shown = [[pixels(sample["preview"]) for sample in step["samples"]] for step in steps[:-1]]
    assert all(picture.shape == (32, 32, 3) for pair in shown for picture in pair) and "preview" not in str(steps[-1])
    assert not np.array_equal(shown[0][0], shown[2][0]) and not np.array_equal(shown[0][0], shown[0][1])
    expected = pipeline.draw([PROMPTS[0]] * 2, SAMPLER, seed=5)
    assert all(np.array_equal(*pair) for pair in zip(pictures(done), expected, strict=True))
    named = {"step": 6, "weights": "ema-7", "sampler": "ddim", "steps": 4, "guidance": 2.0, "seed": 5, "n": 2}
    assert done["settings"].items() >= named.items()


def test_connections_on_which_no_request_comes_are_closed_so_that_they_keep_nobody_out() -> None:
    made = Listener(None, None, print, print)  # type: ignore[arg-type]
    silent, idle, busy = (Mock(cycle=cycle) for cycle in (None, Mock(response_complete=True), Mock()))
    busy.cycle.response_complete = False
    made.server_state.connections = {silent, idle, busy}
    for now, closed in ((0.0, False), (SILENT_S - 1.0, False), (SILENT_S + 1.0, True)):
        made._close_silent(now)
        assert [one.transport.close.called for one in (silent, idle, busy)] == [closed, closed, False]


def test_a_client_that_hangs_up_within_its_body_leaves_no_trace(server: Server) -> None:
    with closing(socket.create_connection(("127.0.0.1", server.port))) as client:
        head = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
        client.sendall(f"POST /api/draw HTTP/1.1\r\n{head}Content-Length: 9\r\n\r\n{{".encode())
        assert server.info()["waiting"] == 0  # the request has been begun
    assert server.info()["running"] == 0 and "Traceback" not in server.program.output


def test_waiting_requests_of_equal_settings_share_a_batch_and_each_gets_its_own_bits(
    server: Server, pipeline: Pipeline
) -> None:
    """P12: three wait behind a long one, two of them alike but for prompt, seed and number; a fourth is turned away."""
    orders = [{"prompt": "a", "seed": 1}, {"prompt": PROMPTS[1], "seed": 2, "n": 2}, {"prompt": "b", "steps": 3}]
    with server.asking("/api/draw", LONG) as (long, _):
        until(lambda: server.info()["running"] == 1)
        with (
            server.asking("/api/draw", orders[0]) as (queued, first),
            server.asking("/api/draw", orders[1]) as (_, second),
        ):
            assert queued["waiting"] == 1
            with server.asking("/api/draw", orders[2]) as (_, third):
                status, told = server.ask("POST", "/api/draw", orders[2])
                assert status == 503 and told["error"] == "3 requests wait" and told.keys() == KEYS
                assert server.ask("DELETE", f"/api/requests/{long['id']}") == (200, {"cancelled": long["id"]})
                ended = [list(events) for events in (first, second, third)]
    assert [events[0]["rows"] for events in ended] == [3, 3, 1]
    one, two, three = (pictures(events[-1]) for events in ended)
    assert np.array_equal(one[0], pipeline.draw(["a"], SAMPLER, seed=1)[0])
    assert all(np.array_equal(*p) for p in zip(two, pipeline.draw([PROMPTS[1]] * 2, SAMPLER, seed=2), strict=True))
    assert len(three) == 1 and ended[2][-1]["settings"]["seed"] == 9, "the server's, where none is given"
    assert server.ask("DELETE", f"/api/requests/{long['id']}")[0] == 404


def test_a_client_that_hangs_up_frees_the_model(server: Server) -> None:
    """While it streams, and while it waits for a text."""
    with server.asking("/api/draw", {**LONG, "n": 40}):
        until(lambda: server.info()["running"] == 1)
        describing = http.client.HTTPConnection("127.0.0.1", server.port)
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png"}
        describing.request("POST", "/api/describe", GIVEN, headers)
        until(lambda: server.info()["waiting"] == 1)
        describing.close()
        until(lambda: server.info()["waiting"] == 0)
    until(lambda: server.info()["running"] == 0)


def test_a_picture_becomes_text_and_parts_are_continued(server: Server, pipeline: Pipeline) -> None:
    """From its bytes or their base64, with the same words as sampling's."""
    status, told = server.ask("POST", "/api/describe?seed=3&temperature=2", GIVEN, Content_Type="image/png")
    encoded = base64.b64encode(GIVEN).decode()
    again = server.ask("POST", "/api/describe", {"picture": encoded, "seed": 3, "temperature": 2})[1]
    order = Orders(pipeline, SAMPLER).describe({"picture": GIVEN, "seed": 3, "temperature": 2.0})
    assert status == 200 and told["text"] == again["text"] == pipeline.describe(order.parts, order.sampler, 3)[0]
    assert told["text"] and told["settings"]["seed"] == 3 and told["settings"]["temperature"] == 2
    asked = {"picture": encoded, "question": PROMPTS[0], "seed": 3}
    question = Orders(pipeline, SAMPLER).describe(asked | {"picture": GIVEN})
    assert (
        server.ask("POST", "/api/describe", asked)[1]["text"].strip()
        == (pipeline.answer([(order.parts, PROMPTS[0])], question.sampler, 3)[0])
    )
    asked = {"parts": [{"text": "a"}, {"picture": encoded}, {"text": "b"}], "n": 2, "temperature": 3, "seed": 1}
    with server.asking("/api/complete", asked) as (_, events):
        done = list(events)[-1]
    order = Orders(pipeline, SAMPLER).complete(asked)
    expected = list(pipeline.complete([order.parts] * 2, order.sampler, 1))
    for mine, parts in zip(done["samples"], expected, strict=True):
        assert [part.get("text") for part in mine] == [part if isinstance(part, str) else None for part in parts]


def test_a_question_that_the_chat_template_refuses_is_refused(pipeline: Pipeline) -> None:
    tokenizer = copy(pipeline.tokenizer)
    tokenizer.chat = {"template": "{{ raise_exception('not you') }}", "tokens": {}}
    orders = Orders(replace(pipeline, tokenizer=tokenizer), SAMPLER)
    with pytest.raises(Refusal, match="refuses the conversation: not you"):
        orders.describe({"picture": GIVEN, "question": "what?"})


def test_pictures_before_a_prompt_are_edited_with_scales_of_their_own(server: Server, pipeline: Pipeline) -> None:
    """P12: the bits of sampling."""
    encoded = base64.b64encode(GIVEN).decode()
    asked = {"prompt": PROMPTS[0], "pictures": [encoded, encoded], "seed": 5, "image_guidance": 1.5}
    with server.asking("/api/draw", asked) as (_, events):
        done = list(events)[-1]
    order = Orders(pipeline, SAMPLER).draw(asked)
    (expected,) = pipeline.edit([(order.parts[:2], PROMPTS[0])], replace(SAMPLER, image_guidance=1.5), seed=5)
    assert np.array_equal(pictures(done)[0], expected) and done["settings"]["image_guidance"] == 1.5
    (drawn_alone,) = pipeline.draw([PROMPTS[0]], SAMPLER, seed=5)
    assert not np.array_equal(expected, drawn_alone)
    guide = LoadedModel(pipeline.model, pipeline.tokenizer, pipeline.config, "model", pipeline.saved)
    with pytest.raises(Refusal, match=r"image_guidance=1.5 of a model with a guide: expected null"):
        Orders(replace(pipeline, guide=guide), SAMPLER).draw(asked)


SENT = base64.b64encode(GIVEN).decode()
KEYS = {"error", "expectation", "remedy"}
NO_PICTURE = encode_png(np.zeros((9000, 9000, 3), np.uint8))  # a decompression bomb of 240 kB
BAD = [
    ("draw", {}, 400, "prompt: None"),
    ("draw", {"prompt": 3}, 400, "prompt: 3"),
    ("draw", {"prompt": "a" * 20_000}, 400, "20,000 characters"),
    ("draw", {"prompt": "a large red circle " * 100}, 400, "tokens"),
    ("draw", {"prompt": "\ud800"}, 400, "surrogate"),
    ("draw", {"prompt": "a", "stpes": 3}, 400, "'stpes'"),
    ("draw", {"prompt": "a", "n": 0}, 400, "n=0"),
    ("draw", {"prompt": "a", "n": 10**6}, 400, "n=1000000"),
    ("draw", {"prompt": "a", "n": True}, 400, "n=True"),
    ("draw", {"prompt": "a", "seed": -1}, 400, "seed=-1"),
    ("draw", {"prompt": "a", "steps": 0}, 400, "steps=0"),
    ("draw", {"prompt": "a", "steps": 2.5}, 400, "steps=2.5"),
    ("draw", {"prompt": "a", "steps": 10**9}, 400, "steps="),
    ("draw", {"prompt": "a", "guidance": "${oc.env:TRANSFUSION_TOKEN}"}, 400, "oc.env"),
    ("draw", b'{"prompt": "a", "guidance": NaN}', 400, "guidance=nan"),
    ("draw", {"prompt": "a", "sampler": "euler"}, 400, "sampler=euler"),
    ("draw", {"prompt": "a", "sampler": "best"}, 400, "sampler='best'"),
    ("draw", {"prompt": "a", "guidance_interval": [3]}, 400, "guidance_interval=[3]"),
    ("draw", {"prompt": "a", "previews": "yes"}, 400, "previews='yes'"),
    ("draw", {"prompt": "a", "pictures": "b"}, 400, "pictures='b'"),
    ("draw", {"prompt": "a", "pictures": ["@"]}, 400, "pictures[0]:"),
    ("draw", {"prompt": " "}, 400, "prompt=' '"),
    ("draw", {"prompt": "", "pictures": [SENT]}, 400, "prompt=''"),
    ("draw", {"prompt": "a", "image_guidance": -1}, 400, "image_guidance=-1"),
    ("draw", b"{", 400, "not JSON"),
    ("draw", b"[" * 100_000, 400, "not JSON"),
    ("draw", [], 400, "not an object"),
    ("draw", b" " * (17 << 20), 413, "too large"),
    ("describe", {}, 400, "picture: it is not there"),
    ("describe", {"picture": "@"}, 400, "picture:"),
    ("describe", {"picture": base64.b64encode(GIVEN[:200]).decode()}, 400, "undecodable picture"),
    ("describe", {"picture": base64.b64encode(NO_PICTURE).decode()}, 400, "oversized picture"),
    ("describe", {"picture": SENT, "question": " "}, 400, "question=' '"),
    ("describe", {"pictures": [SENT]}, 400, "pictures"),
    ("describe", {"picture": SENT, "pictures": [SENT], "question": "a"}, 400, "pictures"),
    ("describe", {"pictures": [SENT] * 20, "question": "a"}, 400, "tokens"),
    ("complete", {"parts": []}, 400, "0 parts"),
    ("complete", {"parts": [{"text": " "}, {"text": "\n"}]}, 400, "prompt=' \\n'"),
    ("complete", {"parts": [{"text": "a", "picture": "b"}]}, 400, "parts[0]"),
]


def test_what_cannot_be_done_is_refused_with_value_expectation_and_remedy(server: Server) -> None:
    """P10, and the server goes on."""
    for route, body, status, words in BAD:
        found, told = server.ask("POST", f"/api/{route}", body)
        assert (found, told.keys()) == (status, KEYS), (body if len(str(body)) < 500 else route, told)
        assert words in told["error"] and all(told.values()) and TOKEN not in str(told), told
    for method, path in (
        ("GET", "/api/draw"),
        ("GET", "/nowhere"),
        ("GET", "/../serve.py"),
        ("GET", "/%2e%2e/serve.py"),
    ):
        found, told = server.ask(method, path)
        assert found in (404, 405) and told.keys() == KEYS, (path, told)
    assert server.info()["running"] == server.info()["waiting"] == 0


def test_only_who_may_is_let_in(server: Server) -> None:
    """Another site's page is known by Host (DNS rebinding), Origin or its type of body; a program by its token."""
    port, order = server.port, {"prompt": "a"}
    refused = [
        ({"Host": "evil.example"}, 403),
        ({"Host": f"127.0.0.1.evil.example:{port}"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": ""}, 415),
        ({"Authorization": ""}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": "Bearer \xff"}, 401),
    ]
    for headers, status in refused:
        found, told = server.ask("POST", "/api/draw", order, **headers)
        assert found == status and told.keys() == KEYS and TOKEN not in str(told), (headers, told)
    for host in (f"localhost:{port}", f"[::1]:{port}", "127.0.0.1:9"):  # the last as through a tunnel
        assert server.ask("GET", "/api/info", Host=host, Origin=f"http://{host}")[0] == 200
    for path in ("/", "/page.css", "/entry.js", "/page.js"):
        with closing(server.send("GET", path, Authorization="")) as answer:
            assert answer.status == 200 and TOKEN not in answer.read().decode()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert "Access-Control-Allow-Origin" not in answer.headers


def test_what_cannot_be_served_is_refused_before_the_model_loads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P10: an open door without a token or with a weak one, a taken port, several ranks."""
    starts = [
        (["host=0.0.0.0"], {}, "host=0.0.0.0: others can reach it, and TRANSFUSION_TOKEN is not set"),
        ([], {"TRANSFUSION_TOKEN": "short"}, "TRANSFUSION_TOKEN is weak"),
        (["preview_share=2"], {}, "preview_share=2"),
        ([], {"RANK": "0", "WORLD_SIZE": "2"}, "2 ranks: one process serves a model"),
    ]
    assert "TRANSFUSION_TOKEN" not in os.environ
    for argv, environment, words in starts:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=words):
            for name, value in environment.items():
                patch.setenv(name, value)
            serve.main(["checkpoint=/nowhere", *argv])
    argv, environment = ["checkpoint=/nowhere", f"port={server.port}"], {"TRANSFUSION_TOKEN": TOKEN}
    with ProgramRanks(serve.main, argv, None, tmp_path / "log", environment) as program:
        assert program.wait() == [2] and f"port={server.port}: Address already in use" in program.output, program.output
        assert "Traceback" not in program.output and TOKEN not in program.output


def test_ctrl_c_ends_the_server_and_says_so_to_who_waits(drawn: DrawingRun, tmp_path: Path) -> None:
    with serving(drawn, tmp_path / "log") as server:
        with server.asking("/api/draw", {**LONG, "n": 40}) as (_, events):
            assert next(events)["event"] == "started"
            server.program.signal(signal.SIGINT)
            *_, last = events
        assert last["event"] == "failed" and last["error"] == "the server stops"
        assert server.program.wait() == [130] and "Traceback" not in server.program.output
