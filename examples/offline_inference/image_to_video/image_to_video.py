"""Make a video from a picture and a prompt.

python examples/offline_inference/image_to_video/image_to_video.py --model=tiny/wan2.2-i2v \\
    --prompt="the cat stands up" --image=cat.png --output=cat.mp4 --pipeline-parallel-size=2
"""

import sys

from shardit import Omni
from shardit.cli import run_script
from shardit.flags import GenerateFlags


def main(flags: GenerateFlags) -> None:
    """Make a video from a picture and a prompt."""
    with Omni(**flags.omni_arguments()) as omni:
        for output in omni.generate(flags.prompts(), flags.sampling_params()):
            print(*output.save(flags.output), sep="\n")


if __name__ == "__main__":
    sys.exit(run_script(main, output="output.mp4"))
