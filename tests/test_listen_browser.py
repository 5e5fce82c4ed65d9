"""The listening page in a real browser: a listener with a known preference answers it, and the downloaded answers say so.

Needs a Chromium (RESONATE_CHROMIUM, else the PATH) and playwright; without them the tests skip.
"""

import json
import math
import re

import pytest
import torch
from test_jupyterlab import chromium

from resonate_lib import listen

RATE = 16000
EVIL = "a dog <img src=x onerror=alert(1)> </script><script>alert(2)</script> barks"
COUNTED = "[...document.querySelectorAll('#summary td')].map(cell => cell.textContent)"
WINS, LOSSES, TIES = 6, 2, 1
READY = "document.querySelector('[data-choice]').disabled === false"
HEARD = """async () => Promise.all(['audio-a', 'audio-b'].map(async id => {  // what a trial's players play
    const player = document.getElementById(id), context = new OfflineAudioContext(1, 1, 16000);
    const blob = await (await fetch(player.src)).blob(), buffer = await context.decodeAudioData(await blob.arrayBuffer());
    const sound = buffer.getChannelData(0), middle = sound.slice(3000, 13000);
    let turns = 0;
    middle.forEach((value, i) => { turns += i && (value > 0) !== (middle[i - 1] > 0) ? 1 : 0; });
    const rms = Math.sqrt(middle.reduce((sum, value) => sum + value * value, 0) / middle.length);
    return {src: player.src, volume: player.volume, size: blob.size, seconds: buffer.duration, rms: rms, hertz: 0.8 * turns};
}))"""


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = chromium()
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def path(tmp_path):
    time = torch.arange(RATE) / RATE
    items = [
        {
            "id": f"p{i}",
            "prompt": EVIL if i == 0 else f"prompt {i}",
            "clips": {"base": 0.1 * torch.sin(440 * 6.28 * time), "PPO": 0.2 * torch.sin((500 + i) * 6.28 * time)},
            "note": "Outside the model's vocabulary: <b>wind</b>" if i == 0 else "",
        }
        for i in range(WINS + LOSSES + TIES)
    ]
    return listen.listen_page(
        tmp_path / "listen_ppo.html", items, "Original beside fine-tuned", sample_rate=RATE, seed=3, question="consistency"
    )


def trials_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])["trials"]


def test_a_listener_answers_the_page_and_the_answers_are_counted_and_saved(browser, path, tmp_path):
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    spoken = []
    page.on("dialog", lambda dialog: (spoken.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: spoken.append(str(error)))
    page.goto(path.as_uri())
    page.fill("#listener", "Ann/..")
    page.click("#begin")
    assert page.locator("#blind-run").inner_text().count(listen.QUESTIONS["consistency"]) == 1
    trials, wanted = trials_of(path), ["PPO"] * WINS + ["base"] * LOSSES + ["tie"] * TIES
    for number, (trial, preferred) in enumerate(zip(trials, wanted, strict=True)):
        assert page.text_content("#progress") == f"Trial {number + 1} of {len(trials)}"
        assert page.text_content("#blind-prompt") == trial["prompt"]
        page.wait_for_function(READY)
        heard = page.evaluate(HEARD)
        tones = {"base": 440, "PPO": 500 + trial["item"]}
        assert [clip["hertz"] for clip in heard] == pytest.approx([tones[trial[side]] for side in "ab"], abs=3)
        assert [clip["volume"] for clip in heard] == [1, 1] and heard[0]["size"] == heard[1]["size"]
        assert all(clip["src"].startswith("blob:") and 0.9 < clip["seconds"] < 1.3 for clip in heard)
        assert abs(20 * math.log10(heard[0]["rms"] / heard[1]["rms"])) < 0.5 and heard[0]["rms"] > 0.2
        if number == 1:  # the box of the named clips changes nothing here
            page.check("#match")
        page.click(f"[data-choice={'tie' if preferred == 'tie' else 'A' if trial['a'] == preferred else 'B'}]")
        if number == 3:  # a listener who comes back goes on where she stopped
            page.reload()
            page.fill("#listener", "Ann/..")
            page.click("#begin")
    assert page.evaluate(COUNTED) == ["PPO", str(WINS), str(LOSSES), str(TIES), "75 %", "41 % to 93 %"]
    with page.expect_download() as download:
        page.click("#download")
    saved = tmp_path / "answers" / download.value.suggested_filename
    download.value.save_as(saved)
    assert re.fullmatch(r"answers-Ann___-[0-9a-f]{12}\.jsonl", saved.name)
    answers = listen.load_answers(saved.parent)
    assert len(answers) == len(trials) and {answer["question"] for answer in answers} == {"consistency"}
    table = listen.preference_rate(answers).iloc[0]
    assert table[["question", "system", "wins", "losses", "ties"]].tolist() == ["consistency", "PPO", WINS, LOSSES, TIES]
    assert [round(100 * table[name]) for name in ("rate", "low", "high")] == [75, 41, 93]
    assert not spoken, "a prompt was executed, or the page has an error"


def test_without_a_way_to_make_clips_equally_loud_nothing_is_asked(browser, path):
    page = browser.new_page()
    page.add_init_script("delete window.OfflineAudioContext; delete window.webkitOfflineAudioContext")
    page.goto(path.as_uri())
    page.click("#begin")
    page.wait_for_selector("#blind-trouble")
    assert page.locator("[data-choice]:disabled").count() == 3 and page.locator("#blind-run audio[src]").count() == 0


def test_every_player_of_the_page_plays(browser, path):
    page = browser.new_page()
    page.goto(path.as_uri())
    loaded = page.evaluate("""async () => Promise.all([...document.querySelectorAll('audio[data-match]')].map(
        a => new Promise(done => {
        if (a.readyState > 0) return done(a.duration);
        a.onloadedmetadata = () => done(a.duration); a.onerror = () => done(-1); a.load(); })))""")
    assert len(loaded) == 2 * (WINS + LOSSES + TIES) and all(0.9 < seconds < 1.3 for seconds in loaded), loaded
    assert "Outside the model's vocabulary: <b>wind</b>" in page.locator("section.item").first.inner_text()
    page.check("#match")
    assert page.evaluate("document.getElementById('clip-0-1').volume") == pytest.approx(0.5, abs=0.05)
