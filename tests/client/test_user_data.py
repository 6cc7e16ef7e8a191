"""Records, the split and the encoder, on tokenizers of the Llama, Qwen2 and Gemma kinds trained here."""

import importlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.user_data import HELD_OUT, Encoder, Record, Split, User, split
from common.errors import DataError

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories3M"

TEXT = [
    "the quick brown fox jumps over the lazy dog and says hello to all of you",
    "How are you today? I am fine, thank you. What shall we do?",
    "user assistant system model\nHello there, [INST] this is a test [/INST]",
    "Überall läuft ein Bär durch den Wald 你好 🙂",
] * 5

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today Date: {{ date_string }}\n{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|start|>", "<|end|>", "<|eot|>"]

KINDS = [
    "llama",
    "llama-2-chat",
    "llama-3-chat",
    "qwen2",
    "qwen2-chat",
    "qwen2-thinking",
    "gemma",
    "gemma-chat",
    "bare",
]
CLASSES = ["LlamaTokenizer", "Qwen2Tokenizer", "GemmaTokenizer"]
"""The real classes of transformers, with a vocabulary trained here."""


def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentence_piece(prepend):
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, **{"unk_token": "<unk>"}))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if prepend else steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prepend else [])
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [start + word for text in TEXT for word in text.split() for start in ("", " ")]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    # bytes are ordinary tokens, not special ones, else decoding would drop them
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def wrapped(backend, template=None, **tokens):
    """A transformers tokenizer with the special tokens `tokens`, named as bos, eos, pad, unk."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in tokens.items()}
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def tokenizer_of(kind):
    from tokenizers import processors

    if kind in CLASSES:
        trained = byte_level() if kind.startswith("Qwen") else sentence_piece(prepend=kind.startswith("Llama"))
        model = json.loads(trained.to_str())["model"]
        parts = {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
        names = {"bos_token": "<s>", "eos_token": "</s>"} if kind.startswith("Gemma") else {}
        return getattr(importlib.import_module("transformers"), kind)(**parts, **names)
    if kind == "bare":
        return wrapped(byte_level())
    if kind.startswith("qwen2"):
        template = {"qwen2-chat": CHATML, "qwen2-thinking": THINKING}.get(kind)
        return wrapped(byte_level(), template, eos="<|im_end|>", pad="<pad>")
    backend = byte_level() if kind.startswith("llama-3") else sentence_piece(prepend=kind.startswith("llama"))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if kind.startswith("gemma"):
        return wrapped(
            backend, GEMMA if kind == "gemma-chat" else None, bos="<s>", eos="</s>", unk="<unk>", pad="<pad>"
        )
    template = {"llama-2-chat": LLAMA_2, "llama-3-chat": LLAMA_3}.get(kind)
    return wrapped(backend, template, bos="<s>", eos="</s>", unk="<unk>")


def texts_of(tokenizer, encoded):
    """What the model reads and what it learns, special tokens included."""
    ids = encoded.ids.tolist()
    return tokenizer.decode(ids[: encoded.first_label]), tokenizer.decode(ids[encoded.first_label :])


def user_of(*records):
    return User("somebody", tuple(records))


def texts(count, times=None):
    return [Record("", f"text {index}", None if times is None else times[index]) for index in range(count)]


# ---- records and the split


def test_no_text_and_no_id_is_in_a_repr():
    user = User("alice", (Record("secret", "secret", 1.0, rejected="secret"),), ("secret",))
    for value in (user, user.records[0], split(user), Encoder(tokenizer_of("llama"), 16).encode(user.records[0])):
        assert "secret" not in repr(value)
        assert "alice" not in repr(value)


def test_importing_it_imports_neither_torch_nor_transformers():
    code = (
        "import sys, client.user_data; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'flwr')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ten_records_are_split_six_two_two_in_order():
    records = texts(10)
    parts = split(user_of(*records))
    assert parts == Split(tuple(records[:6]), tuple(records[6:8]), tuple(records[8:]))


def test_records_are_split_by_time_where_every_one_has_a_time():
    records = texts(5, times=[5.0, 1.0, 4.0, 2.0, 3.0])
    parts = split(user_of(*records))
    assert [record.time for record in (*parts.train, *parts.validation, *parts.test)] == [1, 2, 3, 4, 5]


def test_records_are_split_by_order_where_one_lacks_a_time():
    records = [*texts(4, times=[5.0, 1.0, 4.0, 2.0]), Record("", "no time")]
    parts = split(user_of(*records))
    assert (*parts.train, *parts.validation, *parts.test) == tuple(records)


def test_a_user_with_two_records_has_no_parts_and_a_reason():
    parts = split(user_of(*texts(2)))
    assert (parts.train, parts.validation, parts.test) == ((), (), ())
    assert parts.reason == "2 usable records, too few for three parts"


def test_three_records_are_one_each():
    parts = split(user_of(*texts(3)))
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (1, 1, 1)


def test_empty_records_are_in_no_part_and_counted():
    empty = [Record("why?", " \n"), Record("q", "a", rejected="")]
    parts = split(user_of(*texts(3), *empty))
    assert parts.dropped == 2
    assert all(not record.empty for record in (*parts.train, *parts.validation, *parts.test))


def test_records_that_the_data_set_holds_out_are_the_test_part():
    query = Record("q", "a", 0.0, kind=HELD_OUT)
    parts = split(user_of(query, *texts(10, times=list(range(10)))))
    assert parts.test == (query,)
    assert (len(parts.train), len(parts.validation)) == (8, 2)


@pytest.mark.parametrize("shares", [(0.0, 0.2), (0.2, 0.0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.2)])
def test_shares_that_leave_no_part_are_refused(shares):
    with pytest.raises(ValueError, match="shares"):
        split(user_of(*texts(9)), *shares)


@given(
    st.lists(st.tuples(st.sampled_from([None, 1.0, 2.0, 3.0]), st.booleans(), st.booleans()), max_size=40),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
)
def test_every_usable_record_is_in_one_part_and_order_is_kept(drawn, validation, test):
    records = [
        Record("", f"{index}" if full else "", time, kind=HELD_OUT if held else None)
        for index, (time, held, full) in enumerate(drawn)
    ]
    parts = split(user_of(*records), validation, test)
    usable = [record for record in records if record.response]
    assert parts.dropped == len(records) - len(usable)
    if parts.reason is not None:
        assert (parts.train, parts.validation, parts.test) == ((), (), ())
        return
    together = [*parts.train, *parts.validation, *parts.test]
    assert sorted(record.response for record in together) == sorted(record.response for record in usable)
    assert parts.train
    assert parts.validation
    assert parts.test
    if all(record.time is not None for record in usable):
        usable.sort(key=lambda record: record.time)
    for part in (parts.train, parts.validation, parts.test):
        assert list(part) == [record for record in usable if record in part]
    if not any(record.kind for record in usable):
        assert together == usable


# ---- the encoder: formats


def test_plain_text_has_a_label_at_every_token_after_the_first():
    tokenizer = tokenizer_of("llama")
    encoded = Encoder(tokenizer, 64).encode(Record("", "the lazy dog"))
    assert encoded.ids.tolist() == tokenizer("the lazy dog")["input_ids"]
    assert encoded.ids.dtype == np.int32
    assert encoded.labels.tolist() == [False] + [True] * (len(encoded.ids) - 1)


def test_plain_text_without_bos_still_has_nothing_to_predict_its_first_token_from():
    tokenizer = tokenizer_of("qwen2")
    encoded = Encoder(tokenizer, 64).encode(Record("", "the lazy dog"))
    assert encoded.ids.tolist() == tokenizer("the lazy dog")["input_ids"]
    assert encoded.first_label == 1


def test_a_tokenizer_that_ends_texts_itself_ends_them_here_and_only_once():
    from tokenizers import processors

    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = wrapped(backend, bos="<s>", eos="</s>")
    encoder = Encoder(tokenizer, 64)
    assert encoder.encode(Record("", "dog")).ids.tolist() == tokenizer("dog")["input_ids"]
    assert encoder.encode(Record("fox", "dog")).ids.tolist().count(2) == 1
    assert 2 not in encoder.encode_prompt("fox").tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", *CLASSES])
def test_without_a_template_prompt_and_response_stand_on_two_lines(kind):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, 64)
    assert not encoder.uses_chat_template
    read, learned = texts_of(tokenizer, encoder.encode(Record("How are you?", "fine, thank you")))
    assert read.removeprefix("<s>").strip(" ") == "How are you?\n"
    assert learned.strip() == "fine, thank you" + tokenizer.eos_token


@pytest.mark.parametrize(
    ("kind", "read", "learned"),
    [
        ("qwen2-chat", "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", "fine <|im_end|>"),
        (
            "qwen2-thinking",
            "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nfine <|im_end|>",
        ),
        ("gemma-chat", "<s><start_of_turn>user\nHow?<end_of_turn>\n<start_of_turn>model\n", "fine<end_of_turn>"),
        (
            "llama-3-chat",
            "26 Jul 2024\n<|start|>user<|end|>\n\nHow?<|eot|><|start|>assistant<|end|>\n\n",
            "fine<|eot|>",
        ),
        ("llama-2-chat", "[INST] How? [/INST]", "fine </s>"),
    ],
)
def test_a_chat_template_frames_the_prompt_and_its_end_token_is_learned(kind, read, learned):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, 256)
    assert encoder.uses_chat_template
    found_read, found_learned = texts_of(tokenizer, encoder.encode(Record("How?", "fine ")))
    assert found_read.endswith(read)
    assert found_learned.strip() == learned


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.endswith("chat")])
@pytest.mark.parametrize(
    "turns", [("How are you?", "fine, thank you"), ("  the dog ", " and 你好 🙂 "), ("a\nb", "c\n\nd")]
)
def test_the_tokens_are_those_of_the_whole_conversation_rendered_by_the_tokenizer(kind, turns):
    tokenizer = tokenizer_of(kind)
    said, answered = turns
    encoded = Encoder(tokenizer, 512).encode(Record(said, answered))
    conversation = [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    options = {"date_string": "26 Jul 2024", "return_dict": False}
    whole = tokenizer.apply_chat_template(conversation, **options)
    assert tokenizer.decode(encoded.ids) == tokenizer.decode(whole).rstrip("\n")
    asked = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, **options)
    assert encoded.ids[: encoded.first_label].tolist() == asked
    assert Encoder(tokenizer, 512).encode_prompt(said).tolist() == asked


def test_a_template_without_an_end_token_gets_the_tokenizers():
    tokenizer = tokenizer_of("llama")
    tokenizer = wrapped(tokenizer.backend_tokenizer, NO_END, bos="<s>", eos="</s>", unk="<unk>")
    encoded = Encoder(tokenizer, 64).encode(Record("How?", "fine"))
    assert encoded.ids[-1] == tokenizer.eos_token_id
    read, learned = texts_of(tokenizer, encoded)
    assert read.endswith("How?\nassistant:")
    assert learned.strip() == "fine</s>"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "{% for m in messages %}{{ m['role'] }}"],
)
def test_a_template_that_cannot_hold_a_conversation_is_refused(template):
    tokenizer = wrapped(byte_level(), template, eos="</s>")
    with pytest.raises(DataError, match="chat template"):
        Encoder(tokenizer, 64)


def test_a_token_that_would_span_prompt_and_response_is_not_made():
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 0, "\n": 1, "b": 2, "\nb": 3, "</s>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("\n", "b")]))
    tokenizer = wrapped(backend, eos="</s>")
    assert tokenizer("a\nb")["input_ids"] == [0, 3]
    encoder = Encoder(tokenizer, 16)
    encoded = encoder.encode(Record("a", "bb"))
    assert encoded.ids.tolist() == [0, 1, 2, 2, 4]
    assert encoded.first_label == 2
    assert encoder.encode_prompt("a").tolist() == [0, 1]


# ---- the encoder: padding, pairs, dropping, truncation


def test_the_pad_id_falls_back_to_the_end_token_and_then_to_zero():
    assert Encoder(tokenizer_of("gemma"), 16).pad_id == SPECIAL.index("<pad>")
    assert Encoder(tokenizer_of("llama"), 16).pad_id == SPECIAL.index("</s>")
    assert Encoder(tokenizer_of("bare"), 16).pad_id == 0


def test_a_tokenizer_without_special_tokens_encodes_too():
    tokenizer = tokenizer_of("bare")
    encoded = Encoder(tokenizer, 64).encode(Record("How are you?", "fine"))
    assert texts_of(tokenizer, encoded) == ("How are you?\n", "fine")


def test_empty_responses_are_dropped_and_the_rest_stay_in_place():
    records = [
        Record("", "one dog"),
        Record("q", ""),
        Record("q", " \t"),
        Record("q", "two"),
        Record("q", "a", rejected=" "),
    ]
    encoded = Encoder(tokenizer_of("llama"), 64).encode_batch(records)
    assert [one is None for one in encoded] == [False, True, True, False, True]


def test_a_text_of_one_token_that_nothing_predicts_is_dropped():
    tokenizer = tokenizer_of("qwen2")
    assert len(tokenizer("a")["input_ids"]) == 1
    assert Encoder(tokenizer, 16).encode(Record("", "a")) is None


@pytest.mark.parametrize("room", [24, 512])
def test_both_answers_of_a_pair_follow_the_same_prompt_tokens(room):
    tokenizer = tokenizer_of("gemma-chat")
    pair = Record(
        "the quick brown fox jumps over the lazy dog " * 3, "hello", rejected="I am fine, thank you all of you"
    )
    encoded = Encoder(tokenizer, room).encode(pair)
    other = encoded.rejected
    assert other is not None
    assert encoded.first_label == other.first_label
    assert encoded.ids[: encoded.first_label].tolist() == other.ids[: other.first_label].tolist()
    assert "hello" in texts_of(tokenizer, encoded)[1]
    assert "fine" in texts_of(tokenizer, other)[1]


def test_a_long_prompt_is_cut_from_the_left_behind_what_opens_it():
    tokenizer = tokenizer_of("qwen2-chat")
    record = Record("first " * 100 + "last", "hello")
    encoded = Encoder(tokenizer, 80).encode(record)
    read, learned = texts_of(tokenizer, encoded)
    assert (len(encoded.ids), encoded.truncated, encoded.response_cut) == (80, True, False)
    assert read.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n")
    assert read.endswith("last<|im_end|>\n<|im_start|>assistant\n")
    assert learned == "hello<|im_end|>"
    assert encoded.uncut_tokens == len(Encoder(tokenizer, 9999).encode(record).ids)


def test_a_response_that_fills_the_limit_alone_is_cut_at_its_end():
    tokenizer = tokenizer_of("llama")
    encoded = Encoder(tokenizer, 10).encode(Record("How are you?", "the quick brown fox " * 20))
    assert (len(encoded.ids), encoded.truncated, encoded.response_cut) == (10, True, True)
    read, learned = texts_of(tokenizer, encoded)
    assert read == "<s>"
    assert learned.strip().startswith("the quick")
    assert tokenizer.eos_token_id not in encoded.ids


def test_halves_of_surrogate_pairs_are_encoded_as_something():
    assert Encoder(tokenizer_of("llama"), 32).encode(Record("a \ud83d", "b \ude42 c")) is not None


def test_a_limit_below_two_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        Encoder(tokenizer_of("llama"), 1)


def test_a_batch_is_its_records_one_by_one_over_batch_borders(monkeypatch):
    monkeypatch.setattr("client.user_data.BATCH", 3)
    records = [
        Record("" if i % 3 else "why?", "dog " * (i % 4), rejected="fox" if i % 5 == 0 else None) for i in range(11)
    ]
    encoder = Encoder(tokenizer_of("gemma-chat"), 24)
    for together, record in zip(encoder.encode_batch(iter(records)), records, strict=True):
        alone = encoder.encode(record)
        if alone is None:
            assert together is None
        else:
            assert together.ids.tolist() == alone.ids.tolist()
            assert together.first_label == alone.first_label


def test_a_tokenizer_left_with_truncation_on_does_not_truncate_here():
    tokenizer = wrapped(byte_level(), eos="</s>", pad="<pad>")
    encoder = Encoder(tokenizer, 64)
    expected = encoder.encode(Record("", "the quick brown fox")).ids.tolist()
    tokenizer(["the quick brown fox"], truncation=True, max_length=2, padding="max_length")
    assert encoder.encode(Record("", "the quick brown fox")).ids.tolist() == expected


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(KINDS + CLASSES),
    prompt=st.text(max_size=60),
    response=st.text(max_size=60),
    rejected=st.none() | st.text(max_size=30),
    max_tokens=st.integers(2, 90),
)
def test_labels_never_cover_the_prompt_and_no_record_is_too_long(kind, prompt, response, rejected, max_tokens):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, max_tokens)
    record = Record(prompt, response, rejected=rejected)
    encoded = encoder.encode(record)
    if record.empty:
        assert encoded is None
        return
    uncut = Encoder(tokenizer, 10_000)
    whole = uncut.encode(record)
    if encoded is None:
        assert whole is None or len(whole.ids) == 1
        return
    assert whole is not None
    for own, full in [(encoded, whole)] + ([(encoded.rejected, whole.rejected)] if rejected is not None else []):
        assert 2 <= len(own.ids) <= max_tokens
        assert 1 <= own.first_label < len(own.ids)
        assert own.truncated == (len(own.ids) < len(full.ids))
        assert own.uncut_tokens == len(full.ids)
        if not prompt:
            assert own.ids.tolist() == full.ids[: len(own.ids)].tolist()
            continue
        # what is read is tokens of the prompt as the model gets it at use, what is learned begins the full response
        answer = full.ids[full.first_label :].tolist()
        learned = own.ids[own.first_label :].tolist()
        assert full.ids[: full.first_label].tolist() == uncut.encode_prompt(prompt).tolist()
        assert learned == answer[: len(learned)]
        assert own.response_cut == (len(learned) < len(answer))
        assert len(learned) == len(answer) or len(own.ids) == max_tokens
        read = own.ids[: own.first_label].tolist()
        asked = full.ids[: full.first_label].tolist()
        kept = next(n for n in range(len(read), -1, -1) if read[:n] == asked[:n])
        assert read[kept:] == asked[len(asked) - (len(read) - kept) :]
        if len(own.ids) < max_tokens and rejected is None:
            assert read == asked


# ---- the real model's tokenizer


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not here")
def test_on_a_real_tokenizer_labels_are_the_response_and_its_end():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(STORIES)
    encoder = Encoder(tokenizer, 64)
    lines = (SHARED / "data" / "synthetic_personachat.jsonl").read_text().splitlines()[:3]
    records = [Record(**example) for line in lines for example in json.loads(line)["examples"]]
    for record, encoded in zip(records, encoder.encode_batch(records), strict=True):
        read, learned = texts_of(tokenizer, encoded)
        if not encoded.truncated:
            assert read == f"<s> {record.prompt}\n"
        if not encoded.response_cut:
            assert learned == f"{record.response}</s>"


def test_a_record_holds_no_half_of_a_character():
    record = Record("a \ud83d", "b \ude42 c", rejected="\ud800")
    assert (record.prompt, record.response, record.rejected) == ("a \ufffd", "b \ufffd c", "\ufffd")
    assert Record("whole \U0001f642 é", "x").prompt == "whole \U0001f642 é"
