"""Send a party everything from an administrator's cell, and print the answers."""

import json
import sys
from pathlib import Path

from hostile import ask_everything

from sordino.flare.administrator import Administrator

with Administrator(Path(sys.argv[1])) as server:
    server.sites()
    print(json.dumps(ask_everything(server._session.api.cell, *sys.argv[2:])))
