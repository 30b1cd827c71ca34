"""The static site: pages, navigation, links, what the build refuses, and a browser without a network."""

import contextlib
import html
import json
import os
import re
import shutil
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from speedrun_lib import site_build
from speedrun_lib.site_build import SITE_PARTS, SiteError, build_site, mathjax_archive

# theme and parser use names that Sphinx will drop in a later version than the one that settings.ini allows
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").glob("*.ipynb") if not path.name.startswith("_"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="session")
def mathjax():
    "The MathJax package; without npm and without a copy in the cache no site can be built here."
    try:
        return mathjax_archive()
    except SiteError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def site(mathjax, tmp_path_factory):
    "The course, built once."
    return build_site(tmp_path_factory.mktemp("site") / "_site", ROOT / "nbs")


def course(folder: Path, **cells: list) -> Path:
    "A small course: one notebook per keyword (`index` is added), its cells given; returns the folder of notebooks."
    nbs = folder / "nbs"
    nbs.mkdir(exist_ok=True)
    shutil.copy(ROOT / "settings.ini", folder)
    for name, content in ({"index": [new_markdown_cell("# Start")]} | cells).items():
        nbformat.write(new_notebook(cells=content), nbs / f"{name.lstrip('n')}.ipynb")
    return nbs


def code(source: str, *outputs) -> dict:
    "A code cell with saved outputs."
    return new_code_cell(source, outputs=list(outputs))


def result(text: str, mime: str = "text/plain") -> dict:
    "A saved result."
    return new_output("execute_result", {mime: text})


class Page(HTMLParser):
    "Tags and text of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.path, self.captions, self.nav, self.text = [], path, [], [], []
        self.stack = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in ("link", "meta", "img", "input", "br", "hr", "path", "source"):
            self.stack.append((tag, attrs.get("class") or ""))
        if tag == "a" and self.inside("nav", "bd-links"):
            self.nav.append(attrs["href"])

    def handle_endtag(self, tag):
        while any(open_tag == tag for open_tag, _ in self.stack) and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.inside("span", "caption-text") and self.inside("nav", "bd-links"):
            self.captions.append(data)
        if self.inside("article", "bd-article"):
            self.text.append(data)

    def inside(self, tag: str, name: str) -> bool:
        return any(t == tag and name in c.split() for t, c in self.stack)


@pytest.fixture(scope="session")
def pages(site) -> dict[str, Page]:
    return {path.stem: Page(path) for path in sorted(site.glob("*.html"))}


def cells_of(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == kind]


# ---------------------------------------------------------------------------------------------------- the built course

def test_every_notebook_has_a_page_with_its_title(pages):
    for path in NOTEBOOKS:
        title = cells_of(path, "markdown")[0].splitlines()[0].removeprefix("# ")
        words = re.findall(r"\w+", re.sub(r"\$.*?\$", "", title))
        assert path.stem in pages, f"{path.name} has no page"
        text = "".join(pages[path.stem].text)
        assert all(word in text for word in words), f"the page of {path.name} lacks its title"


def test_navigation_lists_parts_and_pages_in_reading_order(pages):
    numbered = [path.stem for path in NOTEBOOKS if path.stem != "index"]
    digits = sorted({stem[0] for stem in numbered})
    assert list(SITE_PARTS) == sorted(SITE_PARTS), "parts are in reading order"
    for name in ("index", "01_data"):
        assert pages[name].captions == ["Start here", *[SITE_PARTS[digit] for digit in digits]]
        links = [unquote(href).removesuffix(".html") for href in pages[name].nav]
        assert [link if link != "#" else name for link in links] == ["index", *numbered]


def test_no_page_loads_anything_from_another_host(site, pages):
    for page in pages.values():
        for tag, attrs in page.tags:
            if tag in ("script", "link", "img", "iframe", "source", "video", "audio", "object", "embed"):
                for name in ("src", "href", "srcset", "data"):
                    assert not re.match(r"(https?:)?//", attrs.get(name) or ""), f"{page.path.name}: {tag} {attrs}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import\s+|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_local_links_lead_somewhere(site, pages):
    ids = {f"{name}.html": {attrs.get("id") for _, attrs in page.tags} for name, page in pages.items()}
    seen = 0
    for page in pages.values():
        for tag, attrs in page.tags:
            target = attrs.get("href") if tag in ("a", "link") else attrs.get("src")
            if not target or re.match(r"[a-z][a-z+.-]*:", target):
                continue
            url = urlsplit(target)
            name = unquote(url.path) or page.path.name
            assert (site / name).is_file(), f"{page.path.name} links to {target}"
            if url.fragment and name in ids:
                assert unquote(url.fragment) in ids[name], f"{page.path.name} links to {target}, which has no such id"
            seen += 1
    assert seen > 20 * len(pages)
    assert "02_baseline.html" in [attrs.get("href") for tag, attrs in pages["01_data"].tags if tag == "a"]


