"""Run by test_stock.py in a process of its own, as a user would: HF_ENDPOINT, HF_TOKEN and HF_HOME from the
environment, nothing patched. Prints one line of JSON."""

import contextlib
import io
import json
import os
import sys
import time

import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel

from diffedit import DiffEditError, Edit, Editor
from diffedit.cli import app

base, folder, repo, out = sys.argv[1:5]
PROMPTS = ["a photo of a dog", "a pig"]
result = {}


def embed(pipe):
    ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def cli(*args):
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = app([*args, "--json"], standalone_mode=False)
    return {"code": code, **json.loads(stdout.getvalue())}


editor = Editor(base)
edit = editor.ablate("dog", target="cat")
wanted = embed(editor.backend.model.pipeline)
edit.save(folder)
pushed = edit.push_to_hub(repo)
result["pushed"] = {"commit": pushed.commit, "origin": edit.origin, "created": pushed.created}
again = Edit.from_pretrained(repo)
result["pulled"] = {"origin": again.origin, "same": again.files() == edit.files()}

pipe = StableDiffusionPipeline.from_pretrained(base)
result["before"] = float((embed(pipe) - wanted).abs().max())
pipe.load_lora_weights(repo)
result["diffusers"] = float((embed(pipe) - wanted).abs().max())
pipe = StableDiffusionPipeline.from_pretrained(base)
pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, repo)
result["peft"] = float((embed(pipe) - wanted).abs().max())
pipe = StableDiffusionPipeline.from_pretrained(base)
Editor(pipe).load(Edit.from_pretrained(repo, revision=pushed.commit))
result["diffedit"] = float((embed(pipe) - wanted).abs().max())

result["cli push"] = cli("push", folder, "me/by-cli", "--revision", "v1")
result["cli push again"] = cli("push", folder, "me/by-cli", "--revision", "v1")
result["cli push public"] = cli("push", folder, "me/public-one")
result["cli pull"] = cli("pull", "me/by-cli", "--revision", "v1", "-o", out)
result["cli pull nothing"] = cli("pull", "me/nowhere")
result["cli pull slow"] = cli("pull", "me/slow", "--deadline", "0.3")
for text in (["push", folder, "me/by-cli"], ["pull", "me/by-cli", "-o", out, "--overwrite"]):
    app(text, standalone_mode=False)

del os.environ["HF_TOKEN"]
start = time.monotonic()
try:
    edit.push_to_hub(repo)
except DiffEditError as error:
    result["no token"] = {"message": str(error), "seconds": time.monotonic() - start}
print("RESULT " + json.dumps(result))
