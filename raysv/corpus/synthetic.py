"""The embedded corpus: voices made of a source, a filter and a channel, for the days when no recordings are at hand.

A glottal pulse train with aspiration (the source) excites formants that wander between vowels (the filter), with noise
in between for consonants; see Fant 1960, "Acoustic Theory of Speech Production". What stays with a speaker is pitch,
vocal tract, vowel space, voice quality and tempo. What changes with every session is microphone, room, background and
level, so that the channel says nothing about who speaks across sessions, and what is said is random.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.random import Generator
from numpy.typing import NDArray

from raysv.config import SAMPLE_RATE

VERSION = 1  # part of the cached folder's name: raise it with every change to what is written

SPEAKERS = {"train": 48, "dev": 20, "test": 20}  # half of them female; nobody is in two splits
SESSIONS = 3  # recordings of a speaker through different channels
UTTERANCES = 3  # in each session
UTTERANCE_SECONDS = (1.5, 3.0)
TARGETS_PER_SPEAKER = (24, 6)  # target pairs across sessions, and within one
NON_TARGETS = 1200  # in a pair list
SAME_SEX = 0.8  # share of the non-target pairs
NOISE_SECONDS = 4.0
ROOMS = 12
ROOM_T60 = (0.2, 0.8)  # seconds

HOP = SAMPLE_RATE // 100  # samples of a frame; its Hann window is two hops long, its FFT four, for formants to ring
FREQUENCIES = np.fft.rfftfreq(4 * HOP, 1 / SAMPLE_RATE).astype(np.float32)  # Hz, of a frame
TRACKS = [5, 6, 7, 8]  # after the formants, the columns of fricative, voicing, frication and pitch in `_syllables`
LONGEST = 54_000  # samples: FFT length of a channel; fits the longest utterance and its room's echo

# F1 to F3 in Hz of ten vowels spoken by men: Peterson and Barney 1952, table II; F4 and F5 belong to the tract alone.
VOWELS = np.array(
    [
        [270, 2290, 3010],
        [390, 1990, 2550],
        [530, 1840, 2480],
        [660, 1720, 2410],
        [730, 1090, 2440],
        [570, 840, 2410],
        [440, 1020, 2240],
        [300, 870, 2240],
        [640, 1190, 2390],
        [490, 1350, 1690],
    ]
)
HIGHER_FORMANTS = (3500, 4500)  # Hz
BANDWIDTHS = np.array([60, 80, 120, 180, 250])  # Hz

Array = NDArray[Any]
Samples = NDArray[np.float32]
Row = dict[str, str]


@dataclass(frozen=True)
class Voice:
    """What a speaker keeps from session to session."""

    pitch: float  # Hz
    pitch_range: float  # semitones: spread of the syllables
    formants: Array  # (vowels, 5), Hz
    bandwidths: Array  # (5,), Hz
    fricative: float  # factor of the consonants' frequencies, a shorter tract's being higher
    tilt_db: float  # loss of the voiced source per octave
    breath: float  # amplitude of aspiration beside the pulses
    jitter: float  # of a period
    shimmer: float  # of an amplitude
    tempo: float  # factor of the rate of speech


@dataclass(frozen=True)
class Channel:
    """What a session adds to a voice."""

    response: Array  # complex (LONGEST // 2 + 1,): room, microphone and band
    noise: Samples  # (LONGEST // 2 + 1,): magnitude spectrum of the background, relative to the speech
    peak: float  # of the recording


def corpus_folder(cache: Path, seed: int = 0) -> Path:
    """The folder of the embedded corpus below `cache`, made on first use.

    It appears complete or not at all, also where several processes ask for it at once: each writes its own draft and
    the first to finish gives it the name.
    """
    folder = cache / f"synthetic-{VERSION}-{seed}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f"{folder.name}-draft-") as drafts:
        draft = Path(drafts) / folder.name
        write_corpus(draft, seed)
        try:
            os.replace(draft, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same bytes
                raise
    return folder


def write_corpus(folder: Path, seed: int = 0) -> None:
    """Write the whole corpus: 16 kHz mono 16-bit FLAC, and lists whose paths are relative to `folder`.

    `{train,dev,test}.csv` (`speaker,path,duration_s,session`) list the utterances, `{dev,test}_pairs.txt`
    (`1 enrolment test` or `0 enrolment test`) the pairs, `noise.csv` and `rir.csv` (`path,split`) what augments.
    The same seed gives the same bytes on the same machine.
    """
    for number, (split, speakers) in enumerate(SPEAKERS.items()):
        rows: list[Row] = []
        for index in range(speakers):
            speaker = f"{split}-{'fm'[index % 2]}{index + 1:02d}"
            rows += _write_speaker(folder, speaker, np.random.default_rng([seed, number, index]))
        _write_table(folder / f"{split}.csv", rows)
        if split != "train":
            lines = _pairs(rows, np.random.default_rng([seed, number, speakers]))
            (folder / f"{split}_pairs.txt").write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
    generator = np.random.default_rng([seed, len(SPEAKERS)])
    _write_clips(folder, "noise", [_scaled(clip, 0.5) for clip in _noises(generator)])
    rooms = [_room(t60, generator.uniform(-3, 9), generator) for t60 in np.linspace(*ROOM_T60, ROOMS)]
    _write_clips(folder, "rir", rooms)


def _write_speaker(folder: Path, speaker: str, generator: Generator) -> list[Row]:
    """Record one speaker in all sessions; the rows of the utterance list."""
    voice = _voice(_sex(speaker), generator)
    rows = []
    for session in range(1, SESSIONS + 1):
        channel = _channel(generator)
        for number in range(1, UTTERANCES + 1):
            samples = _record(_speak(voice, generator.uniform(*UTTERANCE_SECONDS), generator), channel, generator)
            path = f"speech/{speaker}/s{session}-{number:02d}.flac"
            _write_audio(folder / path, samples)
            duration = len(samples) / SAMPLE_RATE
            rows.append({"speaker": speaker, "path": path, "duration_s": f"{duration:.2f}", "session": f"s{session}"})
    return rows


def _voice(sex: str, generator: Generator) -> Voice:
    normal = generator.normal
    female = sex == "f"
    tract = (1.16 if female else 1.0) * np.exp(normal(0, 0.05))
    own = np.exp(normal(0, 0.07, 5))
    space = np.exp(normal(0, 0.03, VOWELS.shape))
    higher = np.tile(HIGHER_FORMANTS, (len(VOWELS), 1))
    return Voice(
        pitch=(205 if female else 118) * np.exp(normal(0, 0.18)),
        pitch_range=generator.uniform(1.0, 3.0),
        formants=np.hstack([VOWELS * space, higher]) * own * tract,
        bandwidths=BANDWIDTHS * np.exp(normal(0, 0.3, 5)),
        fricative=tract * np.exp(normal(0, 0.08)),
        tilt_db=generator.uniform(3, 12),
        breath=10 ** (generator.uniform(-35, -15) / 20),
        jitter=generator.uniform(0.002, 0.02),
        shimmer=generator.uniform(0.02, 0.15),
        tempo=np.exp(normal(0, 0.15)),
    )


def _speak(voice: Voice, seconds: float, generator: Generator) -> Samples:
    """A random utterance of a voice, as heard in a dead room through a perfect microphone: `(samples,)`."""
    frames = round(seconds * SAMPLE_RATE / HOP)
    tracks = _syllables(voice, frames, generator)
    formants, fricative, voicing, frication, semitones = np.split(tracks, TRACKS, axis=1)
    declination = np.linspace(1, -1, frames) * voice.pitch_range / 2
    pulses = _pulses(voice, voice.pitch * 2 ** ((semitones[:, 0] + declination) / 12), generator)
    noise = _spectra(generator.standard_normal(len(pulses), dtype=np.float32))
    tilt = np.maximum(FREQUENCIES / 200, 1) ** np.float32(-voice.tilt_db / 6.02)
    throat = voicing * (_spectra(pulses) * tilt + voice.breath * noise)
    hiss = frication * np.exp(-np.square((FREQUENCIES - fricative) / 1200)) * noise
    return _overlap_add(throat * _formant_response(formants, voice.bandwidths) + hiss)


def _syllables(voice: Voice, frames: int, generator: Generator) -> Samples:
    """What the articulators do: `(frames, 9)`, F1 to F5 and the fricative in Hz, voicing, frication, semitones.

    A syllable has three segments: a consonant, a vowel and, now and then, a pause. Segments are steps, smoothed. Ten
    syllables in a row have ten different vowels, so that even short utterances show most of a voice.
    """
    count = frames // 6  # syllables, more than fit
    uniform = generator.uniform
    lengths = np.stack([uniform(5, 12, count), uniform(8, 22, count), uniform(10, 30, count)], 1) / voice.tempo
    lengths[:, 2] *= uniform(size=count) < 0.1
    shuffled = uniform(size=(count // len(VOWELS) + 1, len(VOWELS))).argsort(axis=1)
    loudness = 10 ** (generator.normal(0, 2, count) / 20)
    voiceless = uniform(size=count) < 0.6
    steps = np.zeros((count, 3, 9))
    formants, fricative, voicing, frication, semitones = np.split(steps, TRACKS, axis=2)  # views
    formants[:] = voice.formants[shuffled.ravel()[:count], None]
    fricative[:, :, 0] = voice.fricative * uniform(2000, 6500, (count, 1))
    voicing[:, 0, 0] = np.where(voiceless, 0, 0.3 * loudness)
    voicing[:, 1, 0] = loudness
    frication[:, 0, 0] = np.where(voiceless, uniform(0.05, 0.15, count), 0)
    semitones[:, :, 0] = generator.normal(0, voice.pitch_range, (count, 1))
    tracks = np.repeat(steps.reshape(-1, 9), lengths.round().astype(int).ravel(), axis=0)[:frames]
    kernel = np.hanning(9) / np.hanning(9).sum()
    padded = np.pad(tracks, ((4, 4), (0, 0)), mode="edge")
    return np.stack([np.convolve(track, kernel, "valid") for track in padded.T], 1).astype(np.float32)


def _pulses(voice: Voice, pitch: Array, generator: Generator) -> Samples:
    """Glottal pulses for a pitch in Hz per frame: `((frames + 1) * HOP,)`."""
    samples = (len(pitch) + 1) * HOP
    cycles = np.cumsum(np.interp(np.arange(samples), np.arange(len(pitch)) * HOP, pitch)) / SAMPLE_RATE
    numbers = np.arange(1, int(cycles[-1]))
    times = np.interp(numbers + generator.normal(0, voice.jitter, len(numbers)), cycles, np.arange(samples))
    heights = np.maximum(1 + generator.normal(0, voice.shimmer, len(numbers)), 0) * np.sqrt(SAMPLE_RATE / voice.pitch)
    whole = times.astype(int)
    later = heights * (times - whole)  # a pulse is shared out between two samples, or its pitch would be a staircase
    pulses = np.bincount(whole, heights - later, samples + 1) + np.bincount(whole + 1, later, samples + 1)
    return pulses[:samples].astype(np.float32)


def _spectra(samples: Samples) -> Array:
    """Spectra of the Hann-windowed frames of `((frames + 1) * HOP,)`: `(frames, 2 * HOP + 1)`."""
    hops = samples.reshape(-1, HOP)
    window = np.hanning(2 * HOP + 1)[:-1].astype(np.float32)
    return np.fft.rfft(np.hstack([hops[:-1], hops[1:]]) * window, 4 * HOP)


def _overlap_add(spectra: Array) -> Samples:
    """The signal of frames of spectra `(frames, 2 * HOP + 1)`: `(frames * HOP,)`."""
    hops = np.fft.irfft(spectra).reshape(len(spectra), 4, HOP)
    signal = np.zeros((len(spectra) + 3, HOP), np.float32)
    for part in range(4):
        signal[part : part + len(spectra)] += hops[:, part]
    return signal[: len(spectra)].reshape(-1)


def _formant_response(formants: Samples, bandwidths: Array) -> Array:
    """Resonators in cascade, each of gain 1 at 0 Hz, for formants `(frames, 5)` in Hz: `(frames, 2 * HOP + 1)`."""
    delay = np.exp(-2j * np.pi * FREQUENCIES / SAMPLE_RATE).astype(np.complex64)
    gain = np.ones((), np.float32)
    denominator = np.ones((), np.complex64)
    for formant, bandwidth in zip(formants.T, bandwidths, strict=True):
        radius = np.float32(np.exp(-np.pi * bandwidth / SAMPLE_RATE))
        turn = 2 * radius * np.cos(2 * np.pi * formant / SAMPLE_RATE)[:, None]
        gain = gain * (1 - turn + radius**2)
        denominator = denominator * (1 + radius**2 * delay**2 - turn * delay)
    return gain / denominator


def _channel(generator: Generator) -> Channel:
    frequencies = np.fft.rfftfreq(LONGEST, 1 / SAMPLE_RATE)
    places = np.log1p(frequencies / 500)
    bumps = np.linspace(0, places[-1], 8)
    gain_db = np.interp(places, bumps, generator.normal(0, 1.2, len(bumps)))
    low, high = generator.uniform(50, 200), generator.uniform(6500, 8000)
    band = 1 / np.sqrt((1 + (low / np.maximum(frequencies, 1)) ** 4) * (1 + (frequencies / high) ** 12))
    room = _room(generator.uniform(0.05, 0.25), generator.uniform(12, 20), generator)
    noise = (1 + frequencies / 100) ** -generator.uniform(0, 1)
    noise *= 10 ** (-generator.uniform(35, 45) / 20) / np.sqrt(np.mean(noise**2))
    return Channel(
        response=(np.fft.rfft(room, LONGEST) * band * 10 ** (gain_db / 20)).astype(np.complex64),
        noise=noise.astype(np.float32),
        peak=10 ** (-generator.uniform(2, 6) / 20),
    )


def _record(samples: Samples, channel: Channel, generator: Generator) -> Samples:
    """The samples as the channel delivers them, of the same length."""
    speech = np.fft.rfft(samples, LONGEST) * channel.response
    white = generator.standard_normal((len(speech), 2), dtype=np.float32).view(np.complex64)[:, 0] / np.sqrt(2)
    level = np.sqrt(np.mean(np.abs(speech) ** 2) * LONGEST / len(samples))  # the background lasts for all of LONGEST
    return _scaled(np.fft.irfft(speech + level * channel.noise * white)[: len(samples)], channel.peak)


def _pairs(rows: list[Row], generator: Generator) -> list[str]:
    """Lines `label enrolment test` of a split: targets mostly across sessions, non-targets mostly of one sex."""
    targets: dict[str, tuple[list[str], list[str]]] = {}
    others: tuple[list[str], list[str]] = ([], [])
    for index, first in enumerate(rows):
        for second in rows[index + 1 :]:
            line = f"{first['path']} {second['path']}"
            if first["speaker"] == second["speaker"]:
                kinds = targets.setdefault(first["speaker"], ([], []))
                kinds[first["session"] == second["session"]].append(line)
            else:
                others[_sex(first["speaker"]) != _sex(second["speaker"])].append(line)
    same_sex = round(NON_TARGETS * SAME_SEX)
    chosen = [(1, kinds, TARGETS_PER_SPEAKER) for kinds in targets.values()]
    chosen.append((0, others, (same_sex, NON_TARGETS - same_sex)))
    return [
        f"{label} {line}"
        for label, kinds, counts in chosen
        for lines, count in zip(kinds, counts, strict=True)
        for line in generator.choice(lines, count, replace=False)
    ]


def _sex(speaker: str) -> str:
    return speaker.split("-")[1][0]


def _noises(generator: Generator) -> Iterator[Array]:
    """Twice each: hum, hiss, rumble, clicks, gusts and babble."""
    samples = round(NOISE_SECONDS * SAMPLE_RATE)
    time = np.arange(samples) / SAMPLE_RATE
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)

    def coloured(signal: Array, gain: Array) -> Array:
        return np.fft.irfft(np.fft.rfft(signal) * gain)

    for mains in (50, 60):  # Hz
        white = generator.standard_normal((4, samples))
        overtones = np.arange(1, 30)
        heights = generator.uniform(size=len(overtones)) / overtones
        phases = generator.uniform(0, 2 * np.pi, len(overtones))
        yield (np.sin(2 * np.pi * mains * np.outer(time, overtones) + phases) * heights).sum(axis=1)
        yield coloured(white[0], (1 + frequencies / 1000) ** -generator.uniform(0, 1))
        yield coloured(white[1], 1 / (1 + (frequencies / generator.uniform(80, 200)) ** 2))
        ticks = white[2] * (generator.uniform(size=samples) < generator.uniform(3, 12) / SAMPLE_RATE)
        ticks += 1e-4 * white[3]  # no crop is silent
        yield coloured(ticks, np.exp(-np.square((frequencies - generator.uniform(1000, 5000)) / 800)))
        gusts = np.arange(0, NOISE_SECONDS + 0.3, 0.3)  # seconds
        strength = np.interp(time, gusts, generator.exponential(size=len(gusts)))
        yield coloured(white[3], 1 / np.sqrt(1 + frequencies / 200)) * strength
        yield np.sum([_speak(_voice(sex, generator), NOISE_SECONDS, generator) for sex in "fmfmfm"], axis=0)


def _room(t60: float, direct_db: float, generator: Generator) -> Samples:
    """An impulse response that decays by 60 dB in `t60` seconds: the direct path first, then noise.

    Args:
        direct_db: energy of the direct path over that of the rest.
    """
    samples = round(t60 * SAMPLE_RATE)
    response = generator.standard_normal(samples) * 10 ** (-3 * np.arange(samples) / samples)
    response[0] = 10 ** (direct_db / 20) * np.sqrt(np.sum(response[1:] ** 2))
    return _scaled(response, 0.95)


def _write_clips(folder: Path, kind: str, clips: Iterable[Samples]) -> None:
    rows = []
    for number, clip in enumerate(clips, 1):
        path = f"{kind}/{kind}-{number:02d}.flac"
        _write_audio(folder / path, clip)
        rows.append({"path": path, "split": "train"})
    _write_table(folder / f"{kind}.csv", rows)


def _write_table(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="ascii", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _write_audio(path: Path, samples: Samples) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.round(samples * 32767).astype(np.int16), SAMPLE_RATE, subtype="PCM_16")


def _scaled(samples: Array, peak: float) -> Samples:
    return (samples * (peak / np.abs(samples).max())).astype(np.float32)
