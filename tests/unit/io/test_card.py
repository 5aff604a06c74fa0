"""The model card: valid front matter, honest words, and no user text that becomes markup."""

from __future__ import annotations

import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import diffedit
from diffedit.io.card import Metric, model_card
from diffedit.io.files import EDIT_FILE
from diffedit.io.lora import KOHYA_FILE, PEFT_FILE
from diffedit.io.markdown import escape, table

FILES = {EDIT_FILE: 2100, KOHYA_FILE: 900, PEFT_FILE: 1000, "adapter_config.json": 400}

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "`code` ``` fence",
    "[link](javascript:alert(1))",
    "![image](http://evil.example/x.png)",
    "http://evil.example www.evil.example me@evil.example",
    "# heading",
    "*bold* _it_ ~~no~~",
    "&lt;b&gt; &#60;i&#62;",
    "\\| \\`",
    "---",
    "{{ jinja }} {% raw %}",
    "$\\href{javascript:x}{y}$",
    "@someone #123",
    '"><svg/onload=alert(1)>',
    "<!-- comment -->",
    "]]></style>",
    "<|x|>",
    "\u202egnp.exe",
    "zero\u200bwidth",
    "- item",
    "1. item",
    "> quote",
]


class Tags(HTMLParser):
    """Names of the tags and all text of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [f"{name}={value}" for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def render(markdown: str) -> Tags:
    """Through a Markdown renderer that lets raw HTML pass: the worst reader there is."""
    parsed = Tags()
    parsed.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    return parsed


def readable(text: str) -> str:
    """What `escape` promises to show for a text."""
    shown = [
        f"U+{ord(char):04X}"
        if not char.isspace() and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn") and char != "\u200d"
        else " " if char.isspace() else char
        for char in text
    ]  # fmt: skip
    return " ".join("".join(shown).split())


def squeeze(text: str) -> str:
    return " ".join(text.split())


@settings(deadline=None, max_examples=150)
@given(st.text() | st.sampled_from(NASTY) | st.text("<>&|`*_[]()!#~\\@:/.-+{}$\"' a\n1"))
def test_escaped_text_reads_the_same_and_makes_no_markup(text: str) -> None:
    cell = render(table(["head"], [[text]]))
    assert cell.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert squeeze(cell.text.strip().removeprefix("head")) == readable(text)
    line = render(f"before {escape(text)} after")
    assert line.tags == ["p"] and squeeze(line.text) == squeeze(f"before {readable(text)} after")
    for around in ("# a {}", "a *{}* b", "> a {}", "- a {}\n- b", "[a {}](x)", "| a |\n| --- |\n| {} |"):
        structure = render(around.replace("{}", "plain")).tags
        assert render(around.replace("{}", escape(text) or "plain")).tags == structure
    assert "\n" not in escape(text) and not set("<>|`[]*@\\") & set(escape(text))


@pytest.mark.parametrize(
    "text",
    [
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        '{"eos_weight": 0.1, "values": "module", "tokens": ["last"]}'.replace("[", "(").replace("]", ")"),
        "Basu et al. 2023, arXiv 2310.13730, as released (use_eos = 1, reg = 0.01)",
        'a photo of a {}, 50% off; "it\'s fine" - R & B! 16:9, 1/2, e+5?',
    ],
)
def test_what_means_nothing_stays_readable_in_the_file(text: str) -> None:
    assert escape(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("_it_", "&#95;it&#95;"),
        ("a_b", "a_b"),
        ("C#", "C&#35;"),
        ("http://x", "http&#58;//x"),
        ("www.x", "www&#46;x"),
        ("a :smile: b", "a &#58;smile: b"),
        ("&lt;", "&#38;lt;"),
        ("{{ x }} {% y %}", "&#123;{ x }} &#123;% y %}"),
        ("me@x", "me&#64;x"),
        ("$x$", "&#36;x&#36;"),
    ],
)
def test_what_could_mean_something_does_not(text: str, shown: str) -> None:
    assert escape(text) == shown


def test_the_renderer_would_show_an_attack() -> None:
    """The control: unescaped, the same texts do become markup."""
    for text, tag in ((NASTY[0], "script"), (NASTY[1], "img"), (NASTY[3], "code"), (NASTY[5], "img")):
        assert tag in render(f"| head |\n| --- |\n| {text} |").tags


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    out: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return out


def test_front_matter(make_edit: Any) -> None:
    card = model_card(make_edit().manifest, FILES)
    assert front_matter(card) == {
        "base_model": "some-user/some-model",
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "as-the-base-model",
        "license_link": "https://huggingface.co/some-user/some-model",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "stable-diffusion", "lora", "diffusers", "model-editing", "diffedit"],
    }


@pytest.mark.parametrize("source", ["/home/somebody/model", "builtin:emoji", "no/1: yes\nevil: true", "model"])
def test_only_a_hub_id_is_a_base_model(source: str, make_edit: Any) -> None:
    card = model_card(make_edit(source=source).manifest, FILES)
    assert "base_model" not in front_matter(card) and "evil" not in front_matter(card)
    assert "somebody" not in card


def test_an_id_that_yaml_would_read_as_a_number(make_edit: Any) -> None:
    assert front_matter(model_card(make_edit(source="1e3/1").manifest, FILES))["base_model"] == "1e3/1"


@pytest.mark.parametrize("text", NASTY)
def test_what_people_write_stays_text(text: str, make_edit: Any) -> None:
    plain = make_edit(requests=[request("plain")], settings={"note": "plain"})
    edit = make_edit(requests=[request(text)], settings={"note": text})
    card, usual = (render(model_card(made.manifest, FILES).split("---\n", 2)[2]) for made in (edit, plain))
    assert card.tags == usual.tags
    assert card.attributes == usual.attributes
    assert squeeze(card.text).count(readable(text)) >= 4


def request(text: str) -> dict[str, Any]:
    return {
        "subject": f"s {text}", "target": f"t {text}", "aliases": (f"u {text}",), "preserve": (f"p {text}",),
        "templates": ("a {}" + text.replace("{", "").replace("}", ""),),
    }  # fmt: skip


def test_the_words_are_honest(make_edit: Any) -> None:
    card = model_card(make_edit().manifest, FILES).lower()
    for word in ("removed", "erased", "forgets", "forgotten", "unlearn", "guarantee", "safe to"):
        assert word not in card
    for words in ("suppressed under these prompts", "deliberate attacks", "undoes it", "no safety filter"):
        assert words in squeeze(card)


def test_what_was_edited_and_how_it_came_out(make_edit: Any) -> None:
    edit = make_edit()
    card = squeeze(render(model_card(edit.manifest, FILES)).text)
    for part in ("ablate cat", "a dog", "quickfix", '{"lam": 0.1}', "12.5", "0.25", "1.0000", edit.manifest.edit_id):
        assert part in card, part
    assert "text_encoder.text_model.encoder.layers.0.self_attn.out_proj" in card
    for name, size in FILES.items():
        assert f"{name} {size} bytes" in card.replace("File ", "")


def test_only_files_that_are_there_are_explained(make_edit: Any) -> None:
    manifest = make_edit().manifest
    full, none = model_card(manifest, FILES), model_card(manifest, {})
    for words in ("load_lora_weights", "PeftModel", "ComfyUI", "Editor(pipe)"):
        assert words in full and words not in none
    assert f'pipe.load_lora_weights("{manifest.slug()}", weight_name="{KOHYA_FILE}")' in full


def test_the_same_manifest_gives_the_same_card(make_edit: Any) -> None:
    manifest = make_edit().manifest
    assert model_card(manifest, FILES) == model_card(manifest, dict(reversed(FILES.items())))


@pytest.mark.parametrize(
    ("source", "licence"),
    [
        ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m"),
        ("stabilityai/stable-diffusion-2-1", "openrail++"),
        ("builtin:emoji", "cc-by-4.0"),
        ("my-folder", None),
    ],
)
def test_the_licence_follows_the_base(source: str, licence: str | None, make_edit: Any) -> None:
    card = model_card(make_edit(source=source).manifest, FILES)
    assert front_matter(card).get("license") == licence
    section = card.split("## Licence\n")[1].split("##")[0]
    assert (licence or "not recorded") in section and "licence of the base model applies" in section


def test_the_bundled_models_own_card_says_the_same_licence() -> None:
    own = Path(diffedit.__file__).parent / "assets" / "emoji" / "README.md"
    assert front_matter(own.read_text(encoding="utf-8"))["license"] == "cc-by-4.0"


def test_the_paper_is_a_link(make_edit: Any) -> None:
    manifest = make_edit().manifest
    plugin = manifest.updater.model_copy(update={"reference": "A et al. 2023, arXiv 2310.13730 <b>, arXiv x](y)"})
    card = model_card(manifest.model_copy(update={"updater": plugin}), FILES)
    assert "[arXiv:2310.13730](https://arxiv.org/abs/2310.13730)" in card
    assert render(card.split("---\n", 2)[2]).tags.count("a") == render(model_card(manifest, FILES)).tags.count("a") + 1


def test_numbers_stand_there_only_if_there_are_any(make_edit: Any) -> None:
    manifest = make_edit().manifest
    assert "Nothing was measured" in model_card(manifest, FILES)
    metrics = [
        Metric("subject shown", 0.02, base=0.97, interval=(0.001, 0.0706), n=100, how="a judge | <b>"),
        Metric("others shown", 0.9),
    ]
    card = model_card(manifest, FILES, metrics=metrics)
    assert "| subject shown | 0.97 | 0.02 | 0.001 to 0.0706 | 100 | a judge &#124; &#60;b&#62; |" in card
    assert "| others shown |  | 0.9 |  |  |  |" in card and "Nothing was measured" not in card


def test_the_hub_reads_the_front_matter(make_edit: Any) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(model_card(make_edit(source="CompVis/stable-diffusion-v1-4").manifest, FILES)).data
    assert (data.base_model, data.license) == ("CompVis/stable-diffusion-v1-4", "creativeml-openrail-m")
    assert data.to_dict()["base_model_relation"] == "adapter" and data.pipeline_tag == "text-to-image"


def test_an_edit_that_met_no_model_has_no_result_to_show(make_edit: Any) -> None:
    manifest = make_edit().manifest
    sites = tuple(site.model_copy(update={"result_sha256": None, "achieved": None}) for site in manifest.sites)
    assert model_card(manifest.model_copy(update={"sites": sites}), FILES).count("not applied yet") == 2
