"""The page of a reader study in a browser: what a reader types is what the analysis gets."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsi_pipeline.cohorts.tiles import load_tiles
from wsi_pipeline.study.analyse import analyse
from wsi_pipeline.study.pack import Pack, pack

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
SWITCHES = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


class Browser:
    """A headless browser, driven through the pipe of its DevTools protocol (fd 3: commands, 4: answers)."""

    def __init__(self, profile: Path) -> None:
        commands, self._commands = os.pipe()
        answers, self._answers_write = os.pipe()
        switches = [*SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        script = f'exec "$0" "$@" 3<&{commands} 4>&{self._answers_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, str(CHROMIUM), *switches],
            pass_fds=(commands, self._answers_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(self._answers_write)
        self._answers = os.fdopen(answers, "rb")
        self._number, self._session = 0, None
        pages = [one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        opened = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = opened["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith("Browser."):
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(lambda: self._answers.read(1), b"\0")))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def value(self, script: str) -> Any:
        """What a script gives; an error in it fails the test."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.as_uri())
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + 20
        while not self.value(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def type(self, keys: str) -> None:
        for key in keys:
            named = {"<": "ArrowLeft", ">": "ArrowRight", "\r": "Enter"}.get(key)
            what: dict[str, Any] = {"key": named} if named else {"key": key, "text": key}
            if key == "\r":
                what |= {"text": "\r", "windowsVirtualKeyCode": 13}
            self.call("Input.dispatchKeyEvent", type="keyDown", **what)
            self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(20)
        os.close(self._commands)
        self._answers.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def study(tmp_path: Path) -> Pack:
    rng = np.random.default_rng(0)
    for side, base in (("real", 200), ("made", 90)):
        (tmp_path / side).mkdir()
        for number in range(3):
            pixels = rng.integers(base, base + 40, (48, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{number}.png")
    sides = (load_tiles(tmp_path / "real"), load_tiles(tmp_path / "made"))
    return pack(*sides, tmp_path / "study.html", count=None, seed=1, quality=90)


def test_what_a_reader_types_is_what_is_analysed(browser: Browser, study: Pack, tmp_path: Path) -> None:
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open(study.page)
    browser.type("Anna\r")  # a name is no code
    assert "not a name" in browser.value("$('problem').textContent")
    browser.value("$('code').value = ''")
    browser.type("r07\r")
    assert browser.value("$('place').textContent") == "R07: image 1 of 6, 0 judged"
    browser.wait("$('image').complete && $('image').naturalWidth === 48")

    browser.type("3")  # no answer yet: nothing happens
    assert browser.value("state.order.length") == 0
    truth = {name: tile["truth"] for name, tile in json.loads(study.key.read_text())["tiles"].items()}
    shown = browser.value("tiles.map(tile => tile.id)")
    assert sorted(shown) == sorted(truth)
    typed = []
    for number, name in enumerate(shown[:4]):
        right = number != 1  # one mistake
        word = truth[name] if right else {"real": "synthetic", "synthetic": "real"}[truth[name]]
        browser.type(word[0] + str(number + 1))
        typed.append((name, word, str(number + 1)))
    browser.type("u")  # the last one is taken back and given again
    assert browser.value("at") == 3
    browser.type(typed[3][1][0] + "5")
    typed[3] = (*typed[3][:2], "5")
    browser.type("<<>")
    assert browser.value("at") == 3

    browser.open(study.page)  # as if closed and opened again
    browser.type("r07\r")
    assert browser.value("$('place').textContent") == "R07: image 5 of 6, 4 judged"
    for name in shown[4:]:
        browser.type(truth[name][0] + "2")
        typed.append((name, truth[name], "2"))
    assert browser.value("!$('done').hidden && $('image').hidden")
    browser.value("$('save2').click()")
    saved = tmp_path / f"answers-{study.study}-R07.csv"
    end = time.monotonic() + 10
    while not saved.exists() and time.monotonic() < end:
        time.sleep(0.05)

    rows = list(csv.DictReader(saved.read_text().splitlines()))
    assert [(row["id"], row["answer"], row["confidence"]) for row in rows] == typed
    assert [row["order"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    (figures,) = analyse(study.key, [saved]).readers
    assert (figures.reader, figures.missing, figures.accuracy.value) == ("R07", 0, 5 / 6)
    assert 0 <= figures.seconds < 20


def test_another_reader_gets_another_order_and_no_window_needs_scrolling(
    browser: Browser, study: Pack
) -> None:
    orders = []
    for code in ("r1", "r2"):
        browser.open(study.page)
        browser.type(f"{code}\r")
        orders.append(browser.value("tiles.map(tile => tile.id)"))
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    for width, height in ((1280, 800), (420, 480)):
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        box = "document.documentElement"
        assert browser.value(f"{box}.scrollHeight <= {height} && {box}.scrollWidth <= {width}")
        assert browser.value("$('panel').getBoundingClientRect().bottom") <= height
        assert browser.value("$('image').getBoundingClientRect().height") > 0.4 * height
