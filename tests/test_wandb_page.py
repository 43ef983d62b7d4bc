"""The page at wandb: complete after any stop, one per run wherever its folder is, and no obstacle to training."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.pictures import write_sheet
from tests.ranks import children, is_running
from tests.servers import until
from train import wandb_page
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
    files = folder.glob(f"wandb/offline-run-*-{page_id}*/*.wandb")
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        finished = False
        for record in records(path):
            rows += [row_of(record)] if record.HasField("history") else []
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            finished |= record.HasField("exit")
    return rows, summary, finished


def steps_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows]


def signal_service(log: MetricsLog, number: signal.Signals) -> None:
    """Send a signal to wandb's service, a child of this process, once it has what was logged; wait until it is gone."""
    idle = threading.Event()
    log._page._ask(idle.set)
    assert idle.wait(30), "wandb's service does not start"
    for service in [pid for pid in children() if is_running(pid) and is_service(pid)]:
        os.kill(service, number)
        until(lambda service=service: not is_running(service))


def is_service(pid: int) -> bool:
    return b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()


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
                signal_service(log, number)
            log.write({"step": step, "text_loss": 1 / step})
        signal_service(log, number)
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
                until(lambda: Server.rows)
            if step in (6, 12):
                signal_service(log, signal.SIGTERM)
    server.shutdown()
    assert [json.loads(Server.rows[n])["step"] for n in sorted(Server.rows)] == [n // 2 for n in range(2, 26)]
    assert json.loads(Server.summary)["heldout/x/text_loss"] == 1 / 12


def test_a_run_that_goes_back_gets_a_new_page_and_one_that_is_run_again_does_not(tmp_path: Path) -> None:
    """Killed after step 6 and resumed after 4: one page, each step once. Back to 2: a page in the same group, with 1
    and 2 again. Resumed with other numbers than it shows: another."""

    def row(step: int, rate: float = 1e-3) -> dict[str, Any]:
        return {"step": step, "loss": 1 / step, "tokens_seen": 9 * step, "learning_rate": rate, "time": float(step)}

    def attempt(first: int, last: int, *, went_back: int | None = None, rate: float = 1e-3) -> str:
        with RunFolder(tmp_path / "run", alone()) as folder:
            folder.metrics.cut(first - 1)
            log = MetricsLog(LogConfig(wandb="offline"), folder, alone(), {"a": 1}, first - 1, went_back)
            for step in range(first, last + 1):
                log.write(row(step, rate))
            log.write({"step": last, "heldout/x/text_loss": 1 / last, "heldout_ema/x/text_loss": 2 / last})
            log.close()
        return json.loads((tmp_path / "run" / ID_FILE).read_text())["id"]

    def shown(page_id: str) -> list[int]:
        return steps_of([row for row in page(tmp_path / "run", page_id)[0] if "loss" in row])

    first = attempt(1, 6)
    assert attempt(5, 5) == first == attempt(5, 8) and shown(first) == list(range(1, 9))
    rows, summary, _ = page(tmp_path / "run")
    assert [row["_timestamp"] for row in rows if "loss" in row] == list(range(1, 9))
    assert summary["best/x/text_loss"] == 1 / 8 and summary["best/x/text_loss_ema"] == 2 / 8

    second = attempt(3, 5, went_back=2, rate=2e-3)  # other numbers than those it left: still one page more
    pages = {path.stem for path in tmp_path.glob("run/wandb/*/*.wandb")}
    assert pages == {f"run-{first}", f"run-{second}"}
    assert second != first and shown(first) == list(range(1, 9)) and shown(second) == [1, 2, 3, 4, 5]
    assert attempt(4, 7, rate=2e-3) == second and shown(second) == [1, 2, 3, 4, 5, 6, 7]
    third = attempt(6, 9, rate=5e-4)
    assert third not in (first, second) and shown(third) == list(range(1, 10)) and shown(second) == list(range(1, 8))
    (path,) = tmp_path.glob(f"run/wandb/*{third}/*.wandb")
    (found,) = [record.run for record in records(path) if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in found.config.update}
    assert config["forked_from"] == {"page": second, "step": 5} and config["code"] and config["a"] == 1
    assert found.run_group == first and found.display_name == "run from step 5"


def test_an_attempt_that_goes_back_continues_on_a_new_page_and_what_happened_is_an_alert(tmp_path: Path) -> None:
    with open_log(tmp_path / "run", LogConfig(wandb="offline")) as log:
        for step in (1, 2, 3, 4):
            log.write({"step": step, "loss": 1.0})
        first = json.loads((tmp_path / "run" / ID_FILE).read_text())["id"]
        time.sleep(0.2)  # the first page has them, or not: it is the thread's
        log.folder.metrics.cut(2)
        log.event("went_back", 4, "back to step 2", to=2)
        for step in (3, 4, 5):
            log.write({"step": step, "loss": 2.0})
        log.event("save_failed", 5, "the disk is full")
        log.event("stop", 5, "stopped by SIGTERM", status=75)
    rows, *_ = page(tmp_path / "run")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    files = {path.stem: list(records(path)) for path in tmp_path.glob("run/wandb/*/*.wandb")}
    old, new = files.pop(f"run-{first}"), next(iter(files.values()))
    assert {2.0} & {row_of(record).get("loss") for record in old} == set()
    alerts = [(record.alert.title, record.alert.text) for record in old + new if record.HasField("alert")]
    assert alerts == [("run: went back", "back to step 2"), ("run: save failed", "the disk is full")]
    assert any(record.HasField("preempting") for record in new)
    assert [record.exit.exit_code for record in new if record.HasField("exit")] == [75]


def test_previews_are_tables_of_pictures_with_their_prompts_and_survive_wandb_too(tmp_path: Path) -> None:
    prompts = ["a large red circle", "zwei größere blaue Quadrate, die nebeneinander liegen"]
    with open_log(tmp_path / "run", LogConfig(wandb="offline")) as log:
        (tmp_path / "run" / "previews").mkdir()
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 1.0})
            pictures = [np.full((8, 8 * step, 3), 60 * number, np.uint8) for number in (1, 2)]
            path = tmp_path / "run" / "previews" / f"step-{step:08d}.png"
            with path.open("wb") as file:
                write_sheet(file, pictures, prompts)
            log.picture(path, step)
            if step == 2:
                signal_service(log, signal.SIGKILL)
    rows, *_ = page(tmp_path / "run")
    expected = [(kind, step) for step in (1, 2, 3) for kind in (False, True)]
    assert [("previews_step" in row, row["step"]) for row in rows] == expected
    files = sorted(tmp_path.glob("run/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    tables = [record.artifact for path in files for record in records(path) if record.HasField("artifact")]
    assert len(tables) == 3
    for step, artifact in enumerate(tables, start=1):
        where = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        table = json.loads(where["previews.table.json"].read_text())
        assert table["columns"] == ["step", "prompt", "picture"]
        assert [(step, prompt) for step, prompt, _ in table["data"]] == [(step, prompt) for prompt in prompts]
        for number, (*_, picture) in enumerate(table["data"], start=1):
            path = where[picture["path"]]
            with Image.open(path) as shown:
                pixels = np.asarray(shown.convert("RGB"))
            assert (pixels == 60 * number).all() and pixels.shape[1] == step * pixels.shape[0]
            assert path.is_relative_to(tmp_path / "run"), "it moves with the run folder"


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


@pytest.mark.parametrize("server", ["no key", "closed", "silent"])
def test_online_without_a_key_or_an_answer_training_does_not_wait_and_the_page_is_kept_offline(
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """P13. 200 rows cost the training thread less than 10 ms of CPU time and 100 ms more than without a page."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=64)  # accepts connections and never answers
    port = silent.getsockname()[1] if server == "silent" else 9
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "" if server == "no key" else "k" * 40)
    monkeypatch.setattr(wandb_page, "INIT_S", 1)

    def costs(folder: Path) -> tuple[float, float]:
        """Return what the page adds in wall and CPU time of this thread."""
        taken = []
        for mode in ("disabled", "online"):
            with open_log(folder / mode, LogConfig(wandb=mode)) as log:
                began, cpu = time.monotonic(), time.thread_time()
                for step in range(1, 201):
                    log.write({"step": step, "loss": 1.5})
                taken.append((time.monotonic() - began, time.thread_time() - cpu))
        assert steps_of(page(folder / "online")[0]) == list(range(1, 201))
        return taken[1][0] - taken[0][0], taken[1][1] - taken[0][1]

    found: list[tuple[float, float]] = []
    while not any(wall < 0.1 and cpu < 0.01 for wall, cpu in found):  # a wait of ours would be there every time,
        assert len(found) < 4, found  # those of a busy machine are not
        found.append(costs(tmp_path / str(len(found))))
    assert "the page is kept offline" in caplog.text and f"offline, in {tmp_path}" in capsys.readouterr().out
    silent.close()


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
