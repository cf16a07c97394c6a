"""The report in a headless Chromium: it opens, every plot is drawn, the sliders work, nothing is complained of."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from tiny_models import tiny_model

pytest.importorskip("plotly", reason="needs the extra 'study'")

from moe_ext.router_study import MoEModelWrapper
from moe_ext.router_study.analysis.study import run_study
from moe_ext.router_study.collect.data import TokenRows
from moe_ext.router_study.report.drawings import Bars, Heat, Lines, PerLayer, Series
from moe_ext.router_study.report.figures import figures_of
from moe_ext.router_study.report.page import figure_of, report_page
from moe_ext.router_study.report.passages import Passage, passages_of
from moe_ext.router_study.report.pictures import write_pictures

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,900",
    "--virtual-time-budget=60000",
    "--dump-dom",
]
WATCH = """<script>
window.problems = [];
window.addEventListener("error", (event) => problems.push(String(event.message)));
window.addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script></head>"""
TRY_OUT = """<script>
const colours = () => [...document.querySelectorAll("#passages span")].map((span) => span.style.background).join();
const shown = (plot) => plot.data.map((trace) => trace.visible !== false).join();
const report = async () => {
  if (!document.body.dataset.drawn) return setTimeout(report, 50);
  const requests = performance.getEntriesByType("resource").length;
  const outcome = { plots: {}, problems, colours: [], sliders: {}, requests };
  for (const plot of document.querySelectorAll(".plot")) {
    const marks = plot.querySelectorAll(".scatterlayer .trace, .barlayer .trace, .heatmaplayer image, .sankey-link");
    outcome.plots[plot.id] = [...marks].filter((mark) => mark.getBoundingClientRect().width > 1).length;
    for (const slider of plot.layout.sliders ?? []) {
      const before = shown(plot);
      await Plotly.restyle(plot, ...slider.steps[0].args);
      outcome.sliders[plot.id] = [before, shown(plot), slider.steps.length];
    }
  }
  const slider = document.getElementById("layer");
  for (let layer = 0; layer <= Number(slider.max); layer++) {
    slider.value = layer;
    slider.dispatchEvent(new Event("input"));
    outcome.colours.push(colours());
  }
  const written = document.createElement("pre");
  written.id = "outcome";
  written.textContent = JSON.stringify(outcome);
  document.body.appendChild(written);
};
report();
</script></body>"""


@pytest.fixture(scope="module")
def study():
    ids = torch.randint(3, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    rows = {
        name: TokenRows(ids[place:], torch.ones_like(ids[place:], dtype=torch.bool)) for place, name in enumerate("ab")
    }
    return run_study(MoEModelWrapper(tiny_model("olmoe")), rows, replicates=5, least_seen=1)


class Letters:
    """A tokenizer whose tokens would break a page that does not take care."""

    def decode(self, tokens):
        return ["</script>", "<b>", "&amp;", " x", "\n", "\N{REPLACEMENT CHARACTER}"][tokens[0] % 6]


@pytest.fixture(scope="module")
def page(study):
    drawings, passages = figures_of(study), passages_of(study.activations, Letters())
    return report_page("A <study>", {"model": "a & b"}, drawings, passages, num_experts=4)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found: install chromium to look at the page as well")
@pytest.mark.timeout(600)
def test_the_page_opens_draws_every_plot_and_its_sliders_work(page, study, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page.replace("</head>", WATCH, 1).replace("</body>", TRY_OUT), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    outcome = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert outcome["problems"] == []
    assert outcome["requests"] == 0
    assert set(outcome["plots"]) == {f"plot-{drawing.name}" for drawing in figures_of(study)}
    assert all(marks > 0 for marks in outcome["plots"].values()), outcome["plots"]
    assert len(outcome["colours"]) == len(set(outcome["colours"])) == 2
    assert set(outcome["sliders"]) == {"plot-domains", "plot-coactivation", "plot-alignment", "plot-norms"}
    for before, after, steps in outcome["sliders"].values():
        assert before != after
        assert steps == 2


def test_what_the_text_holds_cannot_end_a_script(page):
    texts = page.split('id="texts">')[1].split("</script>")[0]
    assert json.loads(texts)["texts"][0]["domain"] == "a"
    assert "<" not in texts
    assert "<title>A &lt;study&gt;</title>" in page
    assert "a &amp; b" in page
    assert "<!--" not in page.split('<script type="application/gzip"')[0]


def test_a_part_of_a_character_is_shown_as_a_dot(study):
    tokens = {token for passage in passages_of(study.activations, Letters()) for token in passage.tokens}
    assert "\N{MIDDLE DOT}" in tokens
    assert "\N{REPLACEMENT CHARACTER}" not in tokens


def test_without_a_tokenizer_there_is_no_text_to_colour(study):
    assert passages_of(study.activations, None) == []
    assert 'id="texts">null<' in report_page("title", {}, [], [])


def test_a_passage_holds_what_each_token_chose(study):
    sample, (passage, _) = study.activations.sample, passages_of(study.activations, Letters())
    assert isinstance(passage, Passage)
    assert passage.chosen[1][5] == sample.chosen_RLSK[0, 1, 5].tolist()
    assert len(passage.tokens) == len(passage.chosen[0]) == 32


def test_lines_share_a_legend_entry_by_name_and_bands_have_none():
    series = [Series("a", [1, 2], [0, 1], [2, 3]), Series("chance", [1, 1], role="chance"), Series("chance", [0, 0])]
    drawn = figure_of(Lines(["0", "1"], series, "layer", "value"))
    assert [trace.get("showlegend") for trace in drawn["data"]] == [False, True, True, False]
    assert drawn["data"][0]["y"] == [2, 3, 1, 0]


def test_a_two_sided_map_is_white_at_its_centre_and_leaves_empty_cells_out():
    drawn = figure_of(Heat([[0.5, float("nan")], [1.25, 1]], ["0", "1"], ["0", "1"], "x", "y", "z", centre=1.0))
    (trace,) = drawn["data"]
    assert (trace["zmin"], trace["zmax"]) == (0.5, 1.5)
    assert trace["z"][0] == [0.5, None]


def test_of_a_plot_for_each_layer_the_middle_one_is_shown_first():
    plots = [Bars(["0"], [Series("a", [number])], "expert", "part", 0.5) for number in range(3)]
    drawn = figure_of(PerLayer(["0", "1", "2"], plots))
    assert [trace["visible"] for trace in drawn["data"]] == [False, False, True, True, False, False]
    assert [step["args"][0]["visible"].index(True) for step in drawn["layout"]["sliders"][0]["steps"]] == [0, 2, 4]


def test_every_drawing_is_a_picture_and_an_overview_holds_them(study, tmp_path):
    drawings = figures_of(study)[:4]
    written = write_pictures(drawings, tmp_path)
    assert [path.stem for path in written] == [*(drawing.name for drawing in drawings), "overview"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in written)
