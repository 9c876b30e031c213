"""Compare a recipient with its transplants on a page in the browser: see examples/README.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

# Before anything that reads them is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

RANDOM = "**Weights are random: the texts mean nothing.**"


def main(arguments: list[str] | None = None) -> int:
    """Load the recipient and serve the page until interrupted."""
    options = _read(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that temporary files are cleared away then too
    from donor_app.engine import Engine
    from donor_app.page import Page, launch

    from transplant_hf import TransplantError

    with tempfile.TemporaryDirectory(prefix="tiny-donors-") as folder:
        if options.tiny:
            from donor_app.tiny import make_tiny

            options.recipient, options.donors = make_tiny(Path(folder))
        try:
            engine = Engine(options.recipient, options.donors, options.revision, options.device, options.dtype)
        except (TransplantError, OSError) as error:  # OSError is what Transformers raises for a missing model
            print(f"error: {error}", file=sys.stderr)
            return 1
        launch(Page(engine, RANDOM if options.tiny else ""), options.host, options.port)
    return 0


def _read(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare a recipient with its transplants on a page in the browser.",
        epilog="example:\n  python examples/app.py openai-community/gpt2 user/gpt2-law user/gpt2-code",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipient", nargs="?", help="Hub id or folder of a decoder-only model")
    parser.add_argument("donors", nargs="*", metavar="donor", help="Hub id or folder of a donor")
    parser.add_argument("--tiny", action="store_true", help="make small models with random weights instead")
    parser.add_argument("--revision", help="the recipient's branch, tag or commit")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="as in from_pretrained (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve on (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.tiny == bool(options.recipient):
        parser.error("give a recipient and at least one donor, or --tiny and neither")
    if options.recipient and not options.donors:
        parser.error(f"give at least one donor for {options.recipient}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
