"""Writes sound to files: WAV, and the sound track of a video."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardit.diffusion.output.arrays import array_of
from shardit.errors import InputError, NothingToSaveError

if TYPE_CHECKING:
    import numpy as np
    from av.audio.stream import AudioStream
    from av.container import OutputContainer

# Sample rates of AAC; others are resampled to the next higher one.
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
_AAC_BITS_PER_CHANNEL = 128_000
_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}
_BLOCK = 1 << 16
MOST_SAMPLES = 10_000_000
"""Largest sample rate of a file."""


def samples_of(waveform: Any) -> np.ndarray:
    """Convert a waveform of (channels, samples), tensor or array, to float32 between -1 and 1."""
    import numpy as np

    return np.clip(np.nan_to_num(array_of(waveform).astype(np.float32)), -1.0, 1.0)


def write_wav(waveform: Any, path: Path, sample_rate: int, comment: str) -> None:
    """Write one waveform of (channels, samples) as WAV, 16 bits, with a comment in its metadata."""
    import av

    samples = samples_of(waveform)
    if not samples.size:
        raise NothingToSaveError("nothing to save, the sound has no samples; ask for a longer one")
    with av.open(str(path), "w", format="wav") as container:
        container.metadata["comment"] = comment
        track = _add(container, "pcm_s16le", sample_rate, len(samples))
        _encode(container, track, samples, sample_rate)


def add_track(container: OutputContainer, waveform: Any, sample_rate: int) -> AudioStream:
    """Add a sound track to an MP4 that is being written; `write_track` fills it."""
    rate = next((rate for rate in _AAC_RATES if rate >= sample_rate), _AAC_RATES[-1])
    track = _add(container, "aac", rate, len(waveform))
    track.bit_rate = _AAC_BITS_PER_CHANNEL * len(waveform)
    return track


def write_track(container: OutputContainer, track: AudioStream, waveform: Any, sample_rate: int) -> None:
    """Encode a waveform of (channels, samples) into a sound track."""
    _encode(container, track, samples_of(waveform), sample_rate)


def _add(container: OutputContainer, codec: str, rate: int, channels: int) -> Any:
    if channels not in _LAYOUTS:
        raise InputError(f"sound with {channels} channels cannot be written; give a file that ends in .safetensors")
    return container.add_stream(codec, rate=rate, layout=_LAYOUTS[channels])


def _encode(container: OutputContainer, track: Any, samples: np.ndarray, sample_rate: int) -> None:
    import av
    import numpy as np

    context = track.codec_context
    resampler = av.AudioResampler(format=context.format, layout=context.layout, rate=context.rate)
    for start in range(0, samples.shape[1], _BLOCK):
        block = np.ascontiguousarray(samples[:, start : start + _BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=_LAYOUTS[len(samples)])
        frame.sample_rate, frame.pts = sample_rate, start
        for ready in resampler.resample(frame):
            container.mux(track.encode(ready))
    for ready in resampler.resample(None):
        container.mux(track.encode(ready))
    container.mux(track.encode(None))
