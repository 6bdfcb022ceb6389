"""A package ``vllm`` of the tested version whose server answers health and metrics, and nothing else."""

import socket
from pathlib import Path

VERSION = "0.32.0"
SERVER = '''
import http.server, json, os, signal, sys
with open("argv.json", "w") as file:
    json.dump(sys.argv[1:], file)
if "--break" in sys.argv:
    print("RuntimeError: no kernel image", file=sys.stderr)
    sys.exit(3)
PAGE = """# HELP vllm:request_success_total Finished.
vllm:request_success_total{finished_reason="stop",model_name="a {b} c"} 3.0
vllm:request_success_total{finished_reason="length",model_name="a {b} c"} 1.0
vllm:generation_tokens_total{engine="0"} 500.0
vllm:request_generation_tokens_sum{engine="0"} 480.0
vllm:e2e_request_latency_seconds_sum{engine="0"} 6.0
vllm:spec_decode_num_drafts_total{engine="0"} 100.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 150.0
"""
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write((PAGE if self.path == "/metrics" else "").encode())
        if "--die" in sys.argv and self.path == "/metrics":
            self.wfile.flush()
            os._exit(7)
def stop(number, _):
    print("heard", signal.Signals(number).name, file=sys.stderr, flush=True)
    sys.exit(5)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("", port), Answers).serve_forever()
'''
PLUGINS = "[vllm.general_plugins]\nrecurrent_drafter = recurrent_drafter.vllm.plugin:register\n"


def install(folder: Path, version: str = VERSION) -> Path:
    """Into a folder, which PYTHONPATH is to name."""
    package = folder / "vllm/entrypoints/openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    facts = folder / f"vllm-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (facts / "entry_points.txt").write_text(PLUGINS)
    return folder


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as trial:
        trial.bind(("", 0))
        return int(trial.getsockname()[1])
