"""The page of a conversion: every number against its source, nothing untrusted as markup, and how it lies in a browser.

All figures here are made up.
"""

import json
import math
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote

import pytest

from kit.convert.charts import Axis, line_chart, scatter
from kit.convert.errors import ExitCode, KitError
from kit.convert.figures import OPERATIONS, Node
from kit.convert.html import write_html
from kit.convert.report import renew_card
from kit.convert.summary import eval_results, summary
from kit.recipes import load_recipes

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'&amp;"
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def made_up(*key):
    """A number from 0 to 1 that its key fixes, with digits that rounding would lose."""
    return (math.sin(sum(ord(c) for c in repr(key))) + 1) / 2


def row(name, level):
    """A model or ablation that is the worse the higher its level (0 to 1)."""
    return {
        "name": name,
        "perplexity": 20 + 12 * level + made_up(name),
        "perplexity_stderr": 0.3 + made_up(name, "e") / 10,
        "word_perplexity": 60 + 40 * level + made_up(name, "w"),
        "self_perplexity": 9 + level,
        "self_perplexity_stderr": math.nan,
        "kl": level / 3 + 1e-9,
        "kl_stderr": 0.00211111,
        "top1": 0.95 - level / 3,
        "top1_stderr": 0.0041,
        "top5": 0.98 - level / 5,
        "bytes": 269_000_123 if name == "base" else 113_000_457,
        "cache_bytes": {"per_token": 23040 if name == "base" else 6480, "constant": 0},
        "peak_memory_bytes": 987654321,
        "prefill_tokens_per_second": 800.123 - 100 * level,
        "decode_tokens_per_second": 21.3456 - 5 * level,
        "perplexity_by_position": [
            {"start": 256 * i, "end": 256 * i + 256, "perplexity": 40 / (i + 1) + 9 * level + 1 / 3, "tokens": 3072}
            for i in range(6)
        ],
        "window_losses": [3.0, 3.1],
        "recall": {
            "mqar": [
                {"length": length, "pairs": pairs, "accuracy": made_up(name, length, pairs), "stderr": 0.02}
                for length in (256, 512, 1024)
                for pairs in (4, 16)
            ],
            "needle": [
                {"length": length, "depth": depth, "accuracy": made_up(name, length, depth), "stderr": 0.0}
                for length in (512, 2048)
                for depth in (0.0, 0.5, 1.0)
            ],
        },
        "dropped_inputs": None
        if name == "base"
        else {f"self_attn.{linear}_proj": [made_up(name, linear, layer) for layer in range(4)] for linear in "qko"},
        "generations": {
            "repetition": 0.08123 + level / 5,
            "degenerate": level / 4,
            "samples": [
                {"prompt": "The capital of France is", "text": f" Paris, says {name}.\nAnd Lyon."},
                {"prompt": f"HTML: {ATTACK}", "text": "" if name == "base" else ATTACK * 3},
            ],
        },
        "tasks": {
            "arc_easy": {
                "metrics": {"acc": 0.25, "acc_stderr": 0.0158, "acc_norm": 0.5 - level / 9, "acc_norm_stderr": 0.0151},
                "num_samples": 1000,
                "num_fewshot": 0,
                "correct": [0, 1, 0, 0],
            },
            "gsm8k": {
                "metrics": {"exact_match,strict-match": 0.02, "exact_match_stderr,strict-match": 0.0041},
                "main": "exact_match,strict-match",
                "num_samples": 250,
                "num_fewshot": 5,
            },
        },
    }


