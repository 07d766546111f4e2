"""JupyterLab as `make lab` starts it: for this machine only, with a token, asking nobody else anything."""

from pathlib import Path
from typing import Any

c: Any = get_config()  # type: ignore[name-defined]  # noqa: F821  (traitlets provides it)

c.ServerApp.ip = "127.0.0.1"
c.ServerApp.port_retries = 50  # the next free port, when the one asked for is in use
c.ServerApp.root_dir = str(Path(__file__).resolve().parent.parent)
c.LabApp.default_url = "/lab/tree/notebooks/00-start-here.ipynb"
c.ServerApp.allow_root = True  # some demonstrations show more as root; the token is on in any case
c.ServerApp.answer_yes = True  # Ctrl-C stops at once, without a question
c.KernelManager.transport_encryption = "auto"

# Nothing is asked of other machines: no news, no search for updates, no catalogue of extensions.
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"
# The search for language servers starts node and others, which write to the reader's home.
c.LanguageServerManager.autodetect = False
