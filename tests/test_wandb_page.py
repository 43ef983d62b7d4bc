"""The page at wandb: complete after any stop, one per run wherever its folder is, and no obstacle to training."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ranks import children, is_running
from train.checkpoints.run_folder import RunFolder
from train.distributed.ranks import alone
from train.metrics_log import LogConfig, MetricsLog
from train.wandb_file import records, row_of
from train.wandb_page import ID_FILE


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ignore this machine's settings and keys; end wandb's process with the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    if isinstance(wandb := sys.modules.get("wandb"), type(sys)):
        wandb.teardown()


def page(folder: Path, page_id: str | None = None) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Return what a run's offline page holds: its rows, the summary, whether its last file was finished."""
    page_id = page_id or json.loads((folder / ID_FILE).read_text())["id"]
    rows, summary, finished = [], {}, False
    for path in sorted(folder.glob(f"wandb/offline-run-*-{page_id}/*.wandb")):
        finished = False
        for record in records(path):
            rows += [row_of(record)] if record.HasField("history") else []
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            finished |= record.HasField("exit")
    return rows, summary, finished


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


def signal_service(number: signal.Signals) -> None:
    """Send a signal to wandb's service, a child of this process, if it still runs, and wait until it is gone."""
    for service in [pid for pid in children() if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]:
        os.kill(service, number)
        deadline = time.monotonic() + 30
        while is_running(service):
            assert time.monotonic() < deadline, f"wandb's service outlived {number}"
            time.sleep(0.01)


@contextmanager
def open_log(path: Path, config: LogConfig) -> Iterator[MetricsLog]:
    with RunFolder(path, alone()) as folder:
        log = MetricsLog(config, folder, alone(), {})
        yield log
        log.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_that_reaches_wandb_too_costs_the_page_no_row(number: signal.Signals, tmp_path: Path) -> None:
    """Slurm and systemd signal all processes of a job; before the last row, or after it."""
    with open_log(tmp_path / "run", LogConfig(wandb="offline")) as log:
        for step in range(1, 7):
            if step in (3, 6):
                signal_service(number)
            log.write({"step": step, "text_loss": 1 / step})
        signal_service(number)
    rows, summary, finished = page(tmp_path / "run")
    assert steps_of(rows) == [1, 2, 3, 4, 5, 6] and finished
    assert summary["step"] == 6 and summary["text_loss"] == 1 / 6


