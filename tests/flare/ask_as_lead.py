"""Send parties everything from an administrator's cell, and print the answers."""

import json
import sys
from pathlib import Path

from hostile import ask_everything

from sordino.flare.administrator import Administrator

with Administrator(Path(sys.argv[1])) as server:
    server.sites()
    targets, file = json.loads(sys.argv[2])
    print(json.dumps({target: ask_everything(server._session.api.cell, target, file) for target in targets}))
