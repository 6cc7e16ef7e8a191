"""Generation: what a naive loop would write, piece by piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.generation import Sampling, _Writer, generate
from common.model_files import base_folder

TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tiny_base_folder):
    return load_base(tiny_base_folder, TARGETS)


@pytest.fixture(scope="module")
def built_in():
    return load_base(base_folder("built-in"), TARGETS)


def said(pieces):
    pieces = list(pieces)
    return "".join(piece.text for piece in pieces), pieces[-1]


def naive(base, ids, count):
    """Read everything again for every token."""
    ids = [int(one) for one in ids]
    made = []
    with torch.no_grad():
        while len(made) < count:
            token = int(base.model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
            if token == base.tokenizer.eos_token_id:
                break
            made.append(token)
    return made


def test_it_writes_what_a_loop_without_a_cache_would(base):
    prompt = np.array([1, 5, 9, 17], np.int32)
    text, last = said(generate(base, prompt, Sampling(max_tokens=12)))
    made = naive(base, prompt, 12)
    assert text == base.tokenizer.decode(made, skip_special_tokens=True)
    assert last.tokens == len(made)
    assert last.finish == ("length" if len(made) == 12 else "stop")


def test_only_the_last_piece_says_why_it_ended(base):
    pieces = list(generate(base, np.array([1, 5], np.int32), Sampling(max_tokens=5)))
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish is not None


def test_a_seed_repeats_a_draw_and_another_gives_another(base):
    prompt = np.array([1, 5, 9], np.int32)

    def drawn(seed):
        return said(generate(base, prompt, Sampling(max_tokens=20, temperature=1.5, seed=seed)))[0]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 1


def test_a_small_top_p_is_the_likeliest_token(base):
    prompt = np.array([1, 5, 9], np.int32)
    greedy = said(generate(base, prompt, Sampling(max_tokens=9)))[0]
    assert said(generate(base, prompt, Sampling(max_tokens=9, temperature=1.0, top_p=1e-6, seed=3)))[0] == greedy
    assert said(generate(base, prompt, Sampling(max_tokens=9, temperature=1.0, top_p=0.0, seed=3)))[0] == greedy


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(base):
    prompt = np.array([1, 5, 9, 17], np.int32)
    whole, _ = said(generate(base, prompt, Sampling(max_tokens=12)))
    stop = whole.split()[4]
    text, last = said(generate(base, prompt, Sampling(max_tokens=12, stop=(stop,))))
    assert text == whole[: whole.index(stop)]
    assert last.finish == "stop"


def test_it_ends_where_the_base_can_read_no_more(base):
    prompt = np.full(60, 5, np.int32)
    _, last = said(generate(base, prompt, Sampling(max_tokens=500, temperature=9.0, seed=1)))
    assert last.tokens <= 64 - 60 + 1


def test_who_hangs_up_gets_no_more(base):
    asked = iter([False, True, True])
    _, last = said(generate(base, np.array([1, 5], np.int32), Sampling(max_tokens=50), cancelled=lambda: next(asked)))
    assert last.tokens <= 2


def test_characters_of_several_tokens_come_whole(built_in):
    text = "naïve 🙂 café"
    tokens = built_in.tokenizer(text, add_special_tokens=False)["input_ids"]
    writer = _Writer(built_in.tokenizer, ())
    pieces = [writer.add(token) for token in tokens] + [writer.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", ["STOP", "P!", "OP"])
def test_a_stop_text_is_found_across_pieces(built_in, stop):
    text = "first STO then STOP! and more"
    tokens = built_in.tokenizer(text, add_special_tokens=False)["input_ids"]
    writer, found = _Writer(built_in.tokenizer, (stop,)), ""
    for token in tokens:
        found += writer.add(token)
        if writer.stopped:
            break
    assert writer.stopped
    assert found == text[: text.index(stop)]
