"""Run by test_stock.py with HF_HUB_OFFLINE=1 on the cache that online.py filled. Prints one line of JSON."""

import contextlib
import io
import json
import sys
import time

from diffedit import DiffEditError, Edit
from diffedit.cli import app

repo, commit, out = sys.argv[1:4]
result = {}
edit = Edit.from_pretrained(repo)
result["by name"], result["by commit"] = edit.origin, Edit.from_pretrained(repo, revision=commit).origin
for name, call in (
    ("push", lambda: edit.push_to_hub(repo)),
    ("missing", lambda: Edit.from_pretrained("me/never-pulled")),
    ("other revision", lambda: Edit.from_pretrained(repo, revision="v9")),
):
    start = time.monotonic()
    try:
        call()
    except DiffEditError as error:
        result[name] = {"code": error.code, "message": str(error), "seconds": time.monotonic() - start}
stdout = io.StringIO()
with contextlib.redirect_stdout(stdout):
    code = app(["pull", repo, "-o", out, "--json"], standalone_mode=False)
result["cli pull"] = {"code": code, **json.loads(stdout.getvalue())}
stdout = io.StringIO()
with contextlib.redirect_stdout(stdout):
    code = app(["push", out, repo, "--json"], standalone_mode=False)
result["cli push"] = {"code": code, **json.loads(stdout.getvalue())}
print("RESULT " + json.dumps(result))
