"""Adapters on the Hugging Face hub, by its own client and a stub of its server."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from typing import ClassVar

import pytest
from stored_models import bare, trained

from lora_inject import ArgumentError, FormatError, LoRAInjectError, load, save

pytestmark = pytest.mark.cpu("it is about files")
pytest.importorskip("huggingface_hub")
SHA = "0" * 40
CLIENT = """
import torch
from helpers import ids
from stored_models import bare, trained
from lora_inject import load, save

model, x = trained(), ids()
save(model, "mine", push_to_hub="me/adapter")
assert torch.equal(load(bare(), "me/adapter")(x), model(x))
print("the same")
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as uploading and downloading small files need."""

    repos: ClassVar = defaultdict(dict)  # files by repository
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/"):
            name = "/".join(path.split("/")[2:4])
            files = self.repos.get(name)
            if files is None:
                return self.answer({"error": "no"}, 404, X_Error_Code="RepoNotFound")
            if "/tree/" in path:
                entries = [{"type": "file", "path": n, "size": len(d), "oid": SHA}
                           for n, d in files.items()]  # fmt: skip
                return self.answer(entries)
            siblings = [{"rfilename": n} for n in files]
            return self.answer({"id": name, "modelId": name, "sha": SHA, "siblings": siblings})
        if "/resolve/" not in path:
            return self.answer({"error": "no"}, 404)
        user, repo, _, _, *rest = path.split("/")
        data = self.repos[f"{user}/{repo}"]["/".join(rest)]
        return self.answer(data, ETag=f'"{len(data)}-{hash(data)}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0].strip("/")
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            self.repos[name] = {}
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        name = "/".join(path.split("/")[2:4])
        if "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if "/commit/" not in path:
            return self.answer({"error": "no"}, 404)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.repos[name][value["path"]] = base64.b64decode(value["content"])
        return self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}", "commitOid": SHA})


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
    Hub.repos.clear()


def test_an_adapter_goes_to_the_hub_and_comes_back_by_its_name(hub, tmp_path):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": paths,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.stdout == "the same\n", done.stderr
    assert set(Hub.repos["me/adapter"]) == {
        "adapter_config.json", "adapter_model.safetensors", "README.md",
    }  # fmt: skip
    assert b"# mine" in Hub.repos["me/adapter"]["README.md"]


def test_what_the_hub_does_not_give_is_one_error():
    with pytest.raises(FormatError, match="no file or directory nobody/nothing, and the hub"):
        load(bare(), "nobody/nothing")
    with pytest.raises(FormatError, match="no file or directory a/b/c"):
        load(bare(), "a/b/c")


def test_what_cannot_be_uploaded_is_refused_before_it_is_written(tmp_path):
    for name, format, said in (
        ("adapter", "peft", "such as"),
        ("me/adapter", "kohya", "is for the formats"),
    ):
        with pytest.raises(ArgumentError, match=f"push_to_hub.*{said}"):
            save(trained(), tmp_path / "a", format=format, push_to_hub=name)
        assert not (tmp_path / "a").exists()


def test_an_upload_that_fails_leaves_what_was_saved(tmp_path):
    with pytest.raises(LoRAInjectError, match="is saved, and was not uploaded to me/adapter"):
        save(trained(), tmp_path / "a", push_to_hub="me/adapter")  # offline
    load(bare(), tmp_path / "a")


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ArgumentError, match="pip install huggingface_hub"):
        save(trained(), tmp_path / "a", push_to_hub="me/adapter")
    with pytest.raises(FormatError, match=r"no file or directory me/adapter.*not installed"):
        load(bare(), "me/adapter")
