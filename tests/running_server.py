"""`jaxserve serve` as a user runs it: its own process, its own engine process, on free ports."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx


class Server:
    """`with Server("--max-num-seqs", "4", model=path) as server: server.post(...)`"""

    def __init__(self, *flags: str, model: Path | None = None):
        self._argv = [sys.executable, "-m", "jaxserve", "serve", *([str(model)] if model else [])]
        self._argv += ["--port", "0", "--grpc-port", "0", *flags]

    def __enter__(self) -> "Server":
        self.process = subprocess.Popen(self._argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if found := re.match(r"\s+HTTP\s+(\S+)", line):
                self.url = found[1]
            if found := re.match(r"\s+gRPC\s+(\S+)", line):
                self.grpc = found[1]
            if line.startswith("  curl"):
                break
        else:
            self.process.stdout.close()
            self.process.wait(60)
            raise AssertionError(f"the server did not start:\n{self.output}")
        self._drain = subprocess.Popen(["cat"], stdin=self.process.stdout, stdout=subprocess.DEVNULL)
        self.client = httpx.Client(base_url=self.url, timeout=120)
        return self

    def __exit__(self, *exc) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        self.process.stdout.close()
        self._drain.wait(10)

    def post(self, path: str, **body) -> dict:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def complete(self, prompt, **body) -> dict:
        return self.post("/v1/completions", prompt=prompt, return_token_ids=True, **body)["choices"][0]

    def ask(self, question: str, **body) -> str:
        messages = [{"role": "user", "content": question}]
        answer = self.post("/v1/chat/completions", messages=messages, temperature=0, **body)
        return answer["choices"][0]["message"]["content"]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        total = 0.0
        for line in self.client.get("/metrics").text.splitlines():
            found = re.match(r"([^ {]+)(?:\{(.*)\})? (\S+)$", line)
            if found and found[1] == name and all(f'{k}="{v}"' in (found[2] or "") for k, v in labels.items()):
                total += float(found[3])
        return total

    def wait_for(self, what: str, holds, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"still not: {what}"
            time.sleep(0.02)

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if "jaxserve.client.host" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
        raise AssertionError("no engine process")