def test_search_knows_a_word_of_chapter_01(site):
    script = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("Search.setIndex(").rstrip(")"))
    found = index["terms"]["shakespear"]
    docs = found if isinstance(found, list) else [found]
    assert "01_data" in [index["docnames"][doc] for doc in docs]


def outputs_of(path: Path) -> str:
    "What the cells of a notebook show; a diff there may hold a line that is hidden elsewhere."
    outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", [])]
    texts = [text for o in outputs for text in (o.get("text"), *o.get("data", {}).values()) if isinstance(text, str)]
    return html.unescape("\n".join(texts))


def test_directives_hidden_cells_and_subtitles_are_filtered(site, pages):
    for path in NOTEBOOKS:
        text = "".join(pages[path.stem].text)
        sources = cells_of(path, "code")
        assert not re.search(r"^#\s*\|", text, re.M), f"{path.stem} shows a directive"
        hidden = [s for s in sources if re.match(r"#\s*\|\s*hide\b", s)]
        kept = "\n".join([*(s for s in sources if s not in hidden), outputs_of(path)])
        for line in "\n".join(hidden).splitlines():
            if len(line) > 30 and line not in kept and not line.startswith("#|"):
                assert line not in text, f"{path.stem} shows the hidden line {line!r}"
        first = cells_of(path, "markdown")[0].splitlines()
        lead = [attrs for tag, attrs in pages[path.stem].tags if "speedrun-lead" in (attrs.get("class") or "")]
        assert len(lead) == sum(line.startswith(">") for line in first[1:2]), f"{path.stem}: subtitle is not a lead"
        exported = sum(bool(re.match(r"#\s*\|\s*export\b", s)) for s in sources)
        captions = [attrs for _, attrs in pages[path.stem].tags if attrs.get("class") == "speedrun-source"]
        assert len(captions) == exported, f"{path.stem}: exported cells without caption"


# ------------------------------------------------------------------------------------------------ small courses: filter

@pytest.fixture(scope="module")
def small(mathjax, tmp_path_factory) -> Path:
    "A site with one page of everything the filter treats."
    folder = tmp_path_factory.mktemp("small")
    long = "\n".join(["class Long:", *[f"    a{i} = {i}" for i in range(30)]])
    nbs = course(
        folder,
        n01_all=[
            new_markdown_cell("# All: of it\n> A *short* line\n> on two lines.\n\nRest "
                              "[two](20_two.ipynb#The-second-%24part) and [settings](../settings.ini), "
                              "from $5 to $6, $7–$8, `[x](99_x.ipynb)`."),
            code("#| default_exp all"), code("#|hide\nhidden_word = 1", result("hidden_result")),
            code("#| export\ndef shown_word():\n    return '''\n#| not a directive'''"),
            code(f"#| exporti\n{long}"),
            code("raise RuntimeError(open('executed', 'w').write('x'))", result("saved_result")),
            code("#| echo: false\nfolded_word = 1", result("folded_result")),
            code("card('x')", result('<div class="speedrun-card"><a href="20_two.ipynb">two</a></div>', "text/html")),
            code("plot()", result("<svg xmlns='http://www.w3.org/2000/svg'><text>loss &amp; steps</text><text>12</text>"
                                  "</svg>", "image/svg+xml")),
        ],
        n20_two=[new_markdown_cell("# Two"), new_markdown_cell("## The second $part\ntext $$a^2$$ in a line")],
        _n30_draft=[new_markdown_cell("no title, [broken](99_gone.ipynb)")],
    )
    (nbs / "_n30_draft.ipynb").rename(nbs / "_30_draft.ipynb")
    return build_site(folder / "out", nbs)


