"""Tokenizer, chat template and streaming text."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from edgelora.chat_template import ChatTemplate
from edgelora.errors import EdgeLoraError
from edgelora.text import StopStrings, Text

SPECIAL = ("<s>", "</s>")
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SAMPLE = "Größe: 3 €, 日本語, 👩‍👩‍👧 and naïve\n\ttabs  spaces."


def byte_level() -> Tokenizer:
    """One token for each byte, as GPT-2 writes them: every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As SentencePiece models do: "▁" for a space, unknown characters as byte tokens."""
    tokens = [*SPECIAL, *BYTES, "▁", *"abcdefghijklmnopqrstuvwxyz", ":", ",", ".", "▁a"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


@pytest.fixture(params=[byte_level, byte_fallback])
def text(request, tmp_path):
    return make_text(tmp_path, request.param())


def make_text(folder, tokenizer, template=None, **config):
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Text(folder)


def stream_all(text, tokens, prompt=(), stop=()):
    stream = text.stream(prompt, stop=stop)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()]


# ---- streaming ----


def test_streamed_pieces_join_to_the_whole_text(text):
    tokens = text.encode(SAMPLE)
    assert "".join(stream_all(text, tokens)) == text.decode(tokens) == SAMPLE


def test_no_piece_holds_half_a_character(text):
    pieces = stream_all(text, text.encode(SAMPLE))
    assert not any("\ufffd" in piece for piece in pieces)
    assert all(len(piece) <= 1 for piece in pieces)


def test_half_a_character_at_the_end_is_dropped(text):
    tokens = text.encode("ab€")[:-1]
    assert "".join(stream_all(text, tokens)) == "ab"


def test_invalid_bytes_do_not_stop_the_stream(text):
    tokens = [*text.encode("€")[-2:], *text.encode("ok")]
    assert "".join(stream_all(text, tokens)).endswith("ok")


def test_special_tokens_are_not_text(text):
    tokens = [0, *text.encode("ab"), 1]
    assert "".join(stream_all(text, tokens)) == "ab"


def test_space_after_the_prompt_is_kept(text):
    whole = text.encode("abc def")
    prompt = text.encode("abc")
    assert "".join(stream_all(text, whole[len(prompt) :], prompt)) == " def"


# ---- stop strings ----


@pytest.mark.parametrize("stop", ["END", "E", "one END"])
def test_text_ends_before_the_stop_string(text, stop):
    tokens = text.encode("one END two".lower())
    pieces = stream_all(text, tokens, stop=[stop.lower()])
    assert "".join(pieces) == "one end two"[: "one end two".index(stop.lower())]


def test_nothing_that_may_begin_a_stop_string_is_yielded_early():
    stop = StopStrings(["###", "</s>"])
    assert [stop.push(piece) for piece in ("a#", "#", "b", "<", "/s", "x#")] == [
        *("a", "", "##b", "", "", "</sx"),
    ]
    assert stop.finish() == "#"
    assert not stop.stopped


def test_stop_string_across_pieces_is_found_and_ends_everything():
    stop = StopStrings(["<end>"])
    assert [stop.push(piece) for piece in ("so <e", "n", "d> more", "x")] == ["so ", "", "", ""]
    assert stop.stopped
    assert stop.finish() == ""


def test_earliest_of_several_stop_strings_counts():
    stop = StopStrings(["world", "o w"])
    assert stop.push("hello world") == "hell"


def test_overlapping_beginnings_are_not_missed():
    stop = StopStrings(["aab"])
    assert "".join(map(stop.push, "aaab")) == "a"
    assert stop.stopped


def test_empty_stop_string_is_refused(text):
    with pytest.raises(EdgeLoraError, match="empty string"):
        text.stream(stop=[""])


# ---- chat templates ----

MESSAGES = [{"role": "user", "content": "Hi <b>"}]


def render(source, messages=MESSAGES, tmp_path=None):
    return ChatTemplate(source, {"bos_token": "<s>"}, path=tmp_path).render(messages)


def test_template_gets_what_transformers_gives():
    assert render("{{ bos_token }}{{ messages[0].content }}{{ add_generation_prompt }}") == (
        "<s>Hi <b>True"
    )
    assert render("{{ tools is none and documents is none }}") == "True"
    assert render("{{ strftime_now('%Y') | length }}") == "4"


def test_tojson_escapes_no_html_and_keeps_unicode():
    assert render("{{ messages[0] | tojson }}", [{"a": "<é>"}]) == '{"a": "<é>"}'
    assert render("{{ messages[0] | tojson(indent=1) }}", [{"a": 1}]) == '{\n "a": 1\n}'


def test_blocks_are_trimmed_and_loop_controls_work():
    source = (
        "  {% for m in [1, 2, 3] %}\n"
        "{% if m == 2 %}{% continue %}{% endif %}\n"
        "{{ m }}\n"
        "  {% endfor %}\n"
    )
    assert render(source) == "1\n3\n"


def test_generation_blocks_are_rendered():
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"


def test_message_of_raise_exception_is_told():
    with pytest.raises(EdgeLoraError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages[0].content() }}",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_template_cannot_leave_the_sandbox(source):
    with pytest.raises(EdgeLoraError, match="refuses these messages"):
        render(source)


def test_invalid_template_is_refused_with_its_file(tmp_path):
    with pytest.raises(EdgeLoraError, match=r"chat_template.jinja: not a valid chat template"):
        make_text(tmp_path, byte_level(), "{% for %}")


def test_template_is_found_in_the_tokenizer_config_too(tmp_path):
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": "ab"}]
    for value in ("ab", several):
        text = make_text(tmp_path, byte_level(), chat_template=value)
        assert text.decode(text.chat(MESSAGES)) == "ab"


def test_chat_without_template_is_refused(text):
    assert not text.has_chat_template
    with pytest.raises(EdgeLoraError, match="no chat template"):
        text.chat(MESSAGES)


# ---- files ----


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_damaged_file_is_refused_by_name(tmp_path, name, content):
    make_text(tmp_path, byte_level())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EdgeLoraError, match=name):
        Text(tmp_path)