RESULTS = {
    "settings": {
        "sampled_tokens": 4096,
        "sampled_from": "smollm2",
        "seed": 1,
        "dataset": "wiki_test.txt",
        "dataset_tokens": 24576,
        "window": 2048,
        "dtype": "bfloat16",
        "device": "CPU (2 threads)",
    },
    "rows": [
        row("base", 0.0),
        row("out", 0.3),
        row("out, weights only", 0.2),
        row("rtn", 0.9),
        row(f"a/b~c {ATTACK}", 0.6),
    ],
    "comparisons": [
        {"metric": "perplexity", "a": "out", "b": "base", "difference": 3.61, "low": 2.51, "high": 4.7171717,
         "significant": True, "samples": 12},
        {"metric": "arc_easy acc", "a": "out", "b": "rtn", "difference": 0.01, "low": -0.012345678, "high": 0.03,
         "significant": False, "samples": 1000},
    ],
}  # fmt: skip

REPORT = {
    "model": {"source": "hub/smollm2", "fingerprint": "0f" * 32, "parameters": 134515008},
    "recipes": [{"recipe": "fireq"}],
    "plan": {"model": "smollm2 (llama, 134.5 M parameters)", "disk": "113.1 MB needed, 8.00 GB free"},
    "stages": {
        "fireq.measure": [
            {f"{name} {bits}": 10 ** (-4 * made_up(i, name, bits)) for name in LINEARS for bits in (4, 8)}
            for i in range(12)
        ],
        "fireq.quantize": [
            {**{f"{name} error": made_up(i, name) / 99 + 1e-5 for name in LINEARS}, "error": made_up(i) + 0.1}
            for i in range(12)
        ],
        "lolcats.transfer": [
            {
                "loss_first": 9 + made_up(i),
                "loss_last": 1 + made_up(i, 2),
                "scale": 0.1,
                "key loss": 4e7 * made_up(i, 3),
            }
            for i in range(12)
        ],
        "fireq.tune": [{"losses": [0.5 / (i + 1) + made_up(i) / 20 for i in range(150)], "trained_parameters": 99}],
    },
    "data": [{"recipe": "fireq", "seed": 0, "source": "c4.jsonl", "num_tokens": 2048, "sha256": "ab" * 32}],
    "command": "kit quantize hub/smollm2 --set 'group_size=64' -o out",
    "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "CPU (2 threads)"},
    "verification": {"relative_logit_difference": 1.234567e-7, "probe_tokens": 96},
    "cost": {"seconds": 345.6, "peak_memory_bytes": 1523515392},
}


