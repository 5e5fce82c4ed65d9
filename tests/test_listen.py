"""Players, the page and the blind test: what is embedded, what is escaped, what is written, and the rate it gives."""

import base64
import html
import html.parser
import io
import json
import re

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from resonate_lib import listen

RATE = 16000
EVIL = "<script>alert('x')</script> & \"rain\" %%DATA%% </section>"


def tone(amplitude, frequency=440.0):
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(RATE) / RATE)


@pytest.fixture
def items():
    return [
        {
            "id": "p0",
            "prompt": EVIL,
            "clips": {"base": tone(0.05), "DPO": tone(0.1), "GRPO": tone(0.2)},
            "note": "<b>seed 3",
        },
        {"id": "p1", "prompt": "a dog barks", "clips": {"base": tone(0.1), "GRPO": torch.zeros(RATE)}},
    ]


class Elements(html.parser.HTMLParser):
    """Start tags with their attributes, and whether every opened element is closed in order."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text, self.scripts = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def sound_of(player):
    kind, data = player["src"].split(",", 1)
    assert kind == "data:audio/mpeg;base64"
    return soundfile.read(io.BytesIO(base64.b64decode(data)))


def level(samples):
    return float(np.sqrt(np.mean(samples[3000:13000] ** 2)))


def test_side_by_side_keeps_differences_in_loudness_and_escapes_the_prompt(items):
    page = Elements(listen.side_by_side(EVIL, items[0]["clips"], RATE).data)
    players = page.of("audio")
    assert len(players) == 3 and not page.of("script") and all("controls" in p for p in players)
    levels = [level(sound_of(p)[0]) for p in players]
    assert levels[1] / levels[0] == pytest.approx(2, rel=0.05) and levels[2] / levels[0] == pytest.approx(4, rel=0.05)
    assert page.text.count("jupyter trust") == 3 and "listen.html" in page.text and "gain +13.0 dB" in page.text
    matched = Elements(listen.side_by_side("x", items[0]["clips"], RATE, match_loudness=True).data)
    assert np.ptp([level(sound_of(p)[0]) for p in matched.of("audio")]) < 0.01 and "Loudness matched" in matched.text


def test_pictures_share_one_scale(items):
    pictures = Elements(listen.side_by_side("x", items[0]["clips"], RATE).data).of("img")
    brightest = []
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture["src"].split(",")[1])))
        brightest.append(np.asarray(image).max())
        assert picture["alt"].startswith("Spectrogram of")
    # 31 shades over 80 dB: 12 dB less is 4.7 shades darker
    assert brightest[2] == 31 and brightest[2] - brightest[0] in (4, 5)


def test_the_page_needs_nothing_else(items, tmp_path):
    path = listen.listen_page(tmp_path / "run" / "listen.html", items, "Base & <tuned>", sample_rate=RATE, note=EVIL)
    text = path.read_text(encoding="utf-8")
    page = Elements(text)
    sources = [v for _, attributes in page.found for k, v in attributes.items() if k in ("src", "href") and v]
    assert sources and all(s.startswith(("data:", "#")) for s in sources)
    assert not re.search(r"https?://|@import|url\(", text) and not page.of("link")
    assert len(page.of("script")) == 2 and "%%TITLE%%" not in text and "Base & <tuned>" in page.text
    players = [p for p in page.of("audio") if "src" in p]
    assert [p["id"] for p in players] == ["clip-0-0", "clip-0-1", "clip-0-2", "clip-1-0", "clip-1-1"]
    assert [float(p["data-match"]) for p in players[:3]] == pytest.approx([1, 0.5, 0.25], rel=1e-3)
    assert len(sound_of(players[0])[0]) >= RATE and all(p["aria-label"] for p in page.of("audio"))
    again = listen.listen_page(tmp_path / "b.html", items, "Base & <tuned>", sample_rate=RATE, note=EVIL)
    assert again.read_text(encoding="utf-8") == text


def test_the_page_carries_the_trials(items, tmp_path):
    text = listen.listen_page(tmp_path / "a.html", items, "t", sample_rate=RATE, seed=3).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["trials"] == listen.make_trials(items, 3) and data["items"][1] == ["base", "GRPO"]
    assert data["trials"][[t["item"] for t in data["trials"]].index(0)]["prompt"] == EVIL
    assert data["question"] == "preference" and listen.QUESTIONS["preference"] in text


def test_the_page_asks_the_question_it_is_given(items, tmp_path, monkeypatch):
    path = listen.listen_page(tmp_path / "a.html", items, "t", sample_rate=RATE, question="consistency")
    page, data = path.read_text(encoding="utf-8"), json.loads(Elements(path.read_text(encoding="utf-8")).scripts[0])
    assert data["question"] == "consistency" and f"<p>{listen.QUESTIONS['consistency']}</p>" in page
    other = listen.listen_page(tmp_path / "b.html", items, "t", sample_rate=RATE).read_text(encoding="utf-8")
    assert json.loads(Elements(other).scripts[0])["page"] != data["page"]  # a browser keeps the answers of each apart
    monkeypatch.setitem(listen.QUESTIONS, "odd", "Is a < b & c?")
    listen.listen_page(tmp_path / "c.html", items, "t", sample_rate=RATE, question="odd")
    assert "<p>Is a &lt; b &amp; c?</p>" in (tmp_path / "c.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"question='consistancy': allowed are 'preference', 'consistency'"):
        listen.listen_page(tmp_path / "d.html", items, "t", sample_rate=RATE, question="consistancy")
    assert not (tmp_path / "d.html").exists()


def test_bad_items(tmp_path, items):
    with pytest.raises(ValueError, match="no items"):
        listen.listen_page(tmp_path / "a.html", [], "t", sample_rate=RATE)
    with pytest.raises(ValueError, match="needs prompt and clips"):
        listen.listen_page(tmp_path / "a.html", [{"prompt": "x"}], "t", sample_rate=RATE)
    with pytest.raises(ValueError, match="NaN"):
        listen.side_by_side("x", {"base": torch.full((RATE,), float("nan"))}, RATE)
    assert not list(tmp_path.iterdir())


def test_trials_are_complete_random_and_fixed_by_the_seed(items):
    many = [{"prompt": str(i), "clips": {"base": [0.0], "DPO": [0.0], "GRPO": [0.0]}} for i in range(100)]
    trials = listen.make_trials(many, 0)
    assert trials == listen.make_trials(many, 0) != listen.make_trials(many, 1)
    assert len(trials) == 200 and [t["trial"] for t in trials] == list(range(200))
    assert {(t["item"], *sorted((t["a"], t["b"]))) for t in trials} == {
        (i, *sorted(("base", s))) for i in range(100) for s in ("DPO", "GRPO")
    }
    assert listen.make_trials([{"prompt": "x", "clips": {"DPO": [0.0]}}], 0) == []


@pytest.mark.parametrize("prompts", [1, 2, 7, 8])
def test_every_system_is_on_both_sides_equally_often(prompts):
    items = [{"prompt": str(i), "clips": {name: [0.0] for name in ("base", "DPO", "GRPO")}} for i in range(prompts)]
    more, orders = set(), set()
    for seed in range(30):
        trials = listen.make_trials(items, seed)
        sides = {system: [t["a"] == system for t in trials if system in (t["a"], t["b"])] for system in ("DPO", "GRPO")}
        assert all(abs(2 * sum(each) - prompts) == prompts % 2 and len(each) == prompts for each in sides.values())
        more |= {2 * sum(each) - prompts for each in sides.values()}
        orders.add(tuple(sides["DPO"]))
        few = listen.make_trials(items, seed, count=prompts)
        assert [(t["item"], {t["a"], t["b"]}) for t in few] == [(t["item"], {t["a"], t["b"]}) for t in trials[:prompts]]
        for system in ("DPO", "GRPO"):
            mine = [t["a"] == system for t in few if system in (t["a"], t["b"])]
            assert abs(2 * sum(mine) - len(mine)) == len(mine) % 2
    assert more == ({-1, 1} if prompts % 2 else {0}) and len(orders) > 1


def test_blind_test_appends_hides_the_names_and_goes_on(items, tmp_path):
    trials = listen.make_trials(items, 0)
    test = listen.BlindTest(items, trials, tmp_path, sample_rate=RATE, listener="Ann/../x")
    assert test.path.parent == tmp_path
    shown = test._text.value + test._players.value
    assert "GRPO" not in shown and "DPO" not in shown and "base" not in re.sub("base64", "", shown.split("data:")[0])
    assert "<script" not in shown and test._players.value.count("jupyter trust") == 2
    test._buttons[0].click()
    first = test.path.read_text()
    test.choose("tie")
    assert test.path.read_text().startswith(first) and len(test.path.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="allowed are 'A', 'B' and 'tie'"):
        test.choose("C")
    resumed = listen.BlindTest(items, trials, tmp_path, sample_rate=RATE, listener="Ann/../x")
    assert [t["trial"] for t in resumed.open] == [2]
    resumed.choose("B")
    assert resumed._buttons[0].disabled and "Done" in resumed._text.value
    with pytest.raises(ValueError, match="all trials are answered"):
        resumed.choose("A")
    answers = listen.load_answers(tmp_path)
    assert [a["preferred"] for a in answers] == [trials[0]["a"], "tie", trials[2]["b"]]
    assert {"id", "prompt", "listener", "choice", "time"} <= set(answers[0])
    assert {answer["question"] for answer in answers} == {"preference"}


def test_answers_about_other_weights_do_not_count(items, tmp_path):
    old = listen.make_trials(items, 0, models="aaaa")
    first = listen.BlindTest(items, old, tmp_path, sample_rate=RATE)
    for choice in ("A", "B", "tie"):
        first.choose(choice)
    again = listen.BlindTest(items, old, tmp_path, sample_rate=RATE)
    assert not again.open and len(listen.load_answers(tmp_path, models="aaaa")) == 3
    tuned_anew = listen.BlindTest(items, listen.make_trials(items, 1, models="bbbb"), tmp_path, sample_rate=RATE)
    assert len(tuned_anew.open) == 3 and listen.load_answers(tmp_path, models="bbbb") == []
    page = listen.listen_page(tmp_path / "listen.html", items, "t", sample_rate=RATE, models="bbbb")
    assert '"models": "bbbb"' in page.read_text() and len(listen.load_answers(tmp_path)) == 3


def test_two_questions_share_a_file_and_not_their_answers(items, tmp_path):
    trials = listen.make_trials(items, 0)
    old = {key: trials[1][key] for key in ("trial", "id", "a", "b")} | {"preferred": "base", "listener": "listener"}
    (tmp_path / "listener.jsonl").write_text(json.dumps(old) + "\n")
    first = listen.BlindTest(items, trials, tmp_path, sample_rate=RATE)
    assert [trial["trial"] for trial in first.open] == [0, 2]  # an answer of before there were questions is to the first
    first.choose("A")
    second = listen.BlindTest(items, trials, tmp_path, sample_rate=RATE, question="consistency")
    assert [trial["trial"] for trial in second.open] == [0, 1, 2]
    assert html.escape(listen.QUESTIONS["consistency"]) in second._text.value
    second.choose("B")
    answers = listen.load_answers(tmp_path)
    assert [answer.get("question") for answer in answers] == [None, "preference", "consistency"]
    table = listen.preference_rate(answers)
    assert set(table["question"]) == {"preference", "consistency"} and table[["wins", "losses", "ties"]].to_numpy().sum() == 3
    with pytest.raises(ValueError, match="allowed are 'preference', 'consistency'"):
        listen.BlindTest(items, trials, tmp_path, sample_rate=RATE, question="better")


def test_of_two_answers_to_the_same_clips_the_first_counts(tmp_path):
    first = {"trial": 3, "id": "p0", "a": "base", "b": "DPO", "preferred": "DPO", "models": "aa", "question": "preference",
             "listener": "Ann", "time": "2026-01-02T10:00:00+00:00"}  # fmt: skip
    again = first | {"trial": 0, "a": "DPO", "b": "base", "preferred": "base", "time": "2026-01-02T11:30:00.123+01:00", "page": "x"}
    later = again | {"time": "2026-01-02T10:30:01.000Z"}
    others = [later | change for change in ({"listener": "Bob"}, {"id": "p1"}, {"b": "GRPO", "a": "base"}, {"models": "bb"},
                                            {"question": "consistency"})]  # fmt: skip
    for name, answers in (("a-page", [later, *others]), ("b-notebook", [first]), ("c-page", [again])):
        for answer in answers:
            listen.append_answer(tmp_path / f"{name}.jsonl", answer)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = listen.load_answers(tmp_path)
    assert loaded == [first, *others] and {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    table = listen.preference_rate(listen.load_answers(tmp_path, models="aa")).set_index(["question", "system"])
    assert table.loc[("preference", "DPO"), ["wins", "losses"]].tolist() == [1, 2]  # Ann's first; Bob's, and hers of p1
    untimed = {key: first[key] for key in first if key != "time"} | {"preferred": "tie"}
    listen.append_answer(tmp_path / "d.jsonl", untimed)
    assert listen.load_answers(tmp_path)[0] == untimed
    listen.append_answer(tmp_path / "e.jsonl", first | {"time": "yesterday"})
    with pytest.raises(ValueError, match=r"e.jsonl, line 1: not an answer"):
        listen.load_answers(tmp_path)


def test_blind_clips_are_equally_loud(tmp_path, monkeypatch):
    tone = np.sin(np.arange(RATE) * 0.3)
    items = [{"prompt": "x", "clips": {"base": 0.1 * tone, "DPO": 0.4 * tone}}]
    heard = []
    monkeypatch.setattr(listen, "_sound", lambda clip, rate, gain: heard.append(float(np.abs(clip).max()) * gain) or "")
    listen.BlindTest(items, listen.make_trials(items, 0), tmp_path, sample_rate=RATE)
    assert len(heard) == 2 and heard[0] == pytest.approx(heard[1], rel=0.02)


def test_preference_rate_by_hand(tmp_path):
    def answer(trial, preferred, system="GRPO", swap=False):
        a, b = ("base", system) if swap else (system, "base")
        return {"trial": trial, "a": a, "b": b, "preferred": preferred, "listener": "x"}

    answers = [answer(i, "GRPO", swap=i % 2 == 0) for i in range(8)] + [answer(8, "base"), answer(9, "base")]
    answers += [answer(10, "tie"), answer(11, "tie", system="DPO")]
    for line in answers:
        listen.append_answer(tmp_path / "x.jsonl", line)
    listen.append_answer(tmp_path / "copy.jsonl", answers[0])
    table = listen.preference_rate(listen.load_answers(tmp_path)).set_index("system")
    assert table.loc["GRPO", ["wins", "losses", "ties"]].tolist() == [8, 2, 1]
    assert table.loc["GRPO", ["rate", "low", "high"]].tolist() == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)
    assert np.isnan(table.loc["DPO", "rate"]) and table.loc["DPO", "ties"] == 1
    assert listen.preference_rate([]).empty
    both = listen.preference_rate([*answers, answers[0] | {"question": "consistency"}]).set_index(["question", "system"])
    assert both.loc[("preference", "GRPO"), "wins"] == 8 and both.loc[("consistency", "GRPO"), "wins"] == 1
    complete = {"trial": 1, "a": "x", "b": "y", "preferred": "y"}
    for bad in ({"trial": 1}, complete | {"preferred": "z"}, complete | {"a": ["x"]}):
        (tmp_path / "bad.jsonl").write_text(json.dumps(bad) + "\n")
        with pytest.raises(ValueError, match=r"bad.jsonl, line 1: not an answer"):
            listen.load_answers(tmp_path)
