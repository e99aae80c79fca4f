"""Serve the built book on this machine alone: python tools/serve.py [--port 8000]"""

import argparse
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HTML = Path(__file__).resolve().parent.parent / "_build" / "html"


class Handler(SimpleHTTPRequestHandler):
    """Static files, with the types that a browser asks of modules and fonts, and no log."""

    extensions_map = {  # noqa: RUF012 - the base class has it so
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".woff": "font/woff",
        ".woff2": "font/woff2",
        ".ipynb": "application/x-ipynb+json",
    }

    def log_message(self, format: str, *args: object) -> None:
        pass


def server(folder: Path = HTML, port: int = 0) -> ThreadingHTTPServer:
    """A server of one folder on 127.0.0.1; port 0 takes a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args(argv).port
    if not (HTML / "index.html").is_file():
        print("There is no built book yet: make book")
        return 1
    try:
        with server(port=port) as web:
            print(f"http://127.0.0.1:{web.server_address[1]}/  (Ctrl-C stops it)")
            web.serve_forever()
    except KeyboardInterrupt:
        print()
    except OSError as error:
        print(f"Port {port} cannot be used ({error.strerror}). Try: make serve PORT={port + 1}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