def block(page: str, word: str) -> str:
    "The HTML of the notebook cell around a word."
    cells = re.split(r'(?=<div class="cell )', page)
    return next(cell for cell in cells if word in cell)


def test_filter_of_one_page(small):
    page = (small / "01_all.html").read_text(encoding="utf-8")
    assert '<p class="speedrun-lead">A <em>short</em> line\non two lines.</p>' in page
    assert "hidden_word" not in page and "hidden_result" not in page and "default_exp" not in page
    assert page.count('<p class="speedrun-source">') == 2 and page.count("speedrun_lib/all.py") == 2
    assert "not a directive" in page, "only leading lines are directives"
    assert "<details" not in block(page, "shown_word")
    assert "<details" in block(page, '<span class="nc">Long</span>') and "31 lines" in page
    assert "<details" in block(page, "folded_word") and "folded_result" in block(page, "folded_word")
    assert "cell_input" not in block(page, 'class="speedrun-card"')
    assert 'alt="figure: loss &amp; steps"' in page
    assert 'class="highlight-ipython3' in page, "sources are highlighted"


def test_nothing_is_executed(small):
    assert "saved_result" in (small / "01_all.html").read_text(encoding="utf-8")
    assert not list(small.parent.rglob("executed"))


def test_links_of_one_page(small):
    page = (small / "01_all.html").read_text(encoding="utf-8")
    assert page.count('href="20_two.html"') >= 2, "the navigation and the link in the card's HTML"
    assert 'href="20_two.html#the-second-part"' in page
    assert re.search(r'href="https://github\.com/[^"]+/blob/main/settings\.ini"', page)
    assert "[x](99_x.ipynb)" in page and "from $5 to $6, $7–$8" in page
    assert not (small / "_30_draft.html").exists()
    formula = '<p>text <div class="math notranslate nohighlight">\n\\[a^2\\]</div>'
    assert formula in (small / "20_two.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- what is refused

def refusal(folder: Path, **cells) -> str:
    "The message of a build that must fail, and nothing left behind."
    with pytest.raises(SiteError) as error:
        build_site(folder / "out", course(folder, **cells))
    assert not (folder / "out").exists()
    return str(error.value)


def test_all_broken_links_are_listed_at_once(tmp_path):
    message = refusal(
        tmp_path,
        n01_a=[new_markdown_cell("# A\n[x](55_gone.ipynb) and [y](01_a.ipynb) and [z](../nowhere.md 'title')")],
        n02_b=[new_markdown_cell("# B"), code("card()", result("<a href='77_gone.ipynb'>x</a>", "text/html"))],
    )
    assert message.splitlines()[1:] == [
        "01_a.ipynb links to 55_gone.ipynb, a chapter that does not exist",
        "01_a.ipynb links to ../nowhere.md, a file that does not exist or has no page",
        "02_b.ipynb links to 77_gone.ipynb, a chapter that does not exist",
    ]


@pytest.mark.parametrize(("output", "words"), [
    (new_output("error", ename="KeyError", evalue="x", traceback=[]), "shows a traceback (KeyError)"),
    (new_output("stream", name="stderr", text="warning"), "output on standard error"),
    (new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}), "SPEEDRUN_STATIC=1"),
])
def test_outputs_that_no_page_should_show(tmp_path, output, words):
    message = refusal(tmp_path, n01_a=[new_markdown_cell("# A"), code("run()", output)])
    assert words in message and "01_a.ipynb" in message and len(message.splitlines()) == 2


def test_a_notebook_without_title_or_part(tmp_path):
    assert "01_a.ipynb has no title" in refusal(tmp_path, n01_a=[new_markdown_cell("## A")])
    assert "topic.ipynb has no part" in refusal(tmp_path, topic=[new_markdown_cell("# A")])


def test_a_folder_that_is_not_the_repository(tmp_path):
    with pytest.raises(SiteError, match=r"settings\.ini is missing; run `speedrun site` in the root"):
        build_site(tmp_path / "out", tmp_path / "nbs")
    nbs = course(tmp_path)
    (nbs / "index.ipynb").unlink()
    with pytest.raises(SiteError, match=r"index\.ipynb is missing"):
        build_site(tmp_path / "out", nbs)


