"""`generate` from the command line: a file, or one line that says what to do. Other commands are tested with what they run."""

import pytest

from resonate_lib import __main__ as cli
from resonate_lib import audio


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "the prompt is empty"),
        (["a lion roars"], "names no sound that the shipped model knows: use some of beep, bird"),
        (["a dog barks " * 40], "tokens"),
        (["a dog barks", "--out", "dog.ogg"], ".ogg is not an audio format; use .wav, .flac or .mp3"),
        (["a dog barks", "--out", "dog"], "no suffix is not an audio format"),
        (["a dog barks", "--steps", "0"], "use 1 or more steps"),
        (["a dog barks", "--guidance", "21"], "guidance from 0 to 20"),
        (["a dog barks", "--weights", "nowhere"], "nowhere"),
    ],
)
def test_a_bad_request_is_one_line_and_no_file(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_file_and_strange_words_are_named(tmp_path, capsys):
    for name, seed in (("a.wav", "1"), ("b.wav", "1"), ("c.wav", "2")):
        prompt = "a dog barks while a lion roars"
        assert cli.main(["generate", prompt, "--out", str(tmp_path / name), "--seed", seed, "--steps", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / name) for name in ("a.wav", "b.wav", "c.wav")]
    assert err.count("note: Outside the model's vocabulary: lion, roars; of this prompt it knows dog") == 3
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.wav", "b.wav", "c.wav"))
    assert first == again != other
    sound, rate = audio.read(tmp_path / "a.wav")
    assert rate == 16000 and abs(sound.shape[-1] - 4 * rate) < 0.1 * rate and sound.abs().max() <= 1


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["generate", "a dog barks", "--out", str(tmp_path / "file" / "dog.wav"), "--steps", "1"]) == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "file") in err and err.count("\n") == 1
