"""A worker that speaks `msclap_worker.py`'s protocol and runs no network; a prompt says what it is to do."""

import json
import os
import sys
import time

import numpy
from safetensors.numpy import load_file

weights, tokenizer, device = sys.argv[1:]
state = load_file(weights)
if "broken" in state:
    print(json.dumps({"error": "the weights are not those of MS-CLAP 2023"}), flush=True)
    sys.exit(1)
print(json.dumps({"versions": {"pid": str(os.getpid()), "device": device, "tokenizer": tokenizer}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    audio = numpy.load(asked["audio"])
    assert audio.dtype == numpy.float32
    what = asked["prompts"][0]
    if what == "die":
        print("first words\nCUDA error: out of memory", file=sys.stderr, flush=True)
        os._exit(3)
    if what == "sleep":
        time.sleep(60)
    pairs = zip(audio, asked["prompts"], strict=True)
    scores = [float(clip.mean()) * len(prompt) * float(state["scale"]) for clip, prompt in pairs]
    said = {"refuse": {"error": "a prompt of 2000 tokens"}, "few": {"scores": scores[1:]}, "junk": 7}
    print(json.dumps(said.get(what, {"scores": scores})), flush=True)
