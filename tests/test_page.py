"""The page is readable at any length, and a browser reports no errors."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from small import PreNorm
from torch import fx, nn

from hwbp_compiler import explain
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.report.data import BlockPrograms, ErrorAt, ExplainedGraph
from hwbp_compiler.report.picture import Fold, chain_svg, errors_svg, folded
from hwbp_compiler.report.report import Report

ALWAYS = {"iterations": 1, "rewrite": "always"}

# -- what is drawn of a chain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "drawn"),
    [
        ("aaaa", [0, 1, 2, 3]),
        ("a" * 1024, [0, Fold(1, 1022, 1), 1023]),
        ("ab" * 12, [0, 1, Fold(2, 20, 2), 22, 23]),
        ("x" + "a" * 30, [0, 1, Fold(2, 28, 1), 30]),
        ("a" * 20 + "b" * 20, [0, Fold(1, 18, 1), 19, 20, Fold(21, 18, 1), 39]),
        ("abcdefghijklmnop", [0, 1, 2, 3, Fold(4, 8, 0), 12, 13, 14, 15]),
    ],
)
def test_what_repeats_is_folded(kinds, drawn):
    assert folded(kinds) == drawn


@pytest.mark.parametrize("kinds", ["a" * 9, "ab" * 500, "abb" * 40 + "c", "a" * 17 + "bc" * 9, "x" * 8 + "abcdefg" * 5])
def test_folds_hide_no_link_and_repeat_what_is_before_them(kinds):
    position = 0
    for item in folded(kinds):
        if isinstance(item, Fold):
            assert item.start == position and item.links > 0
            if item.period:
                hidden = kinds[item.start : item.start + item.links]
                before = kinds[item.start - item.period : item.start]
                assert hidden == before * (item.links // item.period)
            position += item.links
        else:
            assert item == position
            position += 1
    assert position == len(kinds) and len(folded(kinds)) <= 24


def record(length: int, losses=()) -> ChainRecord:
    group = GroupRecord(length, {"mm": 3}, "sigmoid(...)", "cell", "model.py:7: h = self.cell(x_t, h)")
    return ChainRecord(
        length, "rewritten", 'rewrite="always"', "sigmoid(...)", [group], group.source, module="cell",
        sources=[group.source], members=[0] * length, modules=["cell"] * length, side_losses=list(losses),
    )  # fmt: skip


@pytest.mark.parametrize("length", [4, 1024])
def test_a_picture_is_small_whatever_the_length(length):
    picture = chain_svg(record(length), 1)
    assert len(picture) < 6_000
    assert f">h{length}</text>" in picture and f'data-link="{length}"' in picture


def test_a_picture_shows_where_segments_end():
    chain = record(10)
    chain.rewritten(Truncation(0, segment=9))
    picture = chain_svg(chain, 1)
    assert picture.count("segment 1 ends") == 1 and "over" not in picture  # after the first link
    chain.rewritten(Truncation(0, segment=4))
    picture = chain_svg(chain, 1)
    assert "the same 8 times more" in picture and "over 3 segments" in picture and picture.count('class="cut"') == 2
    assert "segment" not in chain_svg(record(10), 1)


def test_curves_of_several_s_are_told_apart():
    picture = errors_svg(
        [ErrorAt(0, 0.9, 0.4), ErrorAt(1, 0.99, 0.1), ErrorAt(0, 0.95, 0.3, 4), ErrorAt(1, 1.0, 0.0, 4)]
    )
    assert picture.count("<polyline") == 4 and ">S=1<" in picture and ">S=4<" in picture
    assert "k = 1, S = 4: relative error 0, cosine 1.000000" in picture


def test_names_are_escaped():
    chain = record(4)
    chain.modules = ["<script>"] * 4
    assert "<script>" not in chain_svg(chain, 1)


# -- in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver on the PATH (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # By default, selenium reports usage over the network.
    os.environ["SE_AVOID_STATS"] = "true"
    try:
        found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except Exception as error:
        pytest.skip(f"chromium does not start here: {type(error).__name__}: {str(error).splitlines()[0]}")
    yield found
    found.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A real report, with the error of w^k."""
    model = nn.Sequential(nn.Linear(3, 4), *(PreNorm() for _ in range(4)), nn.Linear(4, 2))
    path = tmp_path_factory.mktemp("page") / "page.html"
    explain(model, torch.randn(2, 3), options=ALWAYS, errors=True).to_html(path)
    return path


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """A handmade report of 1,024 links with a loss at every second state."""
    empty = fx.GraphModule(nn.Module(), fx.Graph())
    graph = ExplainedGraph(
        empty, empty, [record(1024, range(0, 1023, 2))], programs=[[BlockPrograms(["m.py:1: x"], "before", "after")]],
        rest=["the scan"], errors=[ErrorAt(0, 0.9, 0.4), ErrorAt(1, 0.999, 0.04)],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("page") / "long.html"
    Report(Options(), [graph], name="GRU").to_html(path)
    return path


@pytest.fixture(scope="module")
def alike_page(tmp_path_factory):
    """Two layers and two directions of a GRU are four chains alike; a fifth chain is not like them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.blocks = nn.GRU(3, 2, 2, bidirectional=True), nn.Sequential(*(PreNorm() for _ in range(5)))

        def forward(self, x):
            return self.blocks(self.gru(x)[0])

    path = tmp_path_factory.mktemp("page") / "alike.html"
    explain(Model(), torch.randn(6, 2, 3), options=ALWAYS).to_html(path)
    return path


def visit(browser, path, width=1000, dark=False):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get_log("browser")
    browser.get(path.as_uri())


def test_the_page_loads_in_silence_and_asks_nobody_for_anything(browser, page):
    visit(browser, page)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.title.startswith("Sequential: 1 chain in 1 joint graph")


def test_the_picture_is_there(browser, page):
    visit(browser, page)
    size = browser.execute_script(
        "const b = document.querySelector('svg.chain').getBoundingClientRect(); return [b.width, b.height]"
    )
    assert size[0] > 250 and size[1] > 300
    assert len(browser.find_elements("css selector", "svg.chain .block")) == 4
    assert [k.text for k in browser.find_elements("css selector", "svg.chain .k")] == ["1"] * 4
    assert len(browser.find_elements("css selector", "svg.errors .point.error")) >= 3


@pytest.mark.parametrize("key", [False, True])
def test_opening_a_block_shows_its_programs(browser, page, key):
    visit(browser, page)
    panel = browser.find_element("css selector", ".panel")
    assert not panel.is_displayed()
    block = browser.find_elements("css selector", "svg.chain .block")[1]
    block.send_keys("\n") if key else block.find_element("css selector", "rect").click()
    assert panel.is_displayed() and panel.find_element("css selector", ".opened").text == "Link 2: 2"
    shown = {name: panel.find_element("css selector", f".{name}").text for name in ("forward", "before", "after")}
    assert "return x + self.down(torch.relu(self.up(self.norm(x))))" in shown["forward"]
    assert "mm(" in shown["before"] and "down.weight" in shown["before"] and "bmm(" not in shown["before"]
    assert "bmm(" in shown["after"] and "iteration 1" in shown["after"] and "'" not in shown["after"]
    assert "This is link" in panel.text
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("name", ["page", "long_page", "alike_page"])
def test_nothing_sticks_out_at_any_width(browser, request, name, width):
    visit(browser, request.getfixturevalue(name), width)
    browser.execute_script("document.querySelector('.block').dispatchEvent(new MouseEvent('click'))")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_chain_of_1024_links_fits_a_screen_or_two(browser, long_page):
    visit(browser, long_page)
    assert browser.execute_script("return document.querySelector('svg.chain').getBoundingClientRect().height") < 1500
    assert 2 <= len(browser.find_elements("css selector", "svg.chain .block")) <= 8
    folds = browser.find_elements("css selector", "svg.chain .fold")
    assert [fold.text for fold in folds] and "times more" in folds[0].text
    assert browser.find_elements("css selector", "svg.chain .side-loss")


def test_what_the_whole_model_gets_is_a_table_before_the_chains(browser, alike_page):
    visit(browser, alike_page)
    cells = browser.find_elements("css selector", "table.summary tr")
    shown = {
        cell.find_element("css selector", "th").text: cell.find_element("css selector", "td").text for cell in cells
    }
    assert shown["chains"] == "5 rewritten (29 links), 0 declined" and shown["gradients"] == "approximate, k = 1"
    assert "link after link" in shown["speed"] and "at most" in shown["memory"]
    assert cells[0].location["y"] < browser.find_element("css selector", ".card").location["y"]


def test_chains_alike_are_one_card_whose_blocks_open(browser, alike_page):
    visit(browser, alike_page)
    headings = [heading.text for heading in browser.find_elements("css selector", ".card > header h3")]
    assert sorted(headings) == ["4 chains alike (1 to 4): 6 links each", "Chain 5: 5 links"]
    card = browser.find_elements("css selector", ".card")[headings.index("4 chains alike (1 to 4): 6 links each")]
    assert "gru layers 0 and 1, both directions" in card.text and "Drawn is chain 1, gru layer 1 reverse" in card.text
    card.find_elements("css selector", "svg.chain .block")[0].find_element("css selector", "rect").click()
    assert "recurrent_module_backward(" in card.find_element("css selector", ".panel .before").text
    assert browser.get_log("browser") == []


def test_light_and_dark_are_two_pages_that_can_be_read(browser, page):
    contrast = """
        const channel = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
        const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => channel(v / 255));
        const light = (c) => { const [r, g, b] = rgb(c); return .2126 * r + .7152 * g + .0722 * b; };
        const ratio = (a, b) => {
            const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
            return (x + .05) / (y + .05);
        };
        const style = (s) => getComputedStyle(document.querySelector(s));
        const page = style("body");
        return [page.backgroundColor, ratio(page.color, page.backgroundColor),
                ratio(style(".block-name").fill, style(".block rect").fill),
                ratio(style("dt").color, style(".card").backgroundColor)];
    """
    backgrounds = set()
    for dark in (False, True):
        visit(browser, page, dark=dark)
        background, *ratios = browser.execute_script(contrast)
        backgrounds.add(background)
        assert min(ratios) >= 4.5, (dark, ratios)  # WCAG AA
    assert len(backgrounds) == 2
