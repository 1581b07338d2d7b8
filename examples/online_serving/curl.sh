#!/bin/sh
# A picture that is waited for, and a job that is followed, with curl alone. Start a server first:
#   shardit serve tiny/qwen-image --port 8091
set -eu
url=${1:-http://localhost:8091}

# OpenAI's synchronous call; the picture comes as base64 within JSON.
curl -sSf "$url/v1/images/generations" -H 'Content-Type: application/json' \
    -d '{"prompt": "a cat", "seed": 1}' >cat.json
python3 -c 'import base64, json; open("cat.png", "wb").write(base64.b64decode(json.load(open("cat.json"))["data"][0]["b64_json"]))'
echo cat.png

# A job: accepted at once, followed by server-sent events, then fetched.
job=$(curl -sSf "$url/v1/images/generations" -H 'Prefer: respond-async' -H 'Content-Type: application/json' \
    -d '{"prompt": "a dog", "seed": 2}' | python3 -c 'import json, sys; print(json.load(sys.stdin)["id"])')
curl -sSNf "$url/v1/images/$job/events"
curl -sSf "$url/v1/images/$job/content/0" -o dog.png
echo dog.png
