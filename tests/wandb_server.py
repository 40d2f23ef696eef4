"""A loopback stand-in for W&B's server: tests run the real wandb client online against it.

It answers what client 0.31 asks during runs, artifacts, `wandb sync`, `wandb sweep` and `wandb
agent`, and keeps what it was sent: a test sees what W&B would have got, and mocks nothing. What
the client asks but can do without is answered with nothing. Of reading back, a run's state and its
count of rows are served.
"""

import gzip
import itertools
import json
import re
import sys
import threading
import traceback
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class ServedRun:
    """What the server was sent about one run."""

    name: str  # its id, which W&B's API calls its name
    entity: str
    project: str
    display_name: str
    group: str | None = None
    job_type: str | None = None
    sweep: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # without the client's `_wandb`
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    # Each: type, name, aliases, metadata, files and manifest (name -> bytes), committed.
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    exitcode: int | None = None
    complete: bool = False


class WandbServer(ThreadingHTTPServer):
    """Context manager that serves at `url`; give `env` to a client process.

    `runs` (by id) and `sweeps` (YAML text, by id) fill as clients talk. An agent gets the points
    of `agent_runs`, each {parameter: value}, one after another, and then the command to exit.
    `views` are the workspaces (type project-view) and reports (runs) that were saved.
    `fault` is how the server fails while it is set: "hang" (no request is answered), "dead" (each
    connection is cut), an HTTP status (the answer to rows and files), or the name of a GraphQL
    operation that it does not know.
    A request that could not be answered fails the `with` block: the client may only log it.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.env = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40}
        self.runs: dict[str, ServedRun] = {}
        self.sweeps: dict[str, str] = {}
        self.agent_runs: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.fault: str | int | None = None
        self._closing = threading.Event()  # ends the requests that hang
        self._artifacts: list[dict[str, Any]] = []  # an artifact's id is its index
        self._uploads: list[tuple[dict[str, bytes], str]] = []  # upload i sets files[name]
        self._points = itertools.count()  # numbers the agents' runs
        self._errors: list[str] = []
        self._lock = threading.Lock()  # a client sends from several threads

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._closing.set()
        self.shutdown()
        self.server_close()
        assert error or not self._errors, "\n".join(self._errors)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A lost connection is no news: clients drop theirs at exit, and tests kill clients.
        if not isinstance(sys.exception(), ConnectionError):
            self._errors.append(traceback.format_exc())

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The HTTP status and the JSON that a request is answered with."""
        fault = self.fault
        if fault == "hang":
            self._closing.wait()
        if fault in ("hang", "dead"):
            raise ConnectionAbortedError
        if isinstance(fault, int) and path != "/graphql":
            return fault, {}
        with self._lock:
            try:
                if path == "/graphql":
                    request = json.loads(body)
                    # The Python side of the client leaves `operationName` empty.
                    operation = re.findall(r"(?:query|mutation)\s+(\w+)", request["query"])[0]
                    if operation == fault:
                        return 200, {"data": {}}
                    return 200, {"data": self._graphql(operation, request.get("variables"))}
                if upload := re.fullmatch(r"/upload/(\d+)", path):
                    files, name = self._uploads[int(upload[1])]
                    files[name] = body
                if stream := re.fullmatch(r"/files/.+/(.+)/file_stream", path):
                    self._stream(self.runs[stream[1]], json.loads(body))
                return 200, {}
            except (LookupError, TypeError, ValueError):
                self._errors.append(f"{path} {body[:2000]!r}\n{traceback.format_exc()}")
                return 400, {}  # a 500 the client would send again for minutes

    def _stream(self, run: ServedRun, chunk: dict[str, Any]) -> None:
        files = chunk.get("files", {})
        if history := files.get("wandb-history.jsonl"):
            rows = [json.loads(line) for line in history["content"]]
            # By offset, so that a chunk sent twice counts once.
            run.history[history["offset"] : history["offset"] + len(rows)] = rows
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])
        if chunk.get("complete"):
            run.complete, run.exitcode = True, chunk["exitcode"]

    def _graphql(self, operation: str, sent: dict[str, Any]) -> dict[str, Any]:
        match operation:
            case "Viewer" | "GetDefaultEntity":
                viewer = dict.fromkeys(("id", "entity", "username", "email"), "tester")
                return {"viewer": viewer | {"flags": "{}", "teams": {"edges": []}}}
            case "UpsertBucket":
                return {"upsertBucket": self._upsert_run(**sent)}
            case "Run":
                run = self.runs[sent["name"]]
                state = "finished" if run.complete else "running"
                read = {"state": state, "historyLineCount": len(run.history)}
                read |= dict.fromkeys(("config", "summaryMetrics", "systemMetrics"), "{}")
                return {"project": {"run": read}}
            case "CreateRunFiles":
                run = self.runs[sent["run"]]
                files = [{"name": name} | self._upload(run.files, name) for name in sent["files"]]
                return {"createRunFiles": {"runID": run.name, "uploadHeaders": [], "files": files}}
            case "ArtifactType":
                return {"project": None}  # no earlier version with this type
            case "CreateArtifact":
                sent = sent["input"]
                artifact = {"type": sent["artifactTypeName"], "files": {}, "manifest": {}}
                artifact |= {"name": sent["artifactCollectionName"], "committed": False}
                artifact["aliases"] = [alias["alias"] for alias in sent["aliases"] or []]
                artifact["metadata"] = json.loads(sent["metadata"] or "{}")
                self.runs[sent["runName"]].artifacts.append(artifact)
                self._artifacts.append(artifact)
                created = {"id": str(len(self._artifacts) - 1), "state": "PENDING"}
                return {"createArtifact": {"artifact": created | {"artifactSequence": {}}}}
            case "CreateArtifactManifest":  # asked for an id, then for where to put the manifest
                number = sent["artifactID"]
                upload = self._upload(self._artifacts[int(number)]["manifest"], sent["name"])
                manifest = {"id": number, "file": {"id": number} | upload}
                return {"createArtifactManifest": {"artifactManifest": manifest}}
            case "CreateArtifactFiles":
                edges = []
                for file in sent["input"]["artifactFiles"]:
                    artifact = self._artifacts[int(file["artifactID"])]
                    entry = {"storagePath": file["name"], "artifact": {"id": file["artifactID"]}}
                    edges.append({"node": entry | self._upload(artifact["files"], file["name"])})
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                self._artifacts[int(sent["artifactID"])]["committed"] = True
                return {"commitArtifact": {"artifact": {"id": sent["artifactID"], "digest": ""}}}
            case "UpsertSweep":
                sweep = f"sweep{len(self.sweeps)}"
                self.sweeps[sweep] = sent["config"]
                return {"upsertSweep": {"sweep": {"name": sweep}, "configValidationWarnings": []}}
            case "SweepWithRuns":
                config = self.sweeps[sent["sweep"]]
                return {"project": {"sweep": {"config": config, "runs": {"edges": []}}}}
            case "CreateAgent":
                return {"createAgent": {"agent": {"id": sent["sweep"]}}}
            case "ProjectInternalId":
                exists = (sent["entityName"], sent["projectName"]) in self._projects()
                return {"project": {"internalId": "project"} if exists else None}
            case "GetProjects":
                names = sorted(
                    name for entity, name in self._projects() if entity == sent["entity"]
                )
                about = {"createdAt": "", "isBenchmark": False, "user": None}
                about |= {"entityName": sent["entity"]}
                edges = [{"node": about | {"id": name, "name": name}} for name in names]
                pages = {"endCursor": None, "hasNextPage": False}
                return {"models": {"edges": edges, "pageInfo": pages}}
            case "upsertView" | "UpsertView2":
                self.views.append(sent)
                view = {key: sent[key] for key in ("name", "displayName", "description", "spec")}
                project = {"name": sent["projectName"], "entityName": sent["entityName"]}
                view |= {"id": f"view{len(self.views)}", "project": project}
                return {"upsertView": {"view": view, "inserted": True}}
            case "Heartbeat":
                running = json.loads(sent["runState"])  # a command to exit would kill it
                commands = [] if running else [self._next_command(sent["id"])]
                return {"agentHeartbeat": {"commands": json.dumps(commands)}}
        return {}

    def _projects(self) -> set[tuple[str, str]]:
        return {(run.entity, run.project) for run in self.runs.values()}

    def _upload(self, files: dict[str, bytes], name: str) -> dict[str, Any]:
        self._uploads.append((files, name))
        return {"uploadUrl": f"{self.url}/upload/{len(self._uploads) - 1}", "uploadHeaders": []}

    def _upsert_run(self, name: str, entity: str, project: str, **sent: Any) -> dict[str, Any]:
        inserted = name not in self.runs
        run = ServedRun(name, entity or "tester", project or "uncategorized", name)
        run = self.runs.setdefault(name, run)
        # Everything is sent at first, and little but the config later on.
        run.display_name = sent["displayName"] or run.display_name
        run.group = sent["groupName"] or run.group
        run.job_type = sent["jobType"] or run.job_type
        run.sweep = sent["sweep"] or run.sweep
        run.tags = sent["tags"] or run.tags
        if config := json.loads(sent["config"] or "{}"):
            run.config = {key: config[key]["value"] for key in config if key != "_wandb"}
        project_of_run = {"name": run.project, "entity": {"name": run.entity}}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.display_name,
            "project": project_of_run,
        }
        return {"bucket": bucket | {"sweepName": run.sweep}, "inserted": inserted}

    def _next_command(self, sweep: str) -> dict[str, Any]:
        if not self.agent_runs:
            return {"type": "exit"}
        args = {key: {"value": value} for key, value in self.agent_runs.pop(0).items()}
        run_id = f"{sweep}-{next(self._points)}"
        # The program stands in for ${program}; our sweeps name theirs in `command`.
        return {"type": "run", "run_id": run_id, "args": args, "program": None}


class _Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True  # else most answers wait 40 ms for the client's ACK

    def do_POST(self) -> None:
        assert isinstance(self.server, WandbServer)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        status, answer = self.server.answer(self.path, body)
        encoded = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def do_PUT(self) -> None:
        self.do_POST()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request on stderr."""
