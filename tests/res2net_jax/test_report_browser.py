"""The page of ``predict --html`` in a real browser: Chromium without a window."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from res2net_jax.commands.outputs import Answer
from res2net_jax.commands.report import report
from res2net_jax.inference import Prediction

NAMES = ["img10.jpg", "img2.jpg", "<b>&.png", "long " * 20 + "name.jpg"]
CONFIDENCES = [0.5, 0.9, 0.05, 0.7]
LABELS = ["tabby, tabby cat", "golden retriever", "cat & <script>alert(1)</script>", "a" * 80]


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'res2net_jax[test]'")
    chromium, chromedriver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Four pictures in two folders, with maps, and one that was broken."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    paths = [Path("/p", "ab"[i % 2], name) for i, name in enumerate(NAMES)]
    names = {path: path.relative_to("/p") for path in paths}
    grey = Image.fromarray(np.full((224, 224, 3), 128, np.uint8))
    with report(file, "res2net50d", names, ["broken.jpg: <cannot> be read"], explained=True) as write:
        for path, label, confidence in zip(paths, LABELS, CONFIDENCES, strict=True):
            rest = [Prediction(f"class {i}", (1 - confidence) / 9, i) for i in range(1, 5)]
            write(Answer(path, [Prediction(label, confidence, 0), *rest], grey, grey.rotate(90)))
    return file


@pytest.fixture
def opened(driver, page):
    resize(driver, 1280)
    driver.get(page.as_uri())
    return driver


def resize(driver, width, height=900):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def visible(driver):
    """The names of the cards that are shown, in order."""
    cards = driver.find_elements("css selector", ".card")
    return [card.get_attribute("data-name") for card in cards if card.is_displayed()]


def focused(driver):
    return driver.switch_to.active_element.get_attribute("data-name")


def press(driver, *keys):
    from selenium.webdriver import ActionChains, Keys

    actions = ActionChains(driver)
    for key in keys:
        actions.send_keys(getattr(Keys, key) if len(key) > 1 else key)
    actions.perform()


GIVEN = ["a/img10.jpg", "b/img2.jpg", "a/<b>&.png", f"b/{NAMES[3]}"]


def test_nothing_is_fetched_and_nothing_complains(opened):
    messages = [entry["message"] for entry in opened.get_log("performance")]
    requests = [message for message in messages if '"Network.requestWillBeSent"' in message]
    assert requests and all('"url":"file:' in m or '"url":"data:image/jpeg' in m for m in requests)
    assert opened.get_log("browser") == []
    assert opened.title == "res2net50d: 4 pictures"
    images = opened.find_elements("css selector", ".card img")
    assert len(images) == 8 and all(image.get_attribute("naturalWidth") == "224" for image in images)
    labels = [
        card.find_element("css selector", ".label").text for card in opened.find_elements("css selector", ".card")
    ]
    assert labels == LABELS  # as text, not as markup
    summary = opened.find_element("css selector", "details summary")
    assert summary.text == "1 picture could not be read"
    summary.click()
    assert opened.find_element("css selector", "details li").text == "broken.jpg: <cannot> be read"


def test_sorting(opened):
    from selenium.webdriver.support.select import Select

    assert visible(opened) == GIVEN
    sort = Select(opened.find_element("id", "sort"))
    for choice, order in {
        "surest": [1, 3, 0, 2],
        "unsure": [2, 0, 3, 1],
        "name": [2, 0, 1, 3],
        "given": range(4),
    }.items():
        sort.select_by_value(choice)
        assert visible(opened) == [GIVEN[i] for i in order], choice


def test_filtering(opened):
    field, count = opened.find_element("id", "filter"), opened.find_element("id", "count")
    assert count.text == "4 pictures"
    field.send_keys("CAT")
    assert visible(opened) == [GIVEN[0], GIVEN[2]] and count.text == "2 of 4 pictures"
    field.send_keys(" img")
    assert visible(opened) == [GIVEN[0]]
    field.send_keys("zzz")
    assert visible(opened) == [] and opened.find_element("id", "none").is_displayed()
    press(opened, "ESCAPE")
    assert visible(opened) == GIVEN and count.text == "4 pictures" and field.get_attribute("value") == ""


def test_keyboard_alone(opened):
    press(opened, "/", "i", "m", "g")
    assert opened.switch_to.active_element.get_attribute("id") == "filter" and visible(opened) == GIVEN[:2]
    press(opened, "ESCAPE", "TAB", "TAB", "TAB")
    assert focused(opened) == GIVEN[0]
    press(opened, "ARROW_RIGHT", "ARROW_RIGHT")
    assert focused(opened) == GIVEN[2]
    press(opened, "ARROW_LEFT")
    assert focused(opened) == GIVEN[1]
    press(opened, "END")
    assert focused(opened) == GIVEN[3]
    press(opened, "ARROW_RIGHT", "HOME")
    assert focused(opened) == GIVEN[0]
    resize(opened, 390)
    press(opened, "ARROW_DOWN")  # one column here
    assert focused(opened) == GIVEN[1]
    press(opened, "TAB")  # past the other cards, to the broken pictures
    assert opened.switch_to.active_element.tag_name == "summary"


def test_the_evidence_is_switched_by_mouse_and_key(opened):
    def shown():
        opened.execute_script("for (const a of document.getAnimations()) a.finish()")
        heats = opened.find_elements("css selector", ".heat")
        return {float(heat.value_of_css_property("opacity")) for heat in heats}

    assert shown() == {1}
    opened.find_element("id", "explain").click()
    assert shown() == {0}
    press(opened, "e")
    assert shown() == {1}
    opened.find_element("id", "filter").send_keys("e")
    assert shown() == {1}


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 2560])
def test_no_width_scrolls_sideways(opened, width):
    resize(opened, width)
    assert opened.execute_script("return innerWidth") == width
    assert opened.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for element in opened.find_elements("css selector", ".card, .tools input, .tools select"):
        assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(opened, scheme):
    """Contrast of at least 4.5 (WCAG 2.2, 1.4.3)."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    surface = opened.find_element("css selector", ".card").value_of_css_property("background-color")
    page = opened.find_element("css selector", "body").value_of_css_property("background-color")
    assert (luminance(page) > 0.5) == (scheme == "light")
    for selector, behind in {
        ".label": surface,
        ".percent": surface,
        ".card h2": surface,
        "h1": page,
        "#count": page,
    }.items():
        colour = opened.find_element("css selector", selector).value_of_css_property("color")
        light, dark = sorted((luminance(colour), luminance(behind)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector


def luminance(colour):
    """Relative luminance of ``rgb(...)`` or ``rgba(...)``, by WCAG."""
    values = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_many_cards_are_drawn_as_they_are_needed(driver, tmp_path):
    from selenium.webdriver.support.ui import WebDriverWait

    paths = [Path(f"/p/{i}.jpg") for i in range(500)]
    picture = Image.new("RGB", (8, 8))
    file = tmp_path / "many.html"
    with report(file, "m", {path: Path(path.name) for path in paths}, []) as write:
        for i, path in enumerate(paths):
            write(Answer(path, [Prediction("even" if i % 2 else "odd", 0.5 + i / 1000, 0)], picture))
    resize(driver, 1280)
    driver.get(file.as_uri())
    assert len(visible(driver)) == 120
    driver.execute_script("scrollTo(0, document.body.scrollHeight)")
    WebDriverWait(driver, 10).until(lambda driver: driver.find_elements("css selector", "[data-name='200.jpg']"))
    driver.find_element("id", "filter").send_keys("499")
    assert visible(driver) == ["499.jpg"] and not driver.find_element("id", "more").is_displayed()
    press(driver, "ESCAPE", "TAB", "TAB")  # there is no switch for maps
    assert focused(driver) == "0.jpg"
    press(driver, "END")
    assert focused(driver) == "499.jpg" and len(visible(driver)) == 500


def test_without_scripts_all_is_there(driver, page):
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(page.as_uri())
        assert visible(driver) == GIVEN
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_without_maps_there_is_no_switch(driver, tmp_path):
    file, path = tmp_path / "plain.html", Path("/p/a.jpg")
    with report(file, "m", {path: Path("a.jpg")}, []) as write:
        write(Answer(path, [Prediction("x", 1.0, 0)], Image.new("RGB", (224, 224))))
    driver.get(file.as_uri())
    assert visible(driver) == ["a.jpg"] and driver.find_element("id", "count").text == "1 picture"
    assert not driver.find_element("id", "explain").is_displayed()
    assert driver.find_elements("css selector", "details") == []
    press(driver, "e")
    assert driver.execute_script("return document.body.className") == ""
