"""Make pictures from a prompt.

python examples/offline_inference/text_to_image/text_to_image.py --model=tiny/qwen-image \\
    --prompt="a cat reading a book" --output=cat.png --pipeline-parallel-size=2
"""

import sys

from shardit import Omni
from shardit.cli import run_script
from shardit.flags import GenerateFlags


def main(flags: GenerateFlags) -> None:
    """Make pictures from a prompt."""
    with Omni(**flags.omni_arguments()) as omni:
        for output in omni.generate(flags.prompts(), flags.sampling_params()):
            print(*output.save(flags.output), sep="\n")


if __name__ == "__main__":
    sys.exit(run_script(main, output="output.png"))
