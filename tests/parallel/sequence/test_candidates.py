"""Candidates and cuts of tokens: functions of shapes."""

from __future__ import annotations

import torch

from shardit.parallel.sequence.shards.token_dims import MAX_CANDIDATES, Candidate, Split, candidates, cut


def test_candidates_of_a_joint_block() -> None:
    """Flux: text and image come back, the rotary tables cover both."""
    found = candidates([(1, 80, 64), (1, 48, 64), (1, 64), (128, 16)], [(1, 48, 64), (1, 80, 64)])
    assert found[0].streams == (1, 0)
    assert found[0].splits == (Split(1, (1,)), Split(1, (0,)), None, Split(0, (0, 1)))
    assert Split(0, (1, 0)) in [candidate.splits[3] for candidate in found]


def test_candidates_of_cross_attention() -> None:
    """Wan: text does not come back, so it stays whole, unless nothing else is right."""
    found = candidates([(1, 72, 64), (1, 32, 64), (1, 72, 6, 64), (1, 72, 1, 16)], [(1, 72, 64)])
    assert found[0].splits == (Split(1, (0,)), None, Split(1, (0,)), Split(1, (0,)))
    assert candidates([(1, 8), (3, 4)], [(7, 7)]) == []


def test_a_width_that_coincides_is_guessed_last() -> None:
    """LTX-2: 32 tokens of video and a width of 32. The right way is among those that are tried, though six arguments
    can be cut in several ways."""
    video, audio = (1, 32, 32), (1, 3, 16)
    shapes = [video, audio, (1, 5, 32), (1, 5, 16), (1, 1, 192), (1, 1, 32), (1, 1, 16), video, video, audio, audio]
    shapes += [(1, 32, 16), (1, 32, 16), audio, audio, (1, 1, 5), (1, 1, 5)]
    of_video, of_audio = Split(1, (0,)), Split(1, (1,))
    right = [of_video, of_audio, *[None] * 5, of_video, of_video, of_audio, of_audio, of_video, of_video]
    found = candidates(shapes, [video, audio])
    assert Candidate((0, 1), (*right, of_audio, of_audio, None, None)) in found
    assert len(found) <= MAX_CANDIDATES


def test_text_of_another_width_is_cut_where_nothing_else_is_right() -> None:
    """Text that is not returned, whose keys a mask covers together with those of the image."""
    found = candidates([(1, 16, 32), (1, 5, 24), (1, 21)], [(1, 16, 32)])
    assert found[0].streams == (0,)
    assert Candidate((0, 1), (Split(1, (0,)), Split(1, (1,)), Split(1, (0, 1)))) in found
    assert {candidate.streams for candidate in found} == {(0,), (0, 1)}


def test_pattern_tells_sizes_that_coincide() -> None:
    (found, *_) = candidates([(1, 72, 64), (1, 32, 64)], [(1, 72, 64)])
    assert found.fits([(1, 90, 64), (1, 90, 64)])
    assert found.pattern([(1, 90, 64), (1, 32, 64)]) == found.pattern([(1, 72, 64), (1, 31, 64)])
    assert found.pattern([(1, 90, 64), (1, 90, 64)]) != found.pattern([(1, 72, 64), (1, 32, 64)])


def test_cut_keeps_every_token_once() -> None:
    table = torch.arange(12.0).view(1, 12, 1)
    shards = [cut(table, Split(1, (0, 1)), (5, 7), rank, 3).flatten().tolist() for rank in range(3)]
    assert shards == [[0, 1, 5, 6, 7], [2, 3, 8, 9], [4, 10, 11]]
    square = torch.arange(12).view(1, 1, 12) + 100 * torch.arange(12).view(1, 12, 1)
    rows = cut(square, Split(1, (0, 1), 2), (5, 7), 1, 3)
    assert rows[0, :, 0].tolist() == [200, 300, 800, 900]
    assert rows[0, 0].tolist() == [200 + n for shard in shards for n in shard]
