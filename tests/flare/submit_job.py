"""Submit a job's folder with an administrator's kit, and print how it ended, who refused it, and who is connected."""

import json
import sys
import time
from pathlib import Path

from sordino.flare.administrator import Administrator

with Administrator(Path(sys.argv[1])) as server:
    sites = sorted(server.sites())
    job = server.submit(Path(sys.argv[2]))
    end = time.monotonic() + 60
    while not (status := server.status(job)).over and not status.refused and time.monotonic() < end:
        time.sleep(0.5)
    server.abort(job)
    print(json.dumps({"status": status.text, "refused": status.refused, "sites": sites}))