@pytest.fixture
def out(tmp_path):
    """A converted checkpoint as far as a report reads it."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "kit_report.json").write_text(json.dumps(REPORT))
    (folder / "kit_recipe.yaml").write_text("recipe: fireq\nseed: 0\n")
    return folder


@pytest.fixture
def results(tmp_path):
    file = tmp_path / "compare results.json"
    file.write_text(json.dumps(RESULTS))
    return file


@pytest.fixture
def page(out, results):
    """The page, and the documents that it was made from by name."""
    documents = {"kit_report.json": REPORT, results.name: RESULTS}
    return write_html(out, [results]).read_text(), documents


# ---- reading a page


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def walk(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def find(self, test):
        return [element for element in self.walk() if test(element)]

    def has_class(self, name):
        return name in (self.attributes.get("class") or "").split()

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def ancestors(self):
        element = self
        while element:
            yield element
            element = element.parent


class Reader(HTMLParser):
    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self):
        super().__init__()
        self.root = self.open = Element("document", {}, None)

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), self.open)
        self.open.children.append(element)
        if tag not in self.VOID:
            self.open = element

    def handle_startendtag(self, tag, attributes):
        self.open.children.append(Element(tag, dict(attributes), self.open))

    def handle_endtag(self, tag):
        assert self.open.tag == tag, f"</{tag}> closes <{self.open.tag}>"
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.children.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open is reader.root
    return reader.root


def look_up(documents, address):
    """The value at an address, `document#/json/pointer`."""
    name, _, pointer = address.partition("#")
    value = documents[unquote(name)]
    for step in unquote(pointer).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "GiB": 2**30, "%": 0.01}


def check_rounding(text, value):
    """That a shown number is the value, rounded to the digits that it shows."""
    number, _, unit = text.replace("−", "-").replace(",", "").partition(" ")
    scale = UNITS.get(unit, 1.0)
    mantissa, _, exponent = number.partition("e")
    step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) * scale
    assert abs(float(number) * scale - value) <= 0.5000001 * step, f"{text} is not {value}"


def check(html, documents):
    """Check every number and text of a page against its source; return the addresses that it shows."""
    root, shown = read(html), set()
    body = root.find(lambda e: e.tag == "body")[0]
    for element in body.walk():
        attributes = element.attributes
        if "data-list" in attributes:
            check_points(element, look_up(documents, attributes["data-list"]))
            shown.add(attributes["data-list"])
        if "data-at" not in attributes:
            continue
        addresses = attributes["data-at"].split(" ")
        shown.update(addresses)
        sources = [look_up(documents, address) for address in addresses]
        operation = attributes.get("data-op")
        wanted = OPERATIONS[operation](*sources) if operation in OPERATIONS else sources[0]
        if operation == "key":
            wanted = unquote(addresses[0].rpartition("/")[2]).replace("~1", "/").replace("~0", "~")
        if element.tag in ("span", "pre"):
            assert element.text.strip() == str(wanted).strip()
            continue
        number = float(attributes["value" if element.tag == "data" else "data-value"])
        assert number == wanted, f"{addresses}: {number} is not {wanted}"
        if element.tag == "data":
            assert float(attributes["title"]) == wanted
            check_rounding(element.text, wanted)
        elif element.tag == "text":
            check_rounding(f"{element.text} %", wanted)
        elif element.tag == "circle":
            check_place(element, "data-y", 100 - percent(element, "cy"), wanted)
            if "data-x-at" in attributes:
                assert float(attributes["data-x-value"]) == look_up(documents, attributes["data-x-at"])
                check_place(element, "data-x", percent(element, "cx"), float(attributes["data-x-value"]))
        elif element.tag == "rect":
            assert f": {wanted:.6g}" in element.text
    return shown


def percent(element, key):
    return float(element.attributes[key].removesuffix("%"))


def unplace(element, axis, place):
    """The value at a place of an axis, from what the plot says of it."""
    plot = next(e for e in element.ancestors if axis in e.attributes)
    low, high, log = map(float, plot.attributes[axis].split())
    return low * (high / low) ** (place / 100) if log else low + (high - low) * place / 100


def check_place(element, axis, place, value):
    assert unplace(element, axis, place) == pytest.approx(value, rel=1e-9)


def check_points(polyline, values):
    points = [tuple(map(float, point.split(","))) for point in polyline.attributes["points"].split()]
    assert len(points) == len(values)
    assert [unplace(polyline, "data-y", 100 - y) for _, y in points] == pytest.approx(values, rel=1e-3)
    assert [unplace(polyline, "data-x", x) for x, _ in points] == pytest.approx(range(1, len(values) + 1), rel=1e-3)


# ---- every number equals its source


def numbers(value, at):
    """Addresses of all finite numbers below a value."""
    if isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            step = str(key).replace("~", "~0").replace("/", "~1")
            yield from numbers(below, f"{at}/{step}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield at


def test_every_number_equals_its_source_to_the_last_digit_and_none_is_left_out(page):
    html, documents = page
    shown = {unquote(address) for address in check(html, documents)}
    everything = {at for name, document in documents.items() for at in numbers(document, f"{name}#")}
    coordinates = r"/(start|end|tokens|length|depth|pairs|stderr)$|/window_losses/|/correct/"
    untold = r"/losses/\d+$|/trained_parameters$|/num_(samples|fewshot)$"  # in a curve; once for all models
    missing = {at for at in everything - shown if not re.search(f"{coordinates}|{untold}", at)}
    assert not missing
    assert "kit_report.json#/stages/fireq.tune/0/losses" in shown


def test_nothing_on_the_page_holds_a_digit_that_no_source_vouches_for(page):
    body = read(page[0]).find(lambda e: e.tag == "body")[0]
    words = re.compile(r"top-[15] same|95 % interval|0-shot")
    for element in body.walk():
        told = any(
            "data-at" in e.attributes or e.has_class("tick") or e.tag in ("title", "desc", "details") or
            e.attributes.get("id") == "recipe"
            for e in element.ancestors
        )  # fmt: skip
        for text in (child for child in element.children if isinstance(child, str)):
            if not told and element.attributes.get("class") != "halo" and not element.has_class("end-label"):
                assert not re.search(r"\d", words.sub("", text)), text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r'<data value="269000123"', '<data value="269000124"'),
        (r">269\.0 MB<", ">269.1 MB<"),
        (r'cy="(\d+)', r'cy="1\1'),
        (r'(data-op="\w+" title="[^"]*">)', r"\g<1>7"),
        (r'points="([\d.]+),(\d)', r'points="\1,9\2'),
        (r">kit quantize ", ">kit quantise "),
    ],
)
def test_the_check_fails_on_a_page_that_differs(page, old, new):
    html, documents = page
    changed, count = re.subn(old, new, html)
    assert count
    with pytest.raises(AssertionError):
        check(changed, documents)


# ---- untrusted text


def test_names_and_generated_text_are_text_and_never_markup(page):
    root = read(page[0])
    tags = {element.tag for element in root.walk()}
    assert not tags & {"script", "img", "iframe", "object", "form"}
    for element in root.walk():
        assert not [name for name in element.attributes if name.startswith("on")]
    for link in root.find(lambda e: "href" in e.attributes or "src" in e.attributes):
        assert link.attributes["href"].startswith(("#", "data:,"))
    assert "url(" not in page[0]
    assert "@import" not in page[0]
    answers = [e.text for e in root.find(lambda e: e.has_class("answer"))]
    assert sum(ATTACK * 3 in answer for answer in answers) == 4
    assert sum("(nothing)" in answer for answer in answers) == 1


# ---- what is there


def sections(html):
    return [e.attributes["id"] for e in read(html).find(lambda e: e.tag == "section")]


def test_sections_without_data_are_left_out(out, page, results):
    everything = [
        "measured",
        "significance",
        "trade-off",
        "position",
        "recall",
        "dropped",
        "text",
        "layers",
        "losses",
        "made",
    ]
    assert sections(page[0]) == everything
    minimal = {key: REPORT[key] for key in ("model", "recipes")}
    (out / "kit_report.json").write_text(json.dumps(minimal))
    assert sections(write_html(out).read_text()) == ["made"]
    results.write_text(json.dumps({"rows": [{"name": "out", "perplexity": 3.0}]}))
    html = write_html(out, [results]).read_text()
    assert sections(html) == ["measured", "made"]
    assert "has not been measured beside its base" in html


def test_the_conversions_own_evaluation_is_shown_too(out, results):
    evaluation = {"settings": RESULTS["settings"], "rows": [row("base", 0.1), row("converted", 0.4)]}
    report = {**REPORT, "evaluation": evaluation}
    (out / "kit_report.json").write_text(json.dumps(report))
    html = write_html(out, [results]).read_text()
    shown = check(html, {"kit_report.json": report, results.name: RESULTS})
    assert "kit_report.json#/evaluation/rows/1/kl" in shown
    assert "Measured by the conversion" in html


def test_two_results_of_one_name_are_told_apart(out, tmp_path, results):
    other = tmp_path / "other"
    other.mkdir()
    (other / results.name).write_text(json.dumps({"rows": [{"name": "out", "perplexity": 3.25}]}))
    html = write_html(out, [results, other / results.name]).read_text()
    documents = {str(results): RESULTS, str(other / results.name): {"rows": [{"name": "out", "perplexity": 3.25}]}}
    check(html, {"kit_report.json": REPORT, **documents})


def test_a_broken_model_is_said_to_be_broken(out, results):
    broken = json.loads(results.read_text())
    broken["rows"][1]["perplexity"] = math.inf
    broken["comparisons"][0] |= {"difference": math.inf, "low": math.nan, "high": math.inf}
    results.write_text(json.dumps(broken))
    html = write_html(out, [results]).read_text()
    assert "Perplexity is not finite: the result is broken." in html
    assert "compare%20results.json#/rows/1/perplexity" in check(html, {"kit_report.json": REPORT, results.name: broken})


# ---- the sentence


def sentence(change=None, comparisons=()):
    rows = {
        "base": {"name": "base", "perplexity": 20.0, "bytes": 200e6, "decode_tokens_per_second": 10.0},
        "out": {"name": "out", "perplexity": 22.0, "bytes": 100e6, "decode_tokens_per_second": 15.0},
    }
    for name, values in (change or {}).items():
        rows[name] = rows.get(name, {"name": name}) | values
    measurement = {"settings": {"dataset": "wiki.txt"}, "rows": list(rows.values()), "comparisons": list(comparisons)}
    parts = summary(Node.document("r", REPORT), [Node.document("m", measurement)], "out")
    return "".join(map(str, parts)).strip()


def compared(b, significant):
    return {"metric": "perplexity", "a": "out", "b": b, "significant": significant, "samples": 12}


@pytest.mark.parametrize(
    ("change", "comparisons", "words"),
    [
        ({}, [], "smollm2 takes 50.0 % fewer bytes on disk (200.0 MB → 100.0 MB) and decodes 50.0 % faster"),
        ({}, [], "Perplexity on wiki.txt is 10.0 % higher (20.00 → 22.00), not tested for significance."),
        ({}, [compared("base", True)], "(20.00 → 22.00), a significant difference (paired bootstrap, 12 samples)."),
        ({}, [compared("base", False)], "(20.00 → 22.00), no significant difference (paired bootstrap, 12 samples)."),
        ({}, [compared("rtn", True)], "not tested for significance."),
        ({"out": {"perplexity": 19.0}}, [], "is 5.0 % lower (20.00 → 19.00)"),
        ({"out": {"perplexity": 20.0}}, [], "Perplexity on wiki.txt is the same,"),
        ({"out": {"bytes": 200e6}}, [], "takes as many bytes on disk"),
        ({"out": {"bytes": 250e6}}, [], "takes 25.0 % more bytes on disk"),
        ({"out": {"decode_tokens_per_second": 5.0}}, [], "decodes 50.0 % slower (10.0 → 5.00 tokens a second)"),
        ({"rtn": {"perplexity": 21.0}}, [], "It loses to rtn (21.00)."),
        ({"rtn": {"perplexity": 21.0}}, [compared("rtn", False)], "It loses to rtn (21.00, not significantly)."),
        ({"rtn": {"perplexity": 23.0}, "x": {"perplexity": 21.5}}, [], "loses to x (21.50), and beats rtn (23.00)."),
        ({"out, weights only": {"perplexity": 21.0}}, [], "not tested for significance."),
        ({"out": {"top1": 0.9}}, [], "It picks the base's next token 90.0 % of the time."),
        (
            {"base": {"cache_bytes": {"per_token": 9, "constant": 0}},
             "out": {"cache_bytes": {"per_token": 0, "constant": 2000}}},
            [],
            "has a cache that does not grow with the text (2.0 kB a sequence)",
        ),
    ],
)  # fmt: skip
def test_the_summary_says_what_the_numbers_say(change, comparisons, words):
    assert words in sentence(change, comparisons)


def test_ablations_are_no_rivals_and_nothing_measured_says_nothing():
    assert "weights only" not in sentence({"out, weights only": {"perplexity": 1.0}})
    alone = Node.document("m", {"rows": [{"name": "out", "perplexity": 3.0}]})
    assert summary(Node.document("r", REPORT), [alone], "out") == []


# ---- the card


def test_the_card_carries_the_short_form_and_a_model_index_that_the_hub_reads(out, results):
    from huggingface_hub import ModelCard

    recipes = load_recipes("fireq")
    card = ModelCard.load(renew_card(out, recipes, [results]))
    assert "Perplexity on wiki\\_test.txt is" in card.text
    assert "| out, weights only |" in card.text
    found = {(r.dataset_name, r.metric_type): r for r in card.data.eval_results}
    own = RESULTS["rows"][1]
    wanted = {
        ("wiki_test.txt", "perplexity"): own["perplexity"],
        ("wiki_test.txt", "word_perplexity"): own["word_perplexity"],
        ("arc_easy", "acc"): own["tasks"]["arc_easy"]["metrics"]["acc"],
        ("arc_easy", "acc_norm"): own["tasks"]["arc_easy"]["metrics"]["acc_norm"],
        ("gsm8k", "exact_match,strict-match"): 0.02,
    }
    assert {key: result.metric_value for key, result in found.items()} == wanted
    assert found["arc_easy", "acc"].dataset_args == {"num_few_shot": 0}
    assert found["wiki_test.txt", "perplexity"].metric_args == {"window": 2048, "dataset_tokens": 24576}
    assert card.data.model_name == "smollm2, converted with fireq"


def test_the_latest_measurement_counts_and_broken_numbers_do_not():
    def measured(**values):
        return Node.document("m", {"settings": {"dataset": "t"}, "rows": [{"name": "converted", **values}]})

    results = eval_results([measured(perplexity=3.0, word_perplexity=math.nan), measured(perplexity=2.5)], "out")
    assert [(r.metric_type, r.metric_value) for r in results] == [("perplexity", 2.5)]


# ---- mistakes


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        ("{", "not JSON", "r.json"),
        ("[]", "the whole file", "r.json, the whole file"),
        ('{"settings": {}}', "rows", "r.json, rows"),
        ('{"rows": [{"perplexity": 3}]}', "rows.0.name", "r.json, rows.0.name"),
        ('{"rows": [{"name": "a", "perplexity": "3"}]}', "rows.0.perplexity", "r.json, rows.0.perplexity"),
        ('{"rows": [{"name": "a", "recall": {"mqar": [{"length": 3}]}}]}', "pairs", "rows.0.recall.mqar.0.pairs"),
        ('{"rows": [], "comparisons": [{"metric": "kl"}]}', "comparisons.0.a", "r.json, comparisons.0.a"),
    ],
)
def test_broken_results_name_the_field(out, tmp_path, content, what, where):
    file = tmp_path / "r.json"
    file.write_text(content)
    with pytest.raises(KitError) as error:
        write_html(out, [file])
    assert what in error.value.what
    assert error.value.where.endswith(where)
    assert "kit eval --json" in error.value.next_step
    assert error.value.exit_code == ExitCode.USAGE
    assert not (out / "report.html").exists()


def test_missing_inputs_name_the_closest(out, tmp_path, results):
    with pytest.raises(KitError) as error:
        write_html(tmp_path / "uot")
    assert "did you mean 'out'?" in error.value.next_step
    with pytest.raises(KitError) as error:
        write_html(out, [tmp_path / "compare result.json"])
    assert f"did you mean '{results.name}'?" in error.value.next_step
    with pytest.raises(KitError, match="no report"):
        write_html(tmp_path)


def test_only_a_page_of_our_own_is_replaced(out, tmp_path):
    page = write_html(out)
    page.write_text(page.read_text().replace("</main>", "old</main>"))
    assert "old</main>" not in write_html(out).read_text()
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html>")
    with pytest.raises(KitError, match="no page of"):
        write_html(out, output=mine)
    assert mine.read_text() == "<!doctype html>"
    with pytest.raises(KitError, match="cannot be written"):
        write_html(out, output=tmp_path / "nowhere" / "page.html")


# ---- geometry


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (20.1, 33.1, False), (-3e-5, 2e-5, False), (1e8, 2.7e8, False), (1e-6, 0.3, True), (3, 80, True),
     (19, 21, True), (0, 29, False)],
)  # fmt: skip
def test_ticks_are_few_round_and_where_they_say(low, high, log):
    axis = Axis("", low, high, log)
    assert 2 <= len(axis.ticks) <= 6
    for place, text in axis.ticks:
        number, _, letter = text.replace("−", "-").replace(",", "").partition(" ")
        value = float(number) * (1e6 if letter == "M" else 1)
        assert 0 <= place <= 100
        assert axis.place(value) == pytest.approx(place, abs=1e-6)
        digits = f"{abs(value):e}".partition("e")[0].rstrip("0").rstrip(".")
        assert len(digits) <= 4


def test_labels_at_the_ends_of_lines_lie_apart_in_their_order():
    ends = [1.0, 1.01, 1.02, 5.0, 5.01, 1.03]
    nodes = [[(0.0, Node(2.0, "a")), (1.0, Node(end, "b"))] for end in ends]
    chart = line_chart("t", "x", "y", [(str(i), i, points, "") for i, points in enumerate(nodes)])
    places = sorted((line.marks[-1].y, line.label_y) for line in chart.lines)
    labels = [label for _, label in places]
    assert all(b - a >= 100 * 15 / 220 - 1e-9 for a, b in pairwise(labels))
    assert min(labels) >= -10
    assert max(labels) <= 100


def test_the_front_holds_those_that_no_other_beats():
    values = [(made_up("x", i), made_up("y", i)) for i in range(30)]
    points = [(str(i), 0, Node(x, "x"), Node(y, "y")) for i, (x, y) in enumerate(values)]
    for more in (False, True):
        chart = scatter("t", "x", "y", points, x_form=str, y_form=str, more_is_better=more)
        for (x, y), dot in zip(values, chart.dots, strict=True):
            beaten = any((a > x if more else a < x) and b < y for a, b in values)
            assert dot.on_front != beaten


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const wide = [...document.querySelectorAll('main *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.tagName + ' ' + (e.getAttribute('class') || '') + ' ' + e.textContent.slice(0, 40));
parent.document.title = JSON.stringify([...JSON.parse(parent.document.title), {
  inner: innerWidth, scroll: document.documentElement.scrollWidth, wide,
  dark: matchMedia('(prefers-color-scheme: dark)').matches,
  page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
}]);
</script>"""


