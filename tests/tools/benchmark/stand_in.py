"""A peer without PyTorch: speaks the protocol in plain JSON and records its rounds in a file.

STAND_IN names the way in which it fails, STAND_IN_LOG the file.
"""

import json
import os
import sys

fault = os.environ.get("STAND_IN", "")
if fault == "dies":
    sys.exit("no module named torch here")
for number, line in enumerate(sys.stdin):
    if number == 0:
        job = json.loads(line)
        reply = {"what": "a stand-in", "prepare_seconds": 0.5, "first_call_seconds": 0.25}
        reply["peak_memory"] = 5_000_000
        if "device" in job:
            reply["device"] = job["device"]
        if fault == "another network":
            reply["parameters"] = 7
    else:
        with open(os.environ["STAND_IN_LOG"], "a") as log:
            log.write(f"{job['peer']} {number}\n")
        # 4, 8, 16 ... images in two seconds
        reply = {"images": 2 ** (number + 1), "seconds": 2.0, "cpu_seconds": 4.0}
        reply.update({"idle_cpu_seconds": job.get("idle", 0.0), "peak_memory": 5_000_000 + number})
    if fault == "raises":
        reply = {"error": "ValueError: broken\nin two lines", "traceback": "Traceback ..."}
    print("babble" if fault == "babbles" else json.dumps(reply), flush=True)
