"""A picture and a video from a running server, with OpenAI's own package (`pip install openai`).

shardit serve tiny/qwen-image --port 8091
python openai_client.py --prompt "a cat" --output cat.png

shardit serve tiny/wan2.2-t2v --port 8092
python openai_client.py --base-url http://localhost:8092/v1 --prompt "a cat runs" --output cat.mp4
"""

from __future__ import annotations

import argparse
import base64
import os
from pathlib import Path

from openai import OpenAI, OpenAIError


def main() -> None:
    """Make what --output names: a picture (.png) or a video (.mp4)."""
    parser = argparse.ArgumentParser(description="Make a picture or a video on a running server.")
    parser.add_argument("--base-url", default="http://localhost:8091/v1")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--size", help='such as "1280x704"; default: what the server uses')
    parser.add_argument("--seconds", help="length of a video")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, required=True, help=".png or .mp4")
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    try:
        make(args)
    except OpenAIError as error:
        raise SystemExit(f"error: {error}") from None
    print(args.output)


def make(args: argparse.Namespace) -> None:
    """Ask the server and write the file."""
    client = OpenAI(base_url=args.base_url, api_key=os.environ.get("SHARDIT_API_KEY", "none"))
    model = client.models.list().data[0].id
    given = {name: getattr(args, name) for name in ("size", "seconds") if getattr(args, name)}
    own = {} if args.seed is None else {"seed": args.seed}  # fields that OpenAI has not: under diffusers' names
    if args.output.suffix == ".mp4":
        video = client.videos.create(model=model, prompt=args.prompt, extra_body=own, **given)
        video = client.videos.poll(video.id, poll_interval_ms=500)
        if video.status != "completed":
            raise SystemExit(f"error: {video.error.message if video.error else video.status}")
        client.videos.download_content(video.id).write_to_file(args.output)
    else:
        made = client.images.generate(model=model, prompt=args.prompt, extra_body=own, **given)
        args.output.write_bytes(base64.b64decode(made.data[0].b64_json))


if __name__ == "__main__":
    main()
