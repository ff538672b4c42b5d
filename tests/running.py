"""A service in a process of its own, and raw sockets to knock at it: shared by the tests of the service."""
import contextlib
import socket
import subprocess
import sys
import threading
import time

import httpx

from medimg.deployment.settings import ServiceSettings, to_environ

CODE = "from medimg.deployment.service import serve\nfrom medimg.deployment.settings import from_environ\nif __name__ == '__main__': serve(from_environ({!r}))"


class Running:
    """A started service: `process`, `base`, `key` (an administrator's) and what it printed."""

    def __init__(self, folder, *, bundle, **settings):
        self.settings = ServiceSettings(**{"store": str(folder / "store"), "bundles": (str(bundle),), "port": 0, "decoders": 2, "decode_s": 5.0, "allow_unsigned": True, **settings})
        script = folder / "start.py"
        script.write_text(CODE.format(to_environ(self.settings)))
        self.process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines = [self.process.stdout.readline() for _ in range(3)]
        if not self.lines[2].startswith("medimg_"):
            self.process.kill()
            raise AssertionError(self.process.stderr.read()[-2000:])
        self.base, self.key, self.log = self.lines[0].split()[2], self.lines[2].strip(), []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        self.port = int(self.base.rpartition(":")[2])
        self._wait()

    def _wait(self, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.base}/readyz", verify=not self.settings.tls_cert).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("".join(self.log)[-2000:])

    def client(self, key=None, **more):
        return httpx.Client(base_url=self.base, headers={"authorization": f"Bearer {key or self.key}"}, timeout=30, verify=not self.settings.tls_cert, **more)

    def new_key(self, role, **more):
        from medimg.deployment.guard import Guard
        return Guard(self.settings).ring.create(f"a-{role}", role, **more)

    def knock(self, *pieces, pause=0.0, timeout=10):
        """What comes back when these bytes are sent as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as s:
            try:
                for piece in pieces:
                    s.sendall(piece)
                    time.sleep(pause)
                return s.recv(65536)
            except (ConnectionError, BrokenPipeError):
                return b""

    def alive(self, png):
        """It still answers, quickly."""
        with self.client() as client:
            answer = client.post("/v1/predict", content=png)
        return answer.status_code == 200 and self.process.poll() is None

    def stop(self):
        self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