class Server(BaseHTTPRequestHandler):
    """As much of wandb's server as one page needs: it keeps the rows that it receives and reports them on a resume."""

    protocol_version = "HTTP/1.1"
    rows: dict[int, str]
    summary: str

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = json.loads(content) if content.startswith(b"{") else {}  # else: telemetry
        for name, part in (asked.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                self.rows.update(enumerate(part["content"], start=part["offset"]))
            elif name == "wandb-summary.json":
                type(self).summary = part["content"][-1]
        owner = {"id": "project", "name": "project", "entity": {"id": "us", "name": "us"}}
        last = json.dumps([self.rows[max(self.rows)]] if self.rows else [])
        page = {"id": "page", "name": "page", "config": "{}", "wandbConfig": '{"t": 1}', "project": owner}
        page |= {"historyLineCount": len(self.rows), "historyTail": last, "summaryMetrics": self.summary}
        page |= {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
        answers = {
            "RunResumeStatus": {"model": {**owner, "bucket": page if self.rows else None}},
            "UpsertBucket": {"upsertBucket": {"bucket": page, "inserted": not self.rows}},
            "CreateRunFiles": {"createRunFiles": {"runID": "page", "uploadHeaders": [], "files": []}},
        }
        answer = json.dumps({"data": answers.get(asked.get("operationName"), {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST


@pytest.mark.slow
def test_online_too_what_did_not_reach_the_server_is_sent_again_and_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server.rows, Server.summary = {}, "{}"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with open_log(tmp_path / "run", LogConfig(wandb="online")) as log:
        for step in range(1, 13):
            log.write({"step": step})
            log.write({"step": step, "heldout/x/text_loss": 1 / step})
            if step == 6:
                deadline = time.monotonic() + 30
                while not Server.rows and time.monotonic() < deadline:
                    time.sleep(0.05)
            if step in (6, 12):
                signal_service(signal.SIGTERM)
    server.shutdown()
    assert [json.loads(Server.rows[n])["step"] for n in sorted(Server.rows)] == [n // 2 for n in range(2, 26)]
    assert json.loads(Server.summary)["heldout/x/text_loss"] == 1 / 12


def test_a_run_has_its_page_wherever_it_lies_and_a_copy_may_have_its_own(tmp_path: Path) -> None:
    def page_of(path: Path) -> str:
        with open_log(path, LogConfig(wandb="offline")) as log:
            log.write({"step": 1})
        return json.loads((path / ID_FILE).read_text())["id"]

    first, other = page_of(tmp_path / "a" / "my run: 1"), page_of(tmp_path / "b" / "my run: 1")
    assert first != other and not set(first) & set("/\\#?%: ")
    moved = shutil.move(tmp_path / "a" / "my run: 1", tmp_path / "moved")
    assert page_of(moved) == first
    (moved / ID_FILE).unlink()
    assert page_of(moved) not in (first, other)
    assert page_of(tmp_path / "a" / "my run: 1") != first  # a new run in the old place


def test_the_environment_counts_where_the_config_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, config: LogConfig) -> list[str]:
        with open_log(tmp_path / name, config) as log:
            log.write({"step": 1})
        files = [path for path in tmp_path.glob("*/wandb/offline-run-*/*.wandb") if name in path.name]
        return [record.run.project for path in files for record in records(path) if record.HasField("run")]

    assert written("silent", LogConfig()) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    assert written("environment", LogConfig()) == ["elsewhere"]
    assert written("config", LogConfig(project="here")) == ["here"]
    assert written("disabled", LogConfig(wandb="disabled")) == []
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "pages"))
    (tmp_path / "pages").mkdir()
    assert written("folder", LogConfig()) == ["elsewhere"] and not (tmp_path / "folder" / "wandb").exists()


@pytest.mark.parametrize("key", ["", pytest.param("k" * 40, marks=pytest.mark.slow)])
def test_online_without_a_key_or_a_network_keeps_an_offline_page(
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", key)
    with open_log(tmp_path / "run", LogConfig(wandb="online")) as log:
        log.write({"step": 1})
    assert steps_of(page(tmp_path / "run")[0]) == [1]
    assert "the page is kept offline" in caplog.text and f"offline, in {tmp_path / 'run'}" in capsys.readouterr().out


def _fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("the network is gone")


def test_no_failure_of_wandb_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P13: not installed, refusing to start, failing later; each says so once, and metrics.jsonl has every row."""
    names = {"offline": True, "dir": str(tmp_path / "page" / "files"), "resumed": False, "starting_step": 0}
    failing_run = SimpleNamespace(define_metric=lambda *_, **__: None, log=_fails, finish=_fails, **names)
    faults = [
        None,  # not installed
        SimpleNamespace(Settings=dict, setup=dict, init=_fails),
        SimpleNamespace(Settings=dict, setup=dict, init=lambda **_: failing_run, teardown=_fails),
    ]
    rows = [{"step": step, "text_loss": 1.5} for step in (1, 2, 3)]
    for wandb in faults:
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        caplog.clear()
        with open_log(tmp_path / "run", LogConfig(wandb="offline")) as log:
            for row in rows:
                log.write(row)
                log.picture(tmp_path / "picture.png", row["step"])
        assert caplog.text.count("wandb is off") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_log(tmp_path / "run", LogConfig()) as log:  # disabled: wandb is not imported
        log.picture(tmp_path / "picture.png", 1)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == 3 * rows