def browse(page, dark=False):
    """Open a page in headless Chromium: (the DOM, what the console said)."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--disable-dev-shm-usage",
        "--disable-background-networking", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", "--window-size=1280,2000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@needs_chromium
def test_in_a_browser_the_console_is_silent_and_no_script_runs(page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page[0])
    dom, console = browse(file)
    assert console == []
    assert "owned" not in dom.partition("</title>")[0]
    file.write_text(page[0].replace("</body>", "<script>document.title = 'owned'</script></body>"))
    dom, console = browse(file)  # were one to slip in, the page's policy would stop it, and the console would say so
    assert len(console) == 1
    assert "owned" not in dom.partition("</title>")[0]


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser_nothing_overflows_on_a_phone_or_a_desktop(page, tmp_path, dark):
    widths = [390, 768, 901, 1280]
    inner = re.sub(r"<meta http-equiv[^>]*>", "", page[0]).replace("</body>", f"{PROBE}</body>")
    frames = [f'<iframe width="{w}" height="900" style="border: 0" srcdoc="{escape(inner)}"></iframe>' for w in widths]
    file = tmp_path / "frames.html"  # in frames, as a window is never narrower than 500 pixels
    file.write_text(f"<!doctype html><meta charset=utf-8><title>[]</title>{''.join(frames)}")
    dom, console = browse(file, dark)
    assert console == []
    found = json.loads(read(dom[dom.index("<title>") : dom.index("</title>") + 8]).text)
    assert sorted(probe["inner"] for probe in found) == widths
    for probe in found:
        assert probe["dark"] == dark
        assert probe["scroll"] <= probe["inner"]
        assert probe["wide"] == []
        background, text = (sum(map(int, re.findall(r"\d+", probe[key])[:3])) for key in ("page", "text"))
        assert (background < text) == dark