def test_a_folder_that_is_not_a_site_is_not_deleted(tmp_path):
    mine = tmp_path / "out" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(SiteError, match="is not a built site"):
        build_site(tmp_path / "out", course(tmp_path))
    assert mine.read_text() == "years of work"


def test_warnings_of_sphinx_are_errors_and_leave_the_old_site(tmp_path, mathjax, caplog, capfd):
    good = [new_markdown_cell("# A\ntext"), code("1", result("1"))]
    out = build_site(tmp_path / "out", course(tmp_path, n01_a=good))
    assert not caplog.records and capfd.readouterr() == ("", ""), "a good build says nothing"
    before = (out / "01_a.html").read_bytes()
    bad = [new_markdown_cell("# A\nother\n\n[x](02_b.ipynb#no-such-heading)\n\n![far](https://example.org/x.png)")]
    with pytest.raises(SiteError) as error:
        build_site(out, course(tmp_path, n01_a=bad, n02_b=good))
    first, *lines = str(error.value).splitlines()
    assert lines and all(re.match(r"01_a\.ipynb:\d+: WARNING: ", line) for line in lines), error.value
    assert "no-such-heading" in lines[0]
    assert (out / "01_a.html").read_bytes() == before and not (out / "02_b.html").exists()
    with pytest.raises(SiteError, match=r"01_a\.html loads https://example\.org/x\.png"):
        build_site(out, course(tmp_path, n01_a=[new_markdown_cell(bad[0].source.replace("#no-such-heading", ""))]))
    assert (out / "01_a.html").read_bytes() == before
    (tmp_path / "nbs" / "01_a.ipynb").unlink()
    assert not (build_site(out, tmp_path / "nbs") / "01_a.html").exists(), "a new build replaces the old site"


def test_mathjax_needs_npm_or_a_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SiteError, match=r"npm is missing: install Node\.js, or run `npm pack mathjax@3"):
        mathjax_archive()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(SiteError, match="could not fetch MathJax"):
        mathjax_archive()
    assert [path.name for path in (tmp_path / "speedrun").iterdir()] == []
    (tmp_path / "speedrun" / f"{site_build.MATHJAX}.tgz").write_bytes(b"something else")
    with pytest.raises(SiteError, match="is not the MathJax that this site expects; delete it"):
        mathjax_archive()


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    find = site_build.importlib.util.find_spec
    monkeypatch.setattr(site_build.importlib.util, "find_spec", lambda name: None if name == "myst_nb" else find(name))
    with pytest.raises(SiteError, match=r'the site needs myst_nb: pip install -e "\.\[dev\]"'):
        build_site(tmp_path / "out", tmp_path)


# ---------------------------------------------------------------------------------------------------- in the browser

@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def address(site):
    "The site behind a web server of this machine."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            "A page that is left while it loads breaks its connections."

    with Server(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def opened(browser, **options):
    "A page of its own, and the list of what went wrong on it: console errors, failed loads, requests to other hosts."
    context, wrong = browser.new_context(**options), []
    page = context.new_page()
    page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda response: response.status >= 400 and wrong.append(f"{response.status} {response.url}"))
    page.on("requestfailed", lambda request: "ERR_ABORTED" in request.failure  # left behind by the next `goto`
            or wrong.append(f"failed: {request.url} {request.failure}"))
    here = ("http://127.0.0.1:", "file:", "data:", "blob:")  # no other name leads anywhere: FLAGS
    page.on("request", lambda request: request.url.startswith(here)
            or wrong.append(f"asked another host: {request.url}"))
    try:
        yield page, wrong
    finally:
        context.close()


def drawn(page) -> None:
    "Wait until MathJax, where the page uses it, has drawn everything."
    page.evaluate("window.MathJax && MathJax.startup ? MathJax.startup.promise.then(() => 0) : 0")


def check_formulas(page, content: Page) -> None:
    "MathJax has drawn every formula of a page."
    formulas = sum("math" in (attrs.get("class") or "").split() for _, attrs in content.tags)
    assert page.locator(".math mjx-container svg").count() >= formulas, "formulas are not drawn"
    assert page.locator("[data-mjx-error], mjx-merror, [data-mml-node=merror]").count() == 0
    if content.path.stem == "97_site":
        assert formulas > 0
        box = page.locator(".math mjx-container svg").first.bounding_box()
        assert box["width"] > 60 and box["height"] > 15, box


