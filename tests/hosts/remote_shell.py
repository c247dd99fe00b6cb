"""A remote shell for two hosts that are namespaces of one machine: what sshd and ssh are between real ones.

`serve` is the first process of a host. Who asks over the network has a command run there, in an environment of
its own: like sshd, it passes on none of the asker's. `ask HOST WORD...` is the other end, and is what Open MPI is
given as its launch agent. A host that cannot be reached is told of after CONNECT seconds.

Not here, on purpose: keys, and standard input. The network has two ends and no other.
"""

import json
import os
import socket
import subprocess
import sys
import threading

PORT = 2213
CONNECT = 5.0  # seconds; of ssh it would be `-o ConnectTimeout=5`


def serve() -> None:
    """Serves in a child. This process is the host's first, and inherits what daemons leave: it only buries them."""
    if os.fork() == 0:
        listener = socket.create_server(("", PORT))
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=run_for, args=(connection,), daemon=True).start()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def run_for(connection: socket.socket) -> None:
    """Runs the command of one connection, and answers with what it wrote and its exit code."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with connection, connection.makefile("rw") as lines:
        command = json.loads(lines.readline())
        done = subprocess.run(["sh", "-c", command], env=environment, cwd="/", stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            lines.write(json.dumps([done.stdout.decode(errors="replace"), done.returncode]) + "\n")
            lines.flush()
        except OSError:
            pass  # the asker is gone


def ask(host: str, command: str) -> int:
    """Has `host` run the command of a shell, and gives its exit code, or 255 as ssh does if there is no answer."""
    try:
        connection = socket.create_connection((host, PORT), timeout=CONNECT)
        connection.settimeout(None)
        with connection, connection.makefile("rw") as lines:
            lines.write(json.dumps(command) + "\n")
            lines.flush()
            written, code = json.loads(lines.readline() or '["the connection was closed\\n", 255]')
    except OSError as error:
        print(f"{host}: {error}", file=sys.stderr)
        return 255
    sys.stderr.write(written)
    return code


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve()
        case ["ask", host, *words]:
            sys.exit(ask(host, " ".join(words)))
        case _:
            sys.exit("usage: remote_shell.py serve | ask HOST WORD...")