def check_sliders(page) -> int:
    "Every position of every slider of a page has its label, and the picture moves; returns the number of sliders."
    def state():
        return box.locator("img").get_attribute("src"), knob.locator("xpath=..").locator("output").inner_text()

    moved = 0
    for box in page.locator(".speedrun-play").all():
        for knob in box.locator("input[type=range]").all():
            seen = [state()]
            for _ in range(int(knob.get_attribute("max"))):
                knob.press("ArrowRight")
                seen.append(state())
            assert len({text for _, text in seen}) == len(seen), "a position without its own label"
            assert len({src for src, _ in seen}) > 1, "the picture does not move with the slider"
            knob.evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')); }")
            assert state() == seen[0]
            moved += 1
        assert box.locator("img").evaluate("e => e.decode().then(() => e.naturalWidth)") > 200
    return moved


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme", "offline"), [(1280, "light", False), (390, "dark", True)])
def test_pages_open_clean_fit_draw_and_move(browser, address, site, pages, width, scheme, offline):
    "Every page from a web server on a wide screen, and from the disk without a network on a narrow one."
    root, sliders = f"file://{site}" if offline else address, {}
    view = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme, "offline": offline}
    with opened(browser, **view) as (page, wrong):
        for name in [path.stem for path in NOTEBOOKS] + ["search"]:
            page.goto(f"{root}/{name}.html")
            drawn(page)
            assert not wrong, f"{name}: {wrong}"
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than {width} px"
            assert page.evaluate("document.documentElement.dataset.theme") == scheme
            assert page.locator(".search-button:visible, .search-button-field:visible").count() == 1, name
            if offline:
                check_formulas(page, pages[name])
            else:
                sliders[name] = check_sliders(page)
                played = any("speedrun-play" in (attrs.get("class") or "").split() for _, attrs in pages[name].tags)
                assert bool(sliders[name]) == played and not wrong, f"{name}: {wrong}"
    assert offline or (sliders["01_data"] and sliders["99_page"])


@pytest.mark.browser
def test_the_theme_button_changes_the_page_and_is_remembered(browser, address):
    def look():
        return page.locator("html").evaluate("e => [e.dataset.theme, getComputedStyle(document.body).backgroundColor]")

    with opened(browser, color_scheme="light", viewport={"width": 1280, "height": 900}) as (page, wrong):
        page.goto(f"{address}/01_data.html")
        theme, colour = look()
        assert theme == "light"
        page.locator(".theme-switch-button:visible").first.click()
        page.locator(".theme-change-button[data-mode=dark]:visible").first.click()
        assert look()[0] == "dark" and look()[1] != colour
        page.goto(f"{address}/02_baseline.html")
        assert look()[0] == "dark" and not wrong


@pytest.mark.browser
def test_search_and_folds(browser, address):
    with opened(browser) as (page, wrong):
        page.goto(f"{address}/search.html?q=shakespeare")
        result = page.locator("#search-results a[href*='01_data.html']").first
        result.wait_for(timeout=10_000)
        page.goto(f"{address}/01_data.html")
        fold = page.locator("details.hide", has_text="TokenLoader").first
        listing = fold.locator("pre")
        assert not listing.is_visible()
        fold.locator("summary").click()
        assert listing.is_visible() and "class TokenLoader" in listing.inner_text()
        assert not wrong


@pytest.mark.browser
def test_text_of_figures_stays_inside(browser, site):
    figures = sorted(site.glob("_images/*.svg"))
    assert figures
    outside = """() => { const box = document.querySelector('svg').getBoundingClientRect();
        return [...document.querySelectorAll('text')].filter(e => { const r = e.getBoundingClientRect();
            return r.width && (r.left < box.left - 3 || r.right > box.right + 3 || r.top < box.top - 3
                               || r.bottom > box.bottom + 3); }).map(e => e.textContent); }"""
    with opened(browser, viewport={"width": 1200, "height": 1200}) as (page, _):
        for figure in figures:
            page.set_content(figure.read_text(encoding="utf-8"))
            clipped = page.evaluate(outside)
            words = page.evaluate("[...document.querySelectorAll('text')].map(e => e.textContent).join(' | ')")
            assert not clipped, f"text outside of the figure: {clipped} in the figure with: {words[:200]}"
